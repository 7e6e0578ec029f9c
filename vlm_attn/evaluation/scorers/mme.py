"""MME: the hallucination subset (existence, count, position, color) and the whole benchmark (14 categories).

Layouts: the evaluation tool's folder with one tab-separated file per category (image, question, truth, answer), JSON
rows with ``category``, or LLaVA's rows whose ``question_id`` is ``category/image``. The two questions of an image
share its id, so rows are joined by category, image and question.

Source: Fu et al., "MME: A Comprehensive Evaluation Benchmark", arXiv:2306.13394; metrics in `vlm_attn.evaluation.mme`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_attn.evaluation.matching import unknown_name
from vlm_attn.evaluation.mme import READINGS, MmeAnswer, mme_metrics, mme_parse
from vlm_attn.evaluation.parsers import check_label
from vlm_attn.evaluation.scorers.files import Answer, clean_question, file_hash, file_stem, json_lines, read_answers
from vlm_attn.evaluation.scorers.pairing import QUESTION_FIELDS, Question, image_of, pair
from vlm_attn.evaluation.scorers.report import Report

__all__ = ["COGNITION", "HALLUCINATION", "PERCEPTION", "read_questions", "score", "totals"]

OBJECT_LEVEL, ATTRIBUTE_LEVEL = ("existence", "count"), ("position", "color")
HALLUCINATION = (*OBJECT_LEVEL, *ATTRIBUTE_LEVEL)
PERCEPTION = (*HALLUCINATION, "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
TOTALS = {
    "object_level": OBJECT_LEVEL,
    "attribute_level": ATTRIBUTE_LEVEL,
    "hallucination": HALLUCINATION,
    "perception": PERCEPTION,
    "cognition": COGNITION,
}
_SUFFIX = re.compile(
    r"(?:\s*(?:please answer yes or no|answer the question using a single word or phrase)\.?)+\s*$", re.IGNORECASE
)


def totals(scores: Mapping[str, float]) -> dict[str, float]:
    """Sums of category scores, for each group all of whose categories are there."""
    return {name: sum(scores[c] for c in group) for name, group in TOTALS.items() if set(group) <= scores.keys()}


def score(
    answers: Path,
    data: Path | None = None,
    *,
    reading: str = "official",
    text_key: str | None = None,
    partial: bool = False,
) -> Report:
    """Score an answer file or a tool folder.

    Args:
        data: folder (or file) with the questions as JSON lines ``category, image, question, answer``. Rows may carry
            the truth themselves, as those of a tool folder do: categories without questions are scored by that.
        reading: ``official`` or ``lmms`` (see `mme.mme_parse`).
        partial: accept a part of a category's questions.
    """
    if reading not in READINGS:
        raise ValueError(unknown_name("MME reading", reading, READINGS))
    questions, sources = read_questions(data)
    rows = _tool_rows(answers) if answers.is_dir() else read_answers(answers, text_key=text_key)
    named = [_with_category(row) for row in rows]
    present = {row.fields["category"] for row in named}
    asked = [q for q in questions if q.row["category"] in present]
    known = {q.row["category"] for q in asked}
    if present - known:
        asked += _own_truth([row for row in named if row.fields["category"] not in known])
    pairs = pair(asked, named, keys=[("id", _question_key, _answer_key)], partial=partial)
    _check_pairs(asked)
    listed = [MmeAnswer(q.row["category"], q.image, q.row["label"], a.text, reading) for q, a in pairs]
    figures = mme_metrics(listed)
    categories = [c for c in (*PERCEPTION, *COGNITION) if c in present] + sorted(present - {*PERCEPTION, *COGNITION})
    counts = Counter(q.row["category"] for q, _ in pairs)
    groups = {
        c: {"n": counts[c], **{key: figures[f"{c}_{key}"] for key in ("acc", "acc_plus", "score")}} for c in categories
    }
    missing = [c for c in HALLUCINATION if c not in present]
    files = [*sources, *(sorted(answers.glob("*.txt")) if answers.is_dir() else [answers])]
    return Report(
        benchmark="mme",
        n=len(pairs),
        metrics={
            **{key: figures[key] for key in ("acc", "acc_plus", "score")},
            **totals({c: row["score"] for c, row in groups.items()}),
        },
        groups=groups,
        settings={"reading": reading, "partial": partial},
        details={"other_answers": sum(mme_parse(row.text, reading) == "other" for row in rows)},
        files={path.name: file_hash(path) for path in files},
        notes=[f"Not in the answers, so not scored: {', '.join(missing)}."] if missing else [],
        samples=[
            {"category": q.row["category"], "image": q.image, "question": q.text, "label": q.row["label"],
             "prediction": mme_parse(a.text, reading), "text": a.text}
            for q, a in pairs
        ],
    )  # fmt: skip


def read_questions(data: Path | None) -> tuple[list[Question], list[Path]]:
    """All questions of the data folder."""
    if data is None:
        return [], []
    if not data.exists():
        raise FileNotFoundError(f"The data folder {data} does not exist.")
    paths = [data] if data.is_file() else sorted({*data.glob("mme*.json*"), *(data / "mme").glob("mme*.json*")})
    out = []
    for path in paths:
        for row in json_lines(path):
            try:
                out.append(_question(row["category"], row["image"], row["question"], row["answer"]))
            except KeyError as error:
                raise ValueError(f"{path.name} is no MME question file: a row has no field {error}.") from None
    return out, paths


def _question(category: Any, image: Any, text: Any, label: Any) -> Question:
    row = {"category": str(category), "label": check_label(label)}
    return Question(f"{category}/{image}", str(image), _SUFFIX.sub("", str(text)), row)


def _tool_rows(folder: Path) -> list[Answer]:
    """The lines of every ``{category}.txt``: image, question, truth, answer, separated by tabs."""
    paths = sorted(folder.glob("*.txt"))
    if not paths:
        raise ValueError(f"{folder} holds no {{category}}.txt files of the MME tool.")
    rows = []
    for path in paths:
        for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
            if not line.strip():
                continue
            cells = line.removesuffix("\r").split("\t", 3)
            if len(cells) < 4:
                raise ValueError(
                    f"{path.name}, line {number} has {len(cells)} of the 4 columns image, question, truth, answer: "
                    "the file is cut off, or an answer holds a line break."
                )
            image, question, truth, text = cells
            fields = {"category": path.stem, "image": image, "question": question, "label": truth}
            rows.append(Answer(text, fields, f"{path.name}, line {number}"))
    if not rows:
        raise ValueError(f"The files in {folder} are empty: there are no answers.")
    return rows


def _with_category(row: Answer) -> Answer:
    """A row with ``category`` and ``image``, which LLaVA writes as question_id "category/image"."""
    category, image = row.get("category"), image_of(row)
    parts = str(row.get("question_id", "id") or "").replace("\\", "/").split("/")
    if len(parts) > 1:
        category, image = category or parts[0], image or parts[-1]
    if category is None or image is None:
        raise ValueError(f"{row.place} names no category and image, by field or as question_id category/image.")
    return Answer(row.text, {**row.fields, "category": str(category), "image": str(image)}, row.place)


def _wording(text: str) -> str:
    """A question without the suffix that asks for a short answer."""
    return _SUFFIX.sub("", clean_question(text)).lower()


def _question_key(question: Question) -> tuple[str, str, str]:
    return question.row["category"], file_stem(question.image), _wording(question.text)


def _answer_key(row: Answer) -> tuple[str, str, str]:
    asked = row.get(*QUESTION_FIELDS)
    if not isinstance(asked, str):
        raise ValueError(f"{row.place} has no question or prompt: the two questions of an image cannot be told apart.")
    return row.fields["category"], file_stem(row.fields["image"]), _wording(asked)


def _own_truth(rows: Sequence[Answer]) -> list[Question]:
    """Questions with the truth that the rows carry themselves (tool folders)."""
    out = []
    for row in rows:
        label = row.get("label", "gt_answer", "gt")
        if label is None:
            raise ValueError(
                f"{row.place}: there is no question file for the category {row.fields['category']!r} in the data, and "
                "the row carries no truth."
            )
        asked = row.get(*QUESTION_FIELDS)
        out.append(_question(row.fields["category"], row.fields["image"], asked, label))
    return out


def _check_pairs(questions: Sequence[Question]) -> None:
    """Every image of a category has two questions; acc+ means nothing otherwise."""
    counts = Counter((q.row["category"], file_stem(q.image)) for q in questions)
    odd = [f"{category}/{image}" for (category, image), n in counts.items() if n != 2]
    if odd:
        raise ValueError(f"{len(odd)} images have other than two questions ({', '.join(odd[:5])}): a file is cut off.")
