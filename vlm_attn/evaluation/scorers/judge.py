"""Judges: whoever rates open answers. Scoring needs their replies, never a connection.

A judge is a function from one item to its reply text; calling a service, wording its prompt and paying for it are its
own business. Replies are kept in a file (``replies``), so that a score can be repeated and checked without the judge.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vlm_attn.evaluation.scorers.files import read_answers
from vlm_attn.evaluation.scorers.pairing import Question, pair

__all__ = ["Judge", "JudgeItem", "read_rating", "read_replies", "read_verdict"]


@dataclass(frozen=True)
class JudgeItem:
    """One answer to rate: the question with its reference answer and the facts about its image (``facts``)."""

    id: str
    question: str
    reference: str
    answer: str
    facts: tuple[str, ...] = ()


Judge = Callable[[JudgeItem], str]
"""Gives the reply text; it must hold what `read_rating` or `read_verdict` looks for."""


def read_rating(reply: str) -> int:
    """The one ``rating: k`` (0 to 6) in a judge's reply; 0 where there is none, or more than one."""
    found = [k for k in range(7) if f"rating: {k}" in reply.lower()]
    return found[0] if len(found) == 1 else 0


_VERDICTS = {"0": "wrong", "1": "right", "2": "unsure", "incorrect": "wrong", "wrong": "wrong", "correct": "right",
             "right": "right", "unclear": "unsure", "unsure": "unsure"}  # fmt: skip
_VERDICT = re.compile(r"\b(incorrect|wrong|correct|right|unclear|unsure|[012])\b")


def read_verdict(reply: str) -> str:
    """The first of right (1), wrong (0), unsure (2) in a reply; a reply with none raises ``ValueError``."""
    found = _VERDICT.search(reply.lower())
    if found is None:
        raise ValueError(f"A judge's reply holds no verdict (0 wrong, 1 right, 2 unsure): {reply[:80]!r}")
    return _VERDICTS[found.group(1)]


def read_replies(path: Path, questions: Sequence[Question]) -> list[str]:
    """Stored replies in the order of the questions, by ``id`` or by order."""
    return [reply.text for _, reply in pair(questions, read_answers(path))]
