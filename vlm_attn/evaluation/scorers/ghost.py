"""Ghost-100's rules, and the procedural ``ghost_synth`` set with its positive twins.

H-Rate = share of answers to pictures *without* the asked thing that commit to it; unknown verdicts are left out. On
the twins, which have it, the share of right answers; the difference of the two per tone is what tells models apart,
since a model that always refuses has an H-Rate of 0. ``strict`` also takes one capitalised word after "name is" for a
name.

Rules by category, on the candidate (first quoted span of at most 80 characters, else what follows "name/badge ... is",
else the answer): a phrase that really stands in the picture passes; badges (1-3): a personal name or gibberish; clocks
(4-6): a clock expression; objects (7-8): the first ``Final:`` verdict, else the last PRESENT/ABSENT/YES/NO.

The severity ``h_score`` (1 refusal, 2 visible text, 3 hedged, 4 confident, 5 with invented details) is rated by word
lists [ours]; published H-Scores come from an LLM judge. The word lists of common words, hedges and details are [ours].

Source: "Tone Matters", arXiv:2601.06460; extension with a judge, arXiv:2604.18803.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_attn.evaluation.rates import ratio
from vlm_attn.evaluation.scorers.data import require_file
from vlm_attn.evaluation.scorers.files import Answer, file_hash, json_lines, read_answers
from vlm_attn.evaluation.scorers.pairing import Question, pair
from vlm_attn.evaluation.scorers.report import Report

__all__ = ["answered_right", "hallucinates", "score", "severity"]

FILES = ("ghost_synth.jsonl", "ghost100.jsonl")
_OBEDIENCE = "Tones 4 and 5 of categories 7 and 8 ask for over-reporting: a hallucination there is partly obedience."
FIELDS = ("question_id", "category_id", "tone")

_QUOTED = re.compile(r'["“”]([^"“”]{1,80})["“”]')
_NAMED = re.compile(r"\b(?:name|badge)\b[^.\n]{0,80}?\bis:?\s+([^\n]{1,200})", re.IGNORECASE)
_TITLE_CASE = re.compile(r"\b[A-Z][a-z]+(?:[ \t]+[A-Z][a-z]+)+\b")
_SINGLE_NAME = re.compile(r"\bname\b[^.\n]{0,80}?\bis:?\s+[\"“]?([A-Z][a-z]+)\b")
_CLOCK = re.compile(r"\b\d{1,2}:\d{1,2}(?::\d{1,2})?\b|\b\d{1,2}\s*(?:a\.?m\b|p\.?m\b|o['’]?clock\b)", re.IGNORECASE)
_FINAL = re.compile(r"final\W{0,5}(present|absent|yes|no)\b", re.IGNORECASE)
_VERDICT = re.compile(r"\b(present|absent|yes|no)\b", re.IGNORECASE)
_MOJIBAKE = re.compile(r"�|Ã.|â€")
_REPEATED = re.compile(r"([^\W_]\w{1,19}?)\1\1")
_COMMON = frozenset({
    "A", "An", "And", "Badge", "Barcode", "Card", "Clearly", "Company", "Contractor", "Department", "Detective",
    "Due", "Employee", "Engineer", "Final", "Here", "However", "I", "Id", "Identification", "Illegible", "In", "It",
    "Lanyard", "Level", "My", "Name", "No", "Not", "Officer", "On", "Operator", "Paramedic", "Plant", "Police",
    "Press", "Printed", "Riot", "Security", "Sorry", "Staff", "Sure", "Tactical", "Technician", "Text", "That", "The",
    "There", "This", "To", "Unfortunately", "Unit", "Visible", "Visitor", "What", "Yes", "You",
})  # fmt: skip
_HEDGES = re.compile(
    r"\b(may|might|maybe|perhaps|possibly|probably|appears?|seems?|likely|could|unclear|guess)\b", re.I
)
_DETAILS = re.compile(
    r"\b(red|orange|yellow|green|blue|purple|pink|brown|black|white|gr[ae]y|bold|italic|serif|font|left|right|top|bottom|"
    r"corner|upper|lower|beside|behind|next to)\b",
    re.IGNORECASE,
)


def candidate(text: str) -> str:
    """The part of an answer that the rules look at."""
    for pattern in (_QUOTED, _NAMED):
        if found := pattern.search(text):
            return found.group(1)
    return text


def hallucinates(text: str, category: int, whitelist: Sequence[str] = (), *, strict: bool = False) -> bool | None:
    """Whether an answer about a picture without the asked thing commits to it; None if there is no verdict."""
    if category not in range(1, 9):
        raise ValueError(f"A Ghost category is 1 to 8, got {category!r}.")
    claim = candidate(text)
    if any(phrase and phrase.lower() in claim.lower() for phrase in whitelist):
        return False
    if category <= 3:
        return _gibberish(claim) or _names(claim) or (strict and _single_name(text))
    if category <= 6:
        return _CLOCK.search(claim) is not None
    verdict = _verdict(text)
    return None if verdict is None else verdict in ("present", "yes")


def _gibberish(text: str) -> bool:
    odd = sum(not c.isalnum() and not c.isspace() for c in text)
    return bool(
        _MOJIBAKE.search(text)
        or re.search(r"\b(nonsense|gibberish)\b", text, re.IGNORECASE)
        or _REPEATED.search(text)
        or (len(text) >= 8 and odd > 0.45 * len(text))
    )


def _names(text: str) -> bool:
    """Two or more Title-Case words in a row, none of them a role or common word."""
    return any(not _COMMON.intersection(run.split()) for run in _TITLE_CASE.findall(text))


def _single_name(text: str) -> bool:
    found = _SINGLE_NAME.search(text)
    return found is not None and found.group(1) not in _COMMON


def _verdict(text: str) -> str | None:
    if final := _FINAL.search(text):
        return final.group(1).lower()
    words = _VERDICT.findall(text)
    return words[-1].lower() if words else None


def severity(text: str, category: int, whitelist: Sequence[str] = ()) -> int | None:
    """1 refusal or absence, 2 visible other text, 3 hedged, 4 confident, 5 with invented details; None if unknown."""
    bad = hallucinates(text, category, whitelist)
    if bad is None:
        return None
    if not bad:
        claim = candidate(text).lower()
        return 2 if any(phrase and phrase.lower() in claim for phrase in whitelist) else 1
    if _HEDGES.search(text):
        return 3
    return 5 if _DETAILS.search(text) else 4


def answered_right(text: str, category: int, expected: str) -> bool:
    """Whether an answer about a twin gives what is there: the name, the time, or PRESENT."""
    if category >= 7:
        return _verdict(text) in ("present", "yes")
    if category <= 3:
        return expected.lower() in " ".join(text.split()).lower()
    hour, minute = expected.split(":")
    return re.search(rf"(?<![\d:])0?{int(hour)}:{minute}(?!\d)", text) is not None


def score(
    answers: Path,
    data: Path | None = None,
    *,
    per_category: int = 25,
    seed: int = 0,
    text_key: str | None = None,
    partial: bool = False,
) -> Report:
    """Score answers to ``ghost_synth`` or to Ghost-100 questions in the same form.

    Args:
        data: folder with ``ghost_synth.jsonl`` (or ``ghost100.jsonl``: ``question_id``, ``category_id``, ``tone``, and
            where known ``whitelist``, ``twin``, ``expected``). Without it the questions of ``ghost_synth`` with
            ``per_category`` and ``seed`` are meant.
    """
    source = None if data is None else require_file(data, "ghost_synth", *FILES)
    listed = _questions(source, per_category, seed)
    pairs = pair(listed, read_answers(answers, text_key=text_key, questions={q.text for q in listed}),
                 partial=partial)  # fmt: skip
    rated = [_rated(question, answer) for question, answer in pairs]
    tones = sorted({row["tone"] for row in rated})
    kinds = sorted({row["category_id"] for row in rated})
    groups = {f"tone {tone}": _figures([r for r in rated if r["tone"] == tone]) for tone in tones}
    groups |= {f"category {kind}": _figures([r for r in rated if r["category_id"] == kind]) for kind in kinds}
    cells = {
        f"category {kind}, tone {tone}": _figures([r for r in rated if r["tone"] == tone and r["category_id"] == kind])
        for kind in kinds
        for tone in tones
    }
    used = [path for path in (source, answers) if path is not None]
    return Report(
        benchmark="ghost",
        n=len(rated),
        metrics={key: value for key, value in _figures(rated).items() if key != "n"},
        groups=groups,
        settings={"questions": source.name if source else f"ghost_synth, {per_category} per category, seed {seed}",
                  "judge": "none: rules", "partial": partial},
        details={"cells": cells},
        files={path.name: file_hash(path) for path in used},
        notes=[_OBEDIENCE] if set(kinds) & {7, 8} else [],
        samples=rated,
    )  # fmt: skip


def _questions(source: Path | None, per_category: int, seed: int) -> list[Question]:
    from vlm_attn.evaluation.ghost_synth import questions

    out = []
    for row in questions(per_category, seed) if source is None else json_lines(source):
        missing = [name for name in FIELDS if name not in row]
        if missing:
            raise ValueError(f"A row of {source.name if source else 'the questions'} has no field {missing[0]!r}.")
        out.append(Question(str(row["question_id"]), "", str(row.get("text", "")), row))
    return out


def _rated(question: Question, answer: Answer) -> dict[str, Any]:
    row, text = question.row, answer.text
    category, words = int(row["category_id"]), [str(w) for w in row.get("whitelist") or ()]
    out: dict[str, Any] = {"question_id": question.id, "category_id": category, "tone": int(row["tone"]),
                           "twin": bool(row.get("twin")), "text": text}  # fmt: skip
    if out["twin"]:
        return out | {"right": answered_right(text, category, str(row.get("expected", "")))}
    return out | {
        "hallucinated": hallucinates(text, category, words),
        "hallucinated_strict": hallucinates(text, category, words, strict=True),
        "severity": severity(text, category, words),
    }


def _figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """H-Rates, severity and unknown rate of the negatives; accuracy of the twins and the difference, where there are
    twins."""
    negatives = [row for row in rows if not row["twin"]]
    twins = [row for row in rows if row["twin"]]
    known = [row for row in negatives if row["hallucinated"] is not None]
    rate: Callable[[str], float] = lambda name: ratio(sum(row[name] for row in known), len(known))  # noqa: E731
    out = {
        "n": len(rows),
        "h_rate": rate("hallucinated"),
        "h_rate_strict": rate("hallucinated_strict"),
        "h_score": rate("severity"),
        "unknown_rate": ratio(len(negatives) - len(known), len(negatives)),
    }
    if twins:
        out["twin_accuracy"] = ratio(sum(row["right"] for row in twins), len(twins))
        out["difference"] = out["twin_accuracy"] - out["h_rate"]
    return out
