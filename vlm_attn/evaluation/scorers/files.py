"""Answer files as they are found in the wild, read into plain rows, each with the place it came from.

Layouts: JSON lines; one JSON array; one JSON object that maps ids to texts or wraps a single list. Which field holds
the answer is found by name (`TEXT_KEYS`); a field that repeats the question is not the answer; two candidates left
over are an error, never a guess. A broken or cut line, a missing, non-text or NaN answer is an error that names its
line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

__all__ = ["TEXT_KEYS", "Answer", "clean_question", "file_hash", "image_number", "read_answers", "read_rows"]

TEXT_KEYS = (
    "text", "answer", "caption", "response", "model_answer", "model_prediction", "prediction", "output", "ans",
    "filtered_resps", "resps",
)  # fmt: skip

Row = Mapping[str, Any]
_SHOWN = 60


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer: its text, every other field of its row, and where it stands ("answers.jsonl, line 3")."""

    text: str
    fields: Row
    place: str

    def get(self, *names: str) -> Any:
        """The first of these fields that the row has, or None."""
        for name in names:
            if (value := self.fields.get(name)) is not None:
                return value
        return None


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    return sha256(path.read_bytes()).hexdigest()


def read_rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The objects of a JSON or JSON-lines file with their places."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} is not UTF-8 text (byte {error.start}). Save it as UTF-8.") from None
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise ValueError(f"{path.name} is empty: it holds no answers.")
    if text.lstrip()[0] == "[" or (len(lines) > 1 and _opens_a_document(lines[0][1])):
        return _listed(_parsed(text, path.name), path.name)
    rows = _lines(lines, path.name)
    if len(rows) == 1 and isinstance(rows[0][1], dict) and not _is_answer_row(rows[0][1]):
        return _listed(rows[0][1], path.name)
    for place, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{place} holds {_kind(row)}, expected a JSON object with the answer.")
    return rows


def _opens_a_document(line: str) -> bool:
    """Whether an object begins here that goes on below: ``{`` or ``{"results": [``."""
    return line.lstrip().startswith("{") and line.rstrip()[-1] in "{[,"


def _lines(lines: Sequence[tuple[int, str]], name: str) -> list[tuple[str, Any]]:
    """One value per line: all of them in one go, and one by one to find the line that is broken."""
    places = [f"{name}, line {number}" for number, _ in lines]
    try:
        values = json.loads(f"[{','.join(line for _, line in lines)}]")
    except (ValueError, RecursionError):
        values = []
    if len(values) != len(lines):
        values = [_parsed(line, place, last=number == lines[-1][0])
                  for place, (number, line) in zip(places, lines, strict=True)]  # fmt: skip
    return list(zip(places, values, strict=True))


def _parsed(text: str, place: str, last: bool = False) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError also for numbers of thousands of digits
        cut = " It is the last line: the file may be cut off; produce the rest of it." if last else ""
        raise ValueError(f"{place} is not JSON ({error}).{cut}") from None


def _listed(data: Any, name: str) -> list[tuple[str, dict[str, Any]]]:
    """Rows of a whole JSON document."""
    if isinstance(data, dict):
        lists = [value for value in data.values() if _holds_rows(value)]
        if len(lists) == 1:
            data = lists[0]
        elif data and not any(isinstance(value, dict | list) for value in data.values()):
            data = [{"id": key, "text": value} for key, value in data.items()]
        else:
            raise ValueError(f"{name} holds one JSON object that is neither a map of ids to texts nor wraps one list.")
    if not data:
        raise ValueError(f"{name} is empty: it holds no answers.")
    rows = []
    for number, row in enumerate(data, 1):
        if not isinstance(row, dict):
            raise ValueError(f"{name}, entry {number} holds {_kind(row)}, expected a JSON object with the answer.")
        rows.append((f"{name}, entry {number}", row))
    return rows


def _is_answer_row(row: Row) -> bool:
    """Whether the one object of a file is a row, and not a map of ids to texts or a document around the rows."""
    if any(_holds_rows(value) for value in row.values()):
        return any(isinstance(row.get(key), str) for key in TEXT_KEYS)
    return any(key in row for key in TEXT_KEYS) or any("id" in key for key in row)


def _holds_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def read_answers(
    path: Path, *, text_key: str | None = None, questions: Collection[str] = (), turns: bool = False
) -> list[Answer]:
    """The answers of a file, in its order.

    Args:
        path: see the module text for the layouts.
        text_key: the field that holds the answer, where the name does not tell.
        questions: cleaned question texts (`clean_question`): a field that equals one of them is not the answer.
        turns: a row may hold a list of several answers (a conversation); they become several answers.

    Raises:
        FileNotFoundError, ValueError: with the place and the cure.
    """
    out: list[Answer] = []
    clear: dict[tuple[str, ...], str] = {}  # fields of a row -> its answer field, where the names alone decide
    for place, row in read_rows(path):
        doc = row.get("doc")
        fields = {**doc, **row} if isinstance(doc, dict) else row  # sample logs keep the question's facts in "doc"
        names = tuple(row)
        key = clear.get(names)
        if key is None:
            key = _answer_key(row, place, text_key, questions)
            if sum(name in TEXT_KEYS for name in names) == 1:
                clear[names] = key
        value = row[key]
        if key != "text" and _repeats(row.get("text"), questions):
            fields = {**fields, "question": row["text"]}
        while isinstance(value, list) and len(value) == 1:
            value = value[0]
        if turns and isinstance(value, list) and value:
            out += [Answer(_text(item, place), fields, f"{place}, turn {i}") for i, item in enumerate(value, 1)]
        else:
            out.append(Answer(_text(value, place), fields, place))
    return out


def _answer_key(row: Row, place: str, text_key: str | None, questions: Collection[str]) -> str:
    if text_key is not None:
        if text_key not in row:
            raise ValueError(f"{place} has no field {text_key!r}; it has: {_names(row)}.")
        return text_key
    found = [key for key in TEXT_KEYS if key in row]
    if len(found) > 1:
        found = [key for key in found if not _repeats(row[key], questions)] or found
    if "filtered_resps" in found and "resps" in found:
        found.remove("resps")
    if "doc" in row and "text" in found:
        found = ["text"]
    if len(found) != 1:
        what = f"several fields that may be the answer ({', '.join(found)})" if found else "no answer field"
        raise ValueError(f"{place} has {what}. Say which one: text_key=NAME. Fields: {_names(row)}.")
    return found[0]


def _repeats(value: Any, questions: Collection[str]) -> bool:
    return isinstance(value, str) and clean_question(value) in questions


def _text(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{place}: the answer is {_kind(value)}, expected text. Answer the question again.")
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which no file can hold
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return value


def _kind(value: Any) -> str:
    if value is None:
        return "missing (null)"
    if isinstance(value, float) and value != value:
        return "NaN"
    return f"{type(value).__name__} {str(value)[:_SHOWN]!r}"


def _names(row: Row) -> str:
    return ", ".join(list(row)[:20]) or "none"


def clean_question(text: str) -> str:
    """A question for comparison: old copies spell "image" as "imange"."""
    return " ".join(text.replace("imange", "image").split())


_NUMBER = re.compile(r"([0-9]{1,12})$")
_EXTENSION = re.compile(r"\.\w{1,5}$")


def image_number(image: object) -> str:
    """What identifies an image across projects: the number its file name ends with (at most 12 digits), else its stem.

    ``COCO_val2014_000000310196.jpg``, ``000000310196`` and ``310196`` are one image.
    """
    return _image_number(str(image))


@lru_cache(maxsize=1 << 16)
def _image_number(image: str) -> str:
    stem = file_stem(image)
    number = _NUMBER.search(stem)
    return str(int(number.group(1))) if number else stem.lower()


def file_stem(path: str) -> str:
    """File name without folder and extension, of either kind of slash."""
    return _EXTENSION.sub("", path.replace("\\", "/").rsplit("/", 1)[-1])


def json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a data file without their places."""
    return (row for _, row in read_rows(path))
