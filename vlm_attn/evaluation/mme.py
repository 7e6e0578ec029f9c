"""MME-style scoring: per category accuracy, and acc+ = share of images with both questions right.

An image carries two questions per category, one whose answer is yes and one whose answer is no. The score of a
category is ``100 * acc + 100 * acc+`` (at most 200). Source: Fu et al., "MME", arXiv:2306.13394.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from vlm_attn.evaluation.matching import unknown_name
from vlm_attn.evaluation.rates import ratio

__all__ = ["READINGS", "MmeAnswer", "mme_metrics", "mme_parse"]


READINGS = ("official", "lmms")


def mme_parse(text: str, reading: str = "official") -> str:
    """ "yes", "no" or "other".

    ``official``: lower-case; exact match, else "yes" then "no" within the first 4 characters. ``lmms`` (lmms-eval)
    strips blanks and periods first and also takes "y" and "n".
    """
    if not isinstance(text, str):
        raise TypeError(f"An answer must be a string, got {type(text).__name__}: {text!r:.80}")
    if reading not in READINGS:
        raise ValueError(unknown_name("MME reading", reading, READINGS))
    answer = text.lower()
    if reading == "lmms":
        answer = answer.strip().replace(".", "")
        answer = {"y": "yes", "n": "no"}.get(answer, answer)
    if answer in ("yes", "no"):
        return answer
    head = answer[:4]
    if "yes" in head:
        return "yes"
    return "no" if "no" in head else "other"


@dataclass(frozen=True)
class MmeAnswer:
    """One answered question: ``pair`` identifies the two questions that belong together (image and object asked)."""

    category: str
    pair: str
    label: str
    text: str
    reading: str = "official"

    @property
    def correct(self) -> bool:
        return mme_parse(self.text, self.reading) == self.label


def mme_metrics(answers: Iterable[MmeAnswer]) -> dict[str, float]:
    """``{category}_acc``, ``{category}_acc_plus``, ``{category}_score`` for each category, then ``acc``, ``acc_plus``
    over everything (rates in 0..1), ``score`` (sum over categories, at most 200 each), ``n`` and ``pairs``.

    A pair with other than two answers counts as not both right; a subset cut by a limit may hold one such pair.
    """
    groups: dict[str, dict[str, list[bool]]] = {}
    for answer in answers:
        groups.setdefault(answer.category, {}).setdefault(answer.pair, []).append(answer.correct)
    out: dict[str, float] = {}
    right = asked = both = pairs = 0
    total = 0.0
    for category in sorted(groups):
        rows = groups[category]
        c_right, c_asked = sum(sum(row) for row in rows.values()), sum(len(row) for row in rows.values())
        c_both = sum(len(row) == 2 and all(row) for row in rows.values())
        acc, plus = ratio(c_right, c_asked), ratio(c_both, len(rows))
        out |= {f"{category}_acc": acc, f"{category}_acc_plus": plus, f"{category}_score": 100 * (acc + plus)}
        right, asked, both, pairs = right + c_right, asked + c_asked, both + c_both, pairs + len(rows)
        total += 100 * (acc + plus)
    return out | {
        "acc": ratio(right, asked),
        "acc_plus": ratio(both, pairs),
        "score": total,
        "n": asked,
        "pairs": pairs,
    }
