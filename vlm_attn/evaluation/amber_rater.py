"""AMBER in the tables and paired comparisons of a run (figures and source: `scorers.amber`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_attn.evaluation.parsers import NO, UNKNOWN, parse_answer
from vlm_attn.evaluation.scorers import amber
from vlm_attn.evaluation.summary import Rater, _column, _f1

__all__ = ["captions", "questions"]

Row = Mapping[str, Any]


def captions(data: str) -> Rater:
    """Generative part: CHAIR, Cover, Hal and Cog, exact words."""

    def counts(samples: Sequence[Row]) -> list[amber.AmberCount]:
        return amber.count_texts([(row["text"], row["doc"]["truth"], row["doc"]["hallu"]) for row in samples],
                                 Path(data))  # fmt: skip

    def rows(samples: Sequence[Row]) -> list[tuple[float, ...]]:
        """(hallucinated, nouns, covered, truth, any, imagined, imaginable, words, 1)"""
        return [
            (len(c.hallucinated), len(c.nouns), c.covered, c.truth, bool(c.hallucinated), c.imagined, c.imaginable,
             len(row["text"].split()), 1)
            for c, row in zip(counts(samples), samples, strict=True)
        ]  # fmt: skip

    return Rater(
        kind="amber_g",
        rows=rows,
        statistics={"chair": _column(0, 1), "cover": _column(2, 3), "hal": _column(4, 8), "cog": _column(5, 6),
                    "len_words": _column(7, 8)},
        proportions={"hal": (4, 8)},
    )  # fmt: skip


def questions() -> Rater:
    """Discriminative part, "no" as the positive class; an answer that is neither yes nor no is wrong."""

    def read(samples: Sequence[Row]) -> list[tuple[str, str]]:
        return [(parse_answer(row["text"], "ours"), row["doc"]["label"]) for row in samples]

    def rows(samples: Sequence[Row]) -> list[tuple[float, ...]]:
        """(right no, answered no, truly no, right, unknown, 1)"""
        return [(p == label == NO, p == NO, label == NO, p == label, p == UNKNOWN, 1) for p, label in read(samples)]

    return Rater(
        kind="amber_d",
        rows=rows,
        statistics={"accuracy": _column(3, 5), "precision": _column(0, 1), "recall": _column(0, 2),
                    "f1": _f1(0, 1, 2), "unknown_rate": _column(4, 5)},
        proportions={"accuracy": (3, 5), "unknown_rate": (4, 5)},
        verdicts=lambda samples: [p == label for p, label in read(samples)],
    )  # fmt: skip
