"""Where published benchmark data lies, and small writers of answer files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

DATA = Path(os.environ.get("VLM_ATTN_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


def needs(name: str) -> pytest.MarkDecorator:
    """Skips a test where the published files of a benchmark are absent."""
    return pytest.mark.skipif(
        not (DATA / name).is_dir(), reason=f"published {name} files absent (set VLM_ATTN_DATA to their folder)"
    )


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_lines(path: Path, rows: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
