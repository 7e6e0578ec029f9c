"""The object words of COCO captions: CHAIR's synonym table, double words, and its two published normalisers.

Variant A singularises every token by rule (the first CHAIR code); variant B lemmatises it by its part of speech (most
papers since 2024). Switching between them moves CHAIRs by up to 3.4 points, so the variant is part of every figure.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from vlm_attn.evaluation.chair import ObjectWords
from vlm_attn.evaluation.words.lemmas import Language
from vlm_attn.evaluation.words.tokens import treebank_tokens

__all__ = ["DOUBLE_WORDS", "coco_words_a", "coco_words_b", "read_synonyms"]

_KEPT = (
    "motor bike", "motor cycle", "air plane", "traffic light", "street light", "traffic signal", "stop light",
    "fire hydrant", "stop sign", "parking meter", "suit case", "sports ball", "baseball bat", "baseball glove",
    "tennis racket", "wine glass", "hot dog", "cell phone", "mobile phone", "teddy bear", "hair drier", "potted plant",
    "laptop computer", "home plate", "train track",
)  # fmt: skip
_ANIMALS = (
    "bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "animal", "cub",
)  # fmt: skip

DOUBLE_WORDS: dict[str, str] = {
    **{pair: pair for pair in _KEPT},
    **{f"{age} {animal}": animal for age in ("baby", "adult") for animal in _ANIMALS},
    **{f"passenger {vehicle}": vehicle for vehicle in ("jet", "train")},
    "bow tie": "tie",
    "toilet seat": "toilet",
    "wine glas": "wine glass",  # variant A's singular of "glass"
}
"""Two tokens -> what both together become. Home plate and train track are no objects: joined, they disappear."""


def read_synonyms(path: Path) -> dict[str, str]:
    """Surface form -> node word, the first entry of its line.

    As in all published figures, lines are stripped (one ends with a blank) and the entries between ", " are not: two
    begin with a space and never match.
    """
    nodes: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        forms = line.strip().split(", ")
        for form in forms:
            nodes.setdefault(form, forms[0])
    nodes.pop("", None)
    return nodes


def coco_words_a(nodes: dict[str, str], singular: Callable[[str], str]) -> ObjectWords:
    """Variant A: every token to its rule singular."""
    return _words(nodes, lambda tokens: [singular(token) for token in tokens], "A")


def coco_words_b(nodes: dict[str, str], language: Language) -> ObjectWords:
    """Variant B: every token to its WordNet lemma for the part of speech it has in this caption."""
    return _words(nodes, language.lemmas, "B")


def _words(nodes: dict[str, str], normalise: Callable[[list[str]], list[str]], name: str) -> ObjectWords:
    return ObjectWords(
        nodes=nodes,
        double_words=DOUBLE_WORDS,
        tokenise=lambda caption: treebank_tokens(caption.lower()),
        normalise=normalise,
        cleanup=_without_toilet_seat,
        name=name,
    )


def _without_toilet_seat(tokens: list[str]) -> list[str]:
    """A seat beside a toilet is the toilet's."""
    return [token for token in tokens if token != "seat"] if "toilet" in tokens and "seat" in tokens else tokens
