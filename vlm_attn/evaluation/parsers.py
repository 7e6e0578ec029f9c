"""Yes/no answer parsers and the POPE metrics.

Published POPE figures differ mostly because the answers were read differently. Every parser in use has a name here;
a report prints that name next to the figure. All of them are pure functions of the answer text (``vcd`` also looks at
the label, as its authors do).

| name | from | rule in one line |
|---|---|---|
| ``pope`` | official script, our default | text before ".", no commas; a word ``No``/``not``/``no`` = no, else yes |
| ``opera`` | OPERA, PAI | whole text without "." and ","; ``No``/``not``/``no``/``NO``/``...n't`` = no, else yes |
| ``vcd`` | VCD and followers | label-dependent substring test on the lower-cased text |
| ``strict`` | lmms-eval | exactly "yes" or "no" after lower-casing and stripping, else unknown |
| ``vlmevalkit`` | VLMEvalKit | punctuation removed; "yes" among the words and "no" not, or the reverse, else unknown |
| ``ours`` | diagnostic | first whole word yes/no among the first 20 words, else unknown |
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from vlm_attn.evaluation.matching import unknown_name
from vlm_attn.evaluation.rates import f1_score, ratio, retrieval

__all__ = ["PARSERS", "Parser", "PopeScore", "f1_score", "parse_answer", "pope_metrics", "ratio"]

YES, NO, UNKNOWN = "yes", "no", "unknown"

_VQA_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"(\d)(,)(\d)")
_PERIOD = re.compile(r"\.(?!\d)")
_WHOLE_WORD = re.compile(r"\b(yes|no)\b", re.IGNORECASE)


def _pope(text: str, label: str) -> str:
    words = text.split(".", 1)[0].replace(",", "").split(" ")  # single spaces on purpose, as the official script does
    return NO if any(word in ("No", "not", "no") for word in words) else YES


def _opera(text: str, label: str) -> str:
    words = text.replace(".", "").replace(",", "").split(" ")
    return NO if any(word in ("No", "not", "no", "NO") or word.endswith("n't") for word in words) else YES


def _vcd(text: str, label: str) -> str:
    right = label in text.strip().lower()  # substring: "know" holds "no"
    return label if right else (NO if label == YES else YES)


def _strict(text: str, label: str) -> str:
    answer = text.lower().strip()
    return answer if answer in (YES, NO) else UNKNOWN


def _vlmevalkit(text: str, label: str) -> str:
    text = text.lower()
    out = text
    marks = [mark for mark in _VQA_PUNCTUATION if mark in text]
    number = bool(marks) and _COMMA_IN_NUMBER.search(text) is not None
    for mark in marks:
        joined = mark + " " in text or " " + mark in text or number
        out = out.replace(mark, "" if joined else " ")
    words = _PERIOD.sub("", out).split()
    if (YES in words) == (NO in words):
        return UNKNOWN
    return YES if YES in words else NO


def _ours(text: str, label: str) -> str:
    found = _WHOLE_WORD.search(" ".join(text.split()[:20]))
    return found.group(1).lower() if found else UNKNOWN


@dataclass(frozen=True)
class Parser:
    """A named reading rule.

    ``read(text, label)`` gives "yes", "no" or "unknown". ``unknown`` says what an unreadable answer does to precision
    and recall: "negative" (counts as a no, as VLMEvalKit's 0) or "ignored" (left out, as in lmms-eval). For accuracy
    an unreadable answer is always wrong.
    """

    name: str
    read: Callable[[str, str], str]
    unknown: Literal["negative", "ignored"] = "negative"


PARSERS: dict[str, Parser] = {
    p.name: p
    for p in (
        Parser("pope", _pope),
        Parser("opera", _opera),
        Parser("vcd", _vcd),
        Parser("strict", _strict, unknown="ignored"),
        Parser("vlmevalkit", _vlmevalkit),
        Parser("ours", _ours),
    )
}


def get_parser(name: str) -> Parser:
    """The parser of that name; an unknown name raises ``ValueError`` with the closest match."""
    if name not in PARSERS:
        raise ValueError(unknown_name("POPE parser", name, PARSERS))
    return PARSERS[name]


def check_label(label: str) -> str:
    """A ground-truth label as "yes" or "no" (case and blanks forgiven, nothing else)."""
    clean = label.strip().lower() if isinstance(label, str) else label
    if clean not in (YES, NO):
        raise ValueError(f"A POPE label must be 'yes' or 'no', got {label!r}. Fix the question file.")
    return clean


def parse_answer(text: str, parser: str = "pope", label: str | None = None) -> str:
    """Read one answer: "yes", "no" or "unknown". ``label`` is needed by the ``vcd`` parser only."""
    if not isinstance(text, str):
        raise TypeError(f"An answer must be a string, got {type(text).__name__}: {text!r:.80}")
    if parser == "vcd" and label is None:
        raise ValueError("The 'vcd' parser scores against the label: pass label='yes' or 'no'.")
    return get_parser(parser).read(text, check_label(label) if label is not None else YES)


@dataclass(frozen=True)
class PopeScore:
    """POPE metrics of one question set; positive class = yes, all rates in 0..1, zero where the denominator is zero.

    ``yes_ratio`` is the share of *predicted* yes (lmms-eval's ``pope_yes_ratio`` counts the labels instead).
    """

    parser: str
    n: int
    accuracy: float
    precision: float
    recall: float
    f1: float
    yes_ratio: float
    unknown_rate: float
    tp: int
    fp: int
    tn: int
    fn: int
    unknown: int

    def to_dict(self) -> dict[str, float | int | str]:
        return asdict(self)


def outcome(
    prediction: str, label: str, unknown: Literal["negative", "ignored"]
) -> tuple[int, int, int, int, int, int]:
    """One question as counts ``(tp, fp, tn, fn, correct, predicted_yes)``."""
    correct = int(prediction == label)
    if prediction == UNKNOWN:
        if unknown == "ignored":
            return 0, 0, 0, 0, 0, 0
        return (0, 0, 0, 1, 0, 0) if label == YES else (0, 0, 1, 0, 0, 0)
    yes = int(prediction == YES)
    if label == YES:
        return yes, 0, 0, 1 - yes, correct, yes
    return 0, yes, 1 - yes, 0, correct, yes


def repeated(ids: Sequence[Hashable]) -> Hashable | None:
    """The first id that occurs a second time, or None."""
    seen: set[Hashable] = set()
    for item in ids:
        if item in seen:
            return item
        seen.add(item)
    return None


def pope_metrics(
    answers: Sequence[str],
    labels: Sequence[str],
    parser: str = "pope",
    *,
    answer_ids: Sequence[Hashable] | None = None,
    label_ids: Sequence[Hashable] | None = None,
) -> PopeScore:
    """Score ``answers`` against ``labels`` (same order) with the named parser.

    Lengths must agree; where both id lists are given they must be equal element by element and free of duplicates
    (the official script pairs by file order and silently drops what is left over).
    """
    if len(answers) != len(labels):
        raise ValueError(
            f"{len(answers)} answers for {len(labels)} labels: the answer file is truncated or belongs "
            "to another question file."
        )
    for name, ids in (("answer", answer_ids), ("label", label_ids)):
        if ids is not None and len(ids) != len(labels):
            raise ValueError(f"{len(ids)} {name} ids for {len(labels)} labels.")
        if ids is not None and (twice := repeated(ids)) is not None:
            raise ValueError(f"Duplicate {name} id {twice!r}: score each question set on its own.")
    if answer_ids is not None and label_ids is not None:
        for place, (a, b) in enumerate(zip(answer_ids, label_ids, strict=True)):
            if a != b:
                raise ValueError(f"Id mismatch at position {place}: answer {a!r}, label {b!r}. Sort both by id.")
    for text in answers:
        if not isinstance(text, str):
            raise TypeError(f"An answer must be a string, got {type(text).__name__}: {text!r:.80}")
    return tally(Counter(zip(answers, map(check_label, labels), strict=True)), parser)


def tally(counts: Mapping[tuple[str, str], int], parser: str = "pope") -> PopeScore:
    """`pope_metrics` of answers already counted: (text, label) -> how often. Most answers of a file are equal."""
    rule = get_parser(parser)
    tp = fp = tn = fn = correct = yes = unknown = 0
    for (text, label), times in counts.items():
        prediction = rule.read(text, label)
        unknown += times * (prediction == UNKNOWN)
        row = [times * count for count in outcome(prediction, label, rule.unknown)]
        tp, fp, tn, fn = tp + row[0], fp + row[1], tn + row[2], fn + row[3]
        correct, yes = correct + row[4], yes + row[5]
    n = sum(counts.values())
    return PopeScore(
        parser=parser,
        n=n,
        accuracy=ratio(correct, n),
        **retrieval(tp, tp + fp, tp + fn),
        yes_ratio=ratio(yes, n),
        unknown_rate=ratio(unknown, n),
        tp=tp,
        fp=fp,
        tn=tn,
        fn=fn,
        unknown=unknown,
    )
