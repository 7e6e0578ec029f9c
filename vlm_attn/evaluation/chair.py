"""CHAIR: which objects does a caption name, and how many of them are not in the picture?

The pipeline is ``tokenise -> normalise every token -> join double words -> clean up -> keep table entries``, and each
of these steps is a field of ``ObjectWords``, so that COCO with its two published normalisers and a generated world
with a plain synonym table share everything below. A caption becomes a ``CaptionCount``; metrics are sums over those,
which is also what bootstrapping over images needs.

CHAIR without recall and length is meaningless (shorter captions hallucinate less), therefore one function returns all.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field
from functools import cached_property

from vlm_attn.evaluation.rates import ratio, retrieval

__all__ = ["CaptionCount", "ChairScore", "ObjectWords", "Reading", "chair_metrics", "count_caption", "word_tokens"]

_WORD = re.compile(r"[^\W_]+(?:[-'][^\W_]+)*|[^\w\s]")


def word_tokens(text: str) -> list[str]:
    """Words (hyphens and apostrophes inside a word kept) and single punctuation marks, lower-cased."""
    return _WORD.findall(text.lower())


def _same(tokens: list[str]) -> list[str]:
    return tokens


@dataclass(frozen=True)
class ObjectWords:
    """How a caption becomes a list of node words.

    - ``nodes``: surface form (after normalisation and joining) -> node word, e.g. ``{"puppy": "dog"}``.
    - ``double_words``: "first second" -> what both together become; tried left to right.
    - ``tokenise``: lower-cases and splits; ``normalise``: the whole token list at once (a tagger needs context).
    - ``cleanup``: after joining, e.g. drop "seat" beside "toilet".
    - ``name``: the variant's name, printed with every figure.
    """

    nodes: Mapping[str, str]
    double_words: Mapping[str, str] = field(default_factory=dict)
    tokenise: Callable[[str], list[str]] = word_tokens
    normalise: Callable[[list[str]], list[str]] = _same
    cleanup: Callable[[list[str]], list[str]] = _same
    name: str = "table"

    @classmethod
    def from_kinds(cls, kinds: Mapping[str, Sequence[str]], *, name: str = "table") -> ObjectWords:
        """A table from ``{node word: [surface forms]}``; forms of two words become double words."""
        nodes: dict[str, str] = {}
        double: dict[str, str] = {}
        for node, forms in kinds.items():
            for form in (node, *forms):
                if nodes.get(form, node) != node:
                    raise ValueError(
                        f"{form!r} is a form of both {nodes[form]!r} and {node!r}; a form has one meaning."
                    )
                if len(form.split()) > 2:
                    raise ValueError(f"Object form {form!r} has more than two words; only pairs are joined.")
                nodes[form] = node
                if " " in form:
                    double[form] = form
        return cls(nodes=nodes, double_words=double, name=name)

    @cached_property
    def _first_words(self) -> frozenset[str]:
        return frozenset(pair.split(" ", 1)[0] for pair in self.double_words)

    def join(self, words: Sequence[str]) -> list[str]:
        """The tokens with double words joined, left to right."""
        first, last = self._first_words, len(words) - 1
        out: list[str] = []
        place = 0
        while place < len(words):
            word = words[place]
            joined = self.double_words.get(f"{word} {words[place + 1]}") if word in first and place < last else None
            out.append(word if joined is None else joined)
            place += 1 if joined is None else 2
        return out

    def tokens(self, caption: str) -> list[str]:
        """Tokens after normalisation and joining of double words (the list that ``len_tokens`` counts)."""
        return self.join(self.normalise(self.tokenise(caption)))

    def pick(self, tokens: list[str]) -> list[str]:
        """Node words among joined tokens in order, repeats kept."""
        return [self.nodes[word] for word in self.cleanup(tokens) if word in self.nodes]

    def mentions(self, caption: str) -> list[str]:
        """Node words of the caption in order, repeats kept."""
        return self.pick(self.tokens(caption))

    def read(self, caption: str) -> Reading:
        """The caption's node words and lengths, before any picture is looked at."""
        if not isinstance(caption, str):
            raise TypeError(f"A caption must be a string, got {type(caption).__name__}: {caption!r:.80}")
        tokens = self.tokens(caption)
        return Reading(tuple(self.pick(tokens)), len(caption.split()), len(tokens))


@dataclass(frozen=True)
class Reading:
    """What a caption says: node words in order with repeats, whitespace words, tokens after joining."""

    mentions: tuple[str, ...]
    len_words: int
    len_tokens: int

    def against(self, present: Set[str]) -> CaptionCount:
        """Compared with the node words present in the picture."""
        distinct = set(self.mentions)
        return CaptionCount(
            mentions=self.mentions,
            hallucinated=tuple(word for word in self.mentions if word not in present),
            n_found=len(distinct & present),
            n_distinct=len(distinct),
            n_truth=len(present),
            len_words=self.len_words,
            len_tokens=self.len_tokens,
        )


@dataclass(frozen=True)
class CaptionCount:
    """What one caption adds to the sums, and the words themselves for reports."""

    mentions: tuple[str, ...]
    hallucinated: tuple[str, ...]
    n_found: int
    n_distinct: int
    n_truth: int
    len_words: int
    len_tokens: int

    def row(self) -> tuple[int, ...]:
        """``(any hallucination, hallucinated mentions, mentions, found, distinct, truth, words, tokens)``."""
        return (
            int(bool(self.hallucinated)),
            len(self.hallucinated),
            len(self.mentions),
            self.n_found,
            self.n_distinct,
            self.n_truth,
            self.len_words,
            self.len_tokens,
        )


def count_caption(caption: str, truth: Iterable[str], words: ObjectWords) -> CaptionCount:
    """Compare one caption with the node words present in its picture."""
    return words.read(caption).against({words.nodes.get(item, item) for item in truth})


@dataclass(frozen=True)
class ChairScore:
    """CHAIR of a caption set; rates in 0..1, lengths per caption. ``variant`` names the word pipeline."""

    variant: str
    n: int
    chair_s: float
    chair_i: float
    recall: float
    precision: float
    f1: float
    len_words: float
    len_tokens: float
    mentions: int
    hallucinated_mentions: int

    def to_dict(self) -> dict[str, float | int | str]:
        return asdict(self)


def chair_metrics(counts: Sequence[CaptionCount], variant: str = "table") -> ChairScore:
    """CHAIRs (captions with a hallucination), CHAIRi (hallucinated mentions), recall, precision and F1 over distinct
    objects (all micro-averaged), mean lengths. Zero denominators give 0."""
    sums = [sum(column) for column in zip(*(count.row() for count in counts), strict=True)] if counts else [0] * 8
    any_bad, bad, mentions, found, distinct, truth, n_words, n_tokens = sums
    n = len(counts)
    return ChairScore(
        variant=variant,
        n=n,
        chair_s=ratio(any_bad, n),
        chair_i=ratio(bad, mentions),
        **retrieval(found, distinct, truth),
        len_words=ratio(n_words, n),
        len_tokens=ratio(n_tokens, n),
        mentions=mentions,
        hallucinated_mentions=bad,
    )
