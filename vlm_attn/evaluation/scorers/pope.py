"""POPE from an answer file: which question file it answers, one score per split, plain means over splits.

Sources ``coco`` (also the older 2,910-question random split), ``aokvqa``, ``gqa``; splits ``random``, ``popular``,
``adversarial``. Source and split are found from what the rows say about image and question, from LLaVA's merged ids,
or from a ``category`` field; where the answers do not tell, they must be named.

Source: Li et al., arXiv:2305.10355; parsers and metrics in `vlm_attn.evaluation.parsers`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from vlm_attn.evaluation import parsers
from vlm_attn.evaluation.matching import unknown_name
from vlm_attn.evaluation.scorers.files import Answer, clean_question, file_hash, image_number, json_lines, read_answers
from vlm_attn.evaluation.scorers.pairing import Question, pair
from vlm_attn.evaluation.scorers.report import Report
from vlm_attn.evaluation.summary import POPE_PROPORTIONS, POPE_STATISTICS, intervals

__all__ = ["SOURCES", "SPLITS", "conversations", "pope_questions", "score"]

SOURCES = ("coco", "aokvqa", "gqa")
SPLITS = ("random", "popular", "adversarial")
_FILE = re.compile(r"(coco|aokvqa|gqa)_pope_(random|popular|adversarial)(_legacy\w*)?\.jsonl?")
_OFFSETS = (("popular", 20_000_000), ("random", 10_000_000), ("adversarial", 0))  # of LLaVA's merged question ids


def pope_questions(path: Path) -> list[Question]:
    """The questions of one POPE file; ``row["label"]`` is "yes" or "no"."""
    questions = []
    for row in json_lines(path):
        try:
            label = parsers.check_label(row["label"])
            questions.append(Question(str(row["question_id"]), str(row["image"]), str(row["text"]), {"label": label}))
        except KeyError as error:
            raise ValueError(f"{path.name} is no POPE question file: a row has no field {error}.") from None
    return questions


def conversations(questions: Sequence[Question]) -> list[list[Question]]:
    """Multi-turn POPE: the questions of each image, which are asked in one conversation with the image shown once."""
    return [list(group) for _, group in groupby(questions, key=lambda q: q.image)]


def score(
    answers: Path,
    data: Path,
    *,
    parser: str = "pope",
    source: str | None = None,
    split: str | None = None,
    questions: str | None = None,
    text_key: str | None = None,
    partial: bool = False,
) -> Report:
    """Score one answer file.

    Args:
        answers: the file; rows may also hold the list of answers of one conversation (multi-turn POPE).
        data: folder with ``{source}_pope_{split}.jsonl``.
        parser: reading of the headline figures (`parsers.PARSERS`); all of them are in ``details``.
        source, split: which question file, where the answers do not tell.
        questions: instead: the question file itself.
        text_key: the field that holds the answer; partial: accept answers to a part of the questions.
    """
    parsers.get_parser(parser)
    candidates = _candidates(data, source, split, questions)
    asked = {path: pope_questions(path) for path in candidates}
    known = set(map(clean_question, {q.text for listed in asked.values() for q in listed}))
    rows = read_answers(answers, text_key=text_key, questions=known, turns=True)
    groups = {name: _match(name, part, asked, partial) for name, part in _parts(rows).items()}
    scored: dict[str, dict[str, Any]] = {}
    samples: list[dict[str, Any]] = []
    for path, pairs in groups.values():
        name = path.stem.replace("_pope_", " ").replace("_", " ")
        read = parsers.get_parser(parser).read
        predictions = [read(answer.text, question.row["label"]) for question, answer in pairs]
        scored[name] = _scored(pairs, predictions, parser)
        samples += [_sample(name, *pair, p) for pair, p in zip(pairs, predictions, strict=True)]
    names = next(iter(scored.values()))["metrics"]
    return Report(
        benchmark="pope",
        n=len(samples),
        metrics={key: float(np.mean([row["metrics"][key] for row in scored.values()])) for key in names},
        groups={name: {"n": row["n"], **row["metrics"]} for name, row in scored.items()},
        settings={"parser": parser, "partial": partial, "average": "plain mean of the groups"},
        details={name: {key: row[key] for key in ("intervals", "parsers")} for name, row in scored.items()},
        files={path.name: file_hash(path) for path, _ in groups.values()} | {answers.name: file_hash(answers)},
        notes=_notes(scored),
        samples=samples,
    )


def _candidates(data: Path, source: str | None, split: str | None, questions: str | None) -> list[Path]:
    """The question files that may be meant."""
    for what, value, known in (("POPE source", source, SOURCES), ("POPE split", split, SPLITS)):
        if value is not None and value not in known:
            raise ValueError(unknown_name(what, value, known))
    if questions is not None:
        return [Path(questions)]
    if data.is_file():
        return [data]
    if not data.is_dir():
        raise FileNotFoundError(f"The data folder {data} does not exist.")
    found = []
    for path in sorted({*data.glob("*.json*"), *(data / "pope").glob("*.json*")}):
        match = _FILE.fullmatch(path.name)
        if match and source in (None, match[1]) and split in (None, match[2]):
            found.append(path)
    if not found:
        wanted = f"{source or '{source}'}_pope_{split or '{split}'}.jsonl"
        raise FileNotFoundError(f"{data} holds no POPE question file {wanted}; point --data at the folder that does.")
    return found


def _parts(rows: Sequence[Answer]) -> dict[str, list[Answer]]:
    """The answers of each split in a merged file (LLaVA's id offsets, or a ``category``), else all under ""."""
    ids = [str(row.get("question_id")) for row in rows]
    if all(i.isdecimal() and len(i) < 12 for i in ids) and max(map(int, ids)) >= 10_000_000:
        return _grouped(rows, [next((name, off) for name, off in _OFFSETS if int(i) >= off) for i in ids])
    names = [row.get("category") for row in rows]
    return _grouped(rows, [(name, 0) for name in names]) if set(names) <= set(SPLITS) else {"": list(rows)}


def _grouped(rows: Sequence[Answer], places: Sequence[tuple[str, int]]) -> dict[str, list[Answer]]:
    out: dict[str, list[Answer]] = {}
    for row, (name, offset) in zip(rows, places, strict=True):
        fields = {**row.fields, "question_id": int(row.fields["question_id"]) - offset} if offset else row.fields
        out.setdefault(name, []).append(Answer(row.text, fields, row.place))
    return out


def _match(
    name: str, rows: Sequence[Answer], asked: dict[Path, list[Question]], partial: bool
) -> tuple[Path, list[tuple[Question, Answer]]]:
    """The one question file that these answers belong to, paired."""
    fitting: dict[Path, list[tuple[Question, Answer]]] = {}
    reasons: dict[Path, ValueError] = {}
    for path, listed in asked.items():
        if name and f"_{name}" not in path.stem:
            continue
        try:
            fitting[path] = pair(listed, rows, partial=partial)
        except ValueError as error:
            reasons[path] = error
    if len(fitting) == 1:
        return next(iter(fitting.items()))
    if fitting:
        files = ", ".join(path.name for path in fitting)
        raise ValueError(f"The answers do not tell which question file they answer ({files}): name source and split.")
    if len(reasons) == 1:
        raise next(iter(reasons.values()))
    if not reasons:
        raise FileNotFoundError(f"There are answers of the split {name!r}, but its question file is not in the data.")
    # of files that do not fit, the one of equal length says most
    nearest = min(reasons, key=lambda path: (abs(len(asked[path]) - len(rows)), path.name))
    raise ValueError(f"No question file fits these {len(rows)} answers. With {nearest.name}: {reasons[nearest]}")


def _scored(pairs: Sequence[tuple[Question, Answer]], predictions: Sequence[str], parser: str) -> dict[str, Any]:
    labels = [question.row["label"] for question, _ in pairs]
    counts = Counter(zip((answer.text for _, answer in pairs), labels, strict=True))
    unknown = parsers.get_parser(parser).unknown
    rows = [(*parsers.outcome(p, label, unknown), 1) for p, label in zip(predictions, labels, strict=True)]
    clusters = [image_number(question.image) for question, _ in pairs]
    measured = intervals(rows, clusters, POPE_STATISTICS, POPE_PROPORTIONS, resamples=1000)
    readings = {name: parsers.tally(counts, name).to_dict() for name in parsers.PARSERS}
    metrics = {name: value["value"] for name, value in measured.items()}
    return {
        "n": len(pairs),
        "metrics": {**metrics, "unknown_rate": readings[parser]["unknown_rate"]},
        "intervals": measured,
        "parsers": readings,
    }


def _sample(group: str, question: Question, answer: Answer, prediction: str) -> dict[str, Any]:
    return {
        "group": group,
        "question_id": question.id,
        "image": question.image,
        "label": question.row["label"],
        "prediction": prediction,
        "text": answer.text,
    }


def _notes(scored: dict[str, dict[str, Any]]) -> list[str]:
    """The yes questions of the three current COCO splits are the same, so a greedy model has one recall."""
    recalls = {row["metrics"]["recall"] for name, row in scored.items() if name in {f"coco {s}" for s in SPLITS}}
    if len(recalls) < 2:
        return []
    return ["Recall differs between COCO splits although their yes questions are the same: answers were sampled, or "
            "something is wrong with the files."]  # fmt: skip
