"""WordNet lemmas by part of speech, and where tagger and lemmas are read from."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from vlm_attn.evaluation.words.tagger import Tagger

__all__ = ["Language", "lemmatiser", "load_language"]

_SUFFIXES: dict[str, tuple[tuple[str, str], ...]] = {
    "n": (("s", ""), ("ses", "s"), ("ves", "f"), ("xes", "x"), ("zes", "z"), ("ches", "ch"), ("shes", "sh"),
          ("men", "man"), ("ies", "y")),
    "v": (("s", ""), ("ies", "y"), ("es", "e"), ("es", ""), ("ed", "e"), ("ed", ""), ("ing", "e"), ("ing", "")),
    "a": (("er", ""), ("est", ""), ("er", "e"), ("est", "e")),
    "r": (),
}  # fmt: skip
_PART_OF_TAG = {"J": "a", "V": "v", "N": "n", "R": "r"}

Lemmatiser = Callable[[str, str], str]
"""``(lower-case word, part of speech "n" | "v" | "a" | "r") -> lemma``."""


def lemmatiser(
    lemmas: Mapping[str, Sequence[str]], exceptions: Mapping[str, Mapping[str, Sequence[str]]]
) -> Lemmatiser:
    """WordNet's morphology over word lists: the shortest known base form, the word itself if none is known.

    ``lemmas``: part of speech -> known words; ``exceptions``: part of speech -> irregular form -> base forms.
    """
    known = {part: frozenset(words) for part, words in lemmas.items()}

    @lru_cache(maxsize=1 << 16)
    def lemma(word: str, part: str = "n") -> str:
        words = known[part]
        if word in exceptions[part]:
            found = [form for form in (word, *exceptions[part][word]) if form in words]
            return min(found, key=len, default=word)
        forms = _stripped([word], part)
        found = [form for form in (word, *forms) if form in words]
        while forms and not found:
            forms = _stripped(forms, part)
            found = [form for form in forms if form in words]
        return min(found, key=len, default=word)

    return lemma


def _stripped(forms: Sequence[str], part: str) -> list[str]:
    return [form[: -len(old)] + new for form in forms for old, new in _SUFFIXES[part] if form.endswith(old)]


class Language:
    """A tagger and a lemmatiser that belong together; ``source`` says where they came from."""

    def __init__(self, tagger: Tagger, lemma: Lemmatiser, source: str) -> None:
        self.tagger, self.lemma, self.source = tagger, lemma, source

    def lemmas(self, tokens: Sequence[str]) -> list[str]:
        """Every token's lemma by its tag in this sequence; anything but adjectives, verbs and adverbs is a noun."""
        tags = self.tagger.tag(tokens)
        return [self.lemma(word, _PART_OF_TAG.get(tag[:1], "n")) for word, tag in zip(tokens, tags, strict=True)]

    def nouns(self, tokens: Sequence[str]) -> list[str]:
        """Noun lemmas of the tokens that are tagged as nouns, in order."""
        tags = self.tagger.tag(tokens)
        return [self.lemma(word, "n") for word, tag in zip(tokens, tags, strict=True) if tag.startswith("NN")]


@lru_cache(maxsize=2)
def load_language(folder: Path | None) -> Language:
    """From ``perceptron_tagger.json.gz`` and ``wordnet30_lemmas.json.gz`` in ``folder``; with None from installed
    NLTK data (``averaged_perceptron_tagger_eng`` and ``wordnet``)."""
    if folder is None:
        return _nltk_language()
    tables = _read(folder / "wordnet30_lemmas.json.gz")
    return Language(
        Tagger.from_data(_read(folder / "perceptron_tagger.json.gz")),
        lemmatiser(tables["lemmas"], tables["exceptions"]),
        "tables",
    )


def _nltk_language() -> Language:
    from nltk.corpus import wordnet  # type: ignore[import-untyped]
    from nltk.data import find  # type: ignore[import-untyped]
    from nltk.stem import WordNetLemmatizer  # type: ignore[import-untyped]

    name = "averaged_perceptron_tagger_eng"
    try:
        folder = Path(str(find(f"taggers/{name}/")))
        wordnet.ensure_loaded()
    except LookupError as error:
        raise FileNotFoundError(
            "Part-of-speech tagging needs the folder lemmatizer/ (perceptron_tagger.json.gz, "
            "wordnet30_lemmas.json.gz) in the data folder, or NLTK's own data: python -m nltk.downloader "
            f"{name} wordnet"
        ) from error
    parts = {part: json.loads((folder / f"{name}.{part}.json").read_text(encoding="utf-8"))
             for part in ("weights", "tagdict", "classes")}  # fmt: skip
    return Language(Tagger.from_data(parts), lru_cache(maxsize=1 << 16)(WordNetLemmatizer().lemmatize), "nltk")


def _read(path: Path) -> Any:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return json.load(file)
