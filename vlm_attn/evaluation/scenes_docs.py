"""Documents of the scenes benchmarks: plain rows that can go into a `datasets.Dataset`, pictures drawn on demand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from PIL import Image

from vlm_attn.evaluation.chair import ObjectWords
from vlm_attn.evaluation.matching import unknown_name
from vlm_attn.scenes import benchmarks

__all__ = ["documents", "object_words", "picture"]

Document = dict[str, Any]

_BUILDERS: dict[str, Callable[[], list[Document]]] = {
    **{f"pope_{split}": lambda split=split: benchmarks.pope(split) for split in benchmarks.POPE_SPLITS},  # type: ignore[misc]
    "chair": lambda: [{**row, "truth": row["objects"]} for row in benchmarks.chair()],
    "mme": lambda: [{**row, "pair": row["pair_id"]} for row in benchmarks.mme()],
}


def documents(name: str) -> list[Document]:
    """The rows of ``pope_random``, ``pope_popular``, ``pope_adversarial``, ``chair`` or ``mme``, evaluation seeds."""
    if name not in _BUILDERS:
        raise ValueError(unknown_name("scenes benchmark", name, _BUILDERS))
    return _BUILDERS[name]()


@lru_cache(maxsize=1024)  # all pictures of all benchmarks, 13 MB: drawn once for all methods
def _draw(seed: int) -> Image.Image:
    return benchmarks.load_image({"image_seed": seed})


def picture(doc: Mapping[str, Any]) -> Image.Image:
    """The picture of a document, RGB."""
    return _draw(int(doc["image_seed"])).copy()


@lru_cache(maxsize=1)
def object_words() -> ObjectWords:
    """The world's word for each object kind with its synonyms and plurals."""
    forms: dict[str, list[str]] = {}
    for kind, words in benchmarks.synonyms().items():
        forms[kind] = [form for word in words for form in (word, *_plurals(word)) if form != kind]
    return ObjectWords.from_kinds(forms, name="scenes")


def _plurals(word: str) -> tuple[str, ...]:
    """Plural of a regular noun."""
    if word.endswith(("s", "x", "z", "ch", "sh")):
        return (word + "es",)
    if word.endswith("y") and word[-2:-1] not in "aeiou":
        return (word[:-1] + "ies",)
    return (word + "s",)
