"""Benchmark data in the user's folders: nothing is shipped, so every scorer says which file it looks for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlm_attn.evaluation.words.lemmas import Language, load_language

__all__ = ["find_file", "language_of", "read_json", "require_file"]


def find_file(data: Path, benchmark: str, names: Sequence[str]) -> Path | None:
    """The first of ``names`` that exists in ``data`` (a file itself, the benchmark's folder, or its parent)."""
    if data.is_file():
        return data if data.name in names else None
    folders = (data, data / benchmark)
    return next((folder / name for name in names for folder in folders if (folder / name).exists()), None)


def require_file(data: Path, benchmark: str, *names: str) -> Path:
    """Like `find_file`; a missing file raises and says where it was looked for."""
    if not data.exists():
        raise FileNotFoundError(f"The data folder {data} does not exist.")
    found = find_file(data, benchmark, names)
    if found is None:
        raise FileNotFoundError(
            f"{' or '.join(names)} is neither in {data} nor in {data / benchmark}. Point --data at the folder that "
            f"holds the files of {benchmark}."
        )
    return found


def language_of(data: Path) -> Language:
    """Tagger and lemmatiser: the folder ``lemmatizer`` in or beside the data, else NLTK's own data."""
    places = (data / "lemmatizer", data / "chair" / "lemmatizer", data.parent / "chair" / "lemmatizer")
    return load_language(next((place.resolve() for place in places if place.is_dir()), None))


def read_json(path: Path) -> Any:
    """A JSON data file; broken content raises with its name."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is not valid JSON: {error}") from None
