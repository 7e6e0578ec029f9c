"""HallusionBench and MMHal-Bench in the tables and paired comparisons of a run: the figures that need no judge.

Figures and sources: `scorers.hallusionbench`, `scorers.mmhal`.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from vlm_attn.evaluation.scorers import hallusionbench as hb
from vlm_attn.evaluation.summary import Rater, _column

__all__ = ["hallusion", "mmhal"]

Row = Mapping[str, Any]


def hallusion() -> Rater:
    """aAcc, fAcc and qAcc of the questions with a figure; ``..._all`` count those without one too."""

    def verdicts(samples: Sequence[Row]) -> list[bool]:
        return [hb.is_right(row["doc"], hb.judge_free(row["doc"], row["text"])) for row in samples]

    def rows(samples: Sequence[Row]) -> list[tuple[float, ...]]:
        """(right, 1) of a_acc, f_acc, q_acc, a_acc_all, q_acc_all; a group's pair sits on its last sample."""
        docs, right = [row["doc"] for row in samples], verdicts(samples)
        seen = [bool(doc["image"]) for doc in docs]
        every = [True] * len(docs)
        columns = [
            _groups(list(range(len(docs))), right, seen),
            _groups([hb.group_key(doc, "figure_id") for doc in docs], right, seen),
            _groups([hb.group_key(doc, "question_id") for doc in docs], right, seen),
            _groups(list(range(len(docs))), right, every),
            _groups([hb.group_key(doc, "question_id") for doc in docs], right, every),
        ]
        return [tuple(value for pair in pairs for value in pair) for pairs in zip(*columns, strict=True)]

    return Rater(
        kind="hallusion",
        rows=rows,
        statistics={"a_acc": _column(0, 1), "f_acc": _column(2, 3), "q_acc": _column(4, 5),
                    "a_acc_all": _column(6, 7), "q_acc_all": _column(8, 9)},
        proportions={},
        verdicts=verdicts,
        details=lambda samples: {"parser": hb.READINGS[0]},
        cluster=lambda row: "/".join(str(row["doc"][name]) for name in hb.KEY[:3]),
    )  # fmt: skip


def _groups(keys: Sequence[Hashable], right: Sequence[bool], counted: Sequence[bool]) -> list[tuple[float, float]]:
    """(all counted members right, 1) on the last counted member of each group, (0, 0) elsewhere."""
    out = [(0.0, 0.0)] * len(keys)
    groups: dict[Hashable, list[int]] = {}
    for place, key in enumerate(keys):
        if counted[place]:
            groups.setdefault(key, []).append(place)
    for places in groups.values():
        out[places[-1]] = (float(all(right[place] for place in places)), 1.0)
    return out


def mmhal() -> Rater:
    """How long answers are and how many are empty; ratings need a judge."""
    return Rater(
        kind="mmhal",
        rows=lambda samples: [(len(row["text"].split()), not row["text"].strip(), 1) for row in samples],
        statistics={"len_words": _column(0, 2), "empty_rate": _column(1, 2)},
        proportions={"empty_rate": (1, 2)},
    )
