"""Averaged perceptron part-of-speech tagger, for the published weights of NLTK's ``averaged_perceptron_tagger``.

The weights lie in one matrix, so that a token is fourteen row look-ups and one sum: several times faster than a sum
over dictionaries, with the additions in the same order. Words of the tag dictionary skip the model, as they did there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Tagger"]

_add = np.add.reduce  # row after row: the order in which the original adds up, which decides near-ties
_START, _END = ("-START-", "-START2-"), ("-END-", "-END2-")


class _Word(NamedTuple):
    """A token as the context sees it, and the weights' rows for each place it may take around the tagged token."""

    shape: str
    own: tuple[int, ...]
    word: tuple[int, ...]
    left: tuple[int, ...]
    left2: tuple[int, ...]
    right: tuple[int, ...]
    right2: tuple[int, ...]


class Tagger:
    """``weights``: feature -> {tag: weight}; ``tagdict``: word -> its one tag; ``classes``: all tags."""

    def __init__(self, weights: Mapping[str, Mapping[str, float]], tagdict: Mapping[str, str], classes: Sequence[str]):
        # the highest score wins, and among equal scores the larger tag string: argmax takes the first of them
        self._classes = sorted(classes, reverse=True)
        column = {tag: place for place, tag in enumerate(self._classes)}
        self._rows = {feature: place for place, feature in enumerate(weights)}
        self._matrix = np.zeros((len(weights), len(column)))
        for place, row in enumerate(weights.values()):
            for tag, weight in row.items():
                self._matrix[place, column[tag]] = weight
        self._tagdict = dict(tagdict)
        self._word = lru_cache(maxsize=1 << 16)(self._word_rows)
        self._history = lru_cache(maxsize=1 << 12)(
            lambda p, q: self._known(f"i-1 tag {p}", f"i-2 tag {q}", f"i tag+i-2 tag {p} {q}")
        )
        self._after = lru_cache(maxsize=1 << 16)(lambda p, shape: self._known(f"i-1 tag+i word {p} {shape}"))

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Tagger:
        """From a mapping with the three entries of the constructor."""
        return cls(data["weights"], data["tagdict"], data["classes"])

    def tag(self, tokens: Sequence[str]) -> list[str]:
        """One Penn Treebank tag per token."""
        words = [self._word(token) for token in (*_START, *tokens, *_END)]
        previous, before = _START
        tags = []
        for place, token in enumerate(tokens):
            tag = self._tagdict.get(token) or self._guess(words, place + 2, previous, before)
            tags.append(tag)
            before, previous = previous, tag
        return tags

    def _guess(self, words: Sequence[_Word], i: int, previous: str, before: str) -> str:
        here, left, right = words[i], words[i - 1], words[i + 1]
        rows = (
            *here.own, *self._history(previous, before), *here.word, *self._after(previous, here.shape), *left.left,
            *words[i - 2].left2, *right.right, *words[i + 2].right2,
        )  # fmt: skip
        return self._classes[int(_add(self._matrix.take(rows, 0), 0).argmax())] if rows else self._classes[0]

    def _known(self, *features: str) -> tuple[int, ...]:
        """Matrix rows of those features that have weights."""
        return tuple(row for row in map(self._rows.get, features) if row is not None)

    def _word_rows(self, token: str) -> _Word:
        shape = token if token in (*_START, *_END) else _normal(token)
        end, known = shape[-3:], self._known
        return _Word(
            shape=shape,
            own=known("bias", f"i suffix {token[-3:]}", f"i pref1 {token[:1]}"),
            word=known(f"i word {shape}"),
            left=known(f"i-1 word {shape}", f"i-1 suffix {end}"),
            left2=known(f"i-2 word {shape}"),
            right=known(f"i+1 word {shape}", f"i+1 suffix {end}"),
            right2=known(f"i+2 word {shape}"),
        )


def _normal(word: str) -> str:
    """A word as the context features see it."""
    if "-" in word and not word.startswith("-"):
        return "!HYPHEN"
    if word.isdigit() and len(word) == 4:
        return "!YEAR"
    return "!DIGITS" if word[:1].isdigit() else word.lower()
