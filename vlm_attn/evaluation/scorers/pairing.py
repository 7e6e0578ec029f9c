"""Answers to their questions: by id, else by image and question, else by order - and never silently wrong.

Official scripts zip two files and drop what is left over. Here lengths must agree, ids must be unique and equal on
both sides, and whatever else a row says about its image or question must agree with the question it is paired with.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from vlm_attn.evaluation.parsers import check_label, repeated
from vlm_attn.evaluation.scorers.files import Answer, Row, clean_question, image_number

__all__ = ["ID_FIELDS", "Question", "image_of", "pair"]

ID_FIELDS = ("question_id", "id")
IMAGE_FIELDS = ("image", "image_id", "image_source", "image_file", "image_name", "file_name", "image_path", "img_id")
QUESTION_FIELDS = ("question", "prompt", "query", "instruction")


@dataclass(frozen=True, slots=True)
class Question:
    """One question of a benchmark file; ``row`` holds its other facts."""

    id: str
    image: str
    text: str
    row: Row = field(default_factory=dict)


Key = tuple[str, Callable[[Question], Hashable], Callable[[Answer], Hashable | None]]


def _id_of(answer: Answer) -> str | None:
    value = answer.get(*ID_FIELDS)
    return None if value is None else str(value)


def image_of(answer: Answer) -> str | int | None:
    """The image that a row names (a log may keep the picture itself under the same key)."""
    fields = answer.fields
    for name in IMAGE_FIELDS:
        if name in fields and isinstance(fields[name], str | int):
            return fields[name]
    return None


def _asked(answer: Answer) -> str | None:
    value = answer.get(*QUESTION_FIELDS)
    return clean_question(value) if isinstance(value, str) else None


def _image_and_text(answer: Answer) -> Hashable | None:
    image, text = image_of(answer), _asked(answer)
    return None if image is None or text is None else (image_number(image), text)


BY_ID: Key = ("id", lambda q: q.id, _id_of)
BY_IMAGE_AND_TEXT: Key = (
    "image and question",
    lambda q: (image_number(q.image), clean_question(q.text)),
    _image_and_text,
)


def pair(
    questions: Sequence[Question],
    answers: Sequence[Answer],
    *,
    keys: Iterable[Key] = (BY_ID, BY_IMAGE_AND_TEXT),
    partial: bool = False,
) -> list[tuple[Question, Answer]]:
    """Each question with its answer, in the order of the questions.

    Args:
        keys: ways to identify a question, tried in order; one is taken if every answer has it and no two questions
            share it. Without any, the order of the files counts and the lengths must agree.
        partial: answers to a part of the questions are accepted (never the reverse).

    Raises:
        ValueError: duplicate, missing or unknown ids, different lengths, or an answer about another image or question.
    """
    for name, of_question, of_answer in keys:
        found = [of_answer(answer) for answer in answers]
        known = {of_question(question): question for question in questions}
        if None in found or len(known) < len(questions):
            continue
        if name != BY_ID[0] and (len(found) != len(questions) or not set(found) <= known.keys()):
            continue  # wording differs between projects: fall back to the order, where every row is checked
        pairs = _joined(name, known, found, answers, partial)
        break
    else:
        if len(questions) != len(answers):
            raise ValueError(
                f"{len(answers)} answers for {len(questions)} questions, and the answers carry no usable ids: the "
                "file is cut off or belongs to another question file."
            )
        pairs = list(zip(questions, answers, strict=True))
    for question, answer in pairs:
        _agree(question, answer)
    return pairs


def _joined(
    name: str,
    known: dict[Hashable, Question],
    found: Sequence[Hashable | None],
    answers: Sequence[Answer],
    partial: bool,
) -> list[tuple[Question, Answer]]:
    if (twice := repeated(found)) is not None:
        places = [answer.place for answer, key in zip(answers, found, strict=True) if key == twice]
        raise ValueError(f"Duplicate {name} {twice!r}: {places[0]} and {places[1]}. Score each question set alone.")
    by_key = dict(zip(found, answers, strict=True))
    missing = [key for key in known if key not in by_key]
    extra = [key for key in found if key not in known]
    if extra or (missing and not partial):
        raise ValueError(
            f"{len(answers)} answers for {len(known)} questions: {len(missing)} questions have no answer"
            f"{_some(missing)}, {len(extra)} answers belong to no question{_some(extra)}. Is the file cut off, or for "
            "another question file? Answers to a part of the questions are scored with partial=true."
        )
    return [(question, by_key[key]) for key, question in known.items() if key in by_key]


def _some(keys: Sequence[Any]) -> str:
    shown = ", ".join(f"{key!r:.80}" for key in keys[:5])
    return f" ({shown}{', ...' if len(keys) > 5 else ''})" if keys else ""


def _agree(question: Question, answer: Answer) -> None:
    """Raise if the answer's row speaks of another image or question."""
    image = image_of(answer)
    if image is not None and question.image and image_number(image) != image_number(question.image):
        raise ValueError(
            f"{answer.place} is about image {image!r:.80}, but question {question.id} about {question.image!r}: "
            "the answers belong to another question file, or stand in another order."
        )
    label = answer.get("label")
    if label is not None and "label" in question.row and _label(answer, label) != question.row["label"]:
        raise ValueError(f"{answer.place} has the label {label!r}, but question {question.id} has the other one.")
    asked = _asked(answer)
    if asked is not None and question.text and clean_question(question.text).lower() not in asked.lower():
        raise ValueError(
            f"{answer.place} answers {asked!r:.120}, but question {question.id} is {question.text!r:.120}: "
            "the answers belong to another question file, or stand in another order."
        )


def _label(answer: Answer, label: Any) -> str:
    """A label that an answer file repeats: yes and no, or 1 and 0."""
    try:
        return check_label({1: "yes", 0: "no"}[label] if isinstance(label, int) and label in (0, 1) else label)
    except ValueError as error:
        raise ValueError(f"{answer.place}: {error}") from None
