"""What a scorer hands back: figures, how they were made, and one row per answer."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from vlm_attn.evaluation.store import dumps, write_text

__all__ = ["Report"]

POINTS = (
    "score", "object_level", "attribute_level", "hallucination", "perception", "cognition", "mean_rating", "h_score",
)  # fmt: skip
LENGTHS = ("len_words", "len_tokens")


@dataclass(frozen=True)
class Report:
    """The score of one answer file.

    - ``metrics``: headline figures; rates in 0..1, except lengths and what is counted in points (`POINTS`).
    - ``groups``: the same per split, category, dimension or type.
    - ``settings``: parser, variant, subset: everything that another choice would change.
    - ``details``: counts, intervals, other readings of the same answers.
    - ``files``: file name -> SHA-256 of what was read; ``notes``: what a reader must know.
    - ``samples``: one row per answer, not part of `to_dict` (see `write_samples`).
    """

    benchmark: str
    n: int
    metrics: Mapping[str, float]
    groups: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()
    samples: Sequence[Mapping[str, Any]] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data, without the samples."""
        unit = f"rates in 0..1; points: {', '.join(POINTS)}; lengths per answer"
        return {
            "benchmark": self.benchmark,
            "n": self.n,
            "metrics": dict(self.metrics),
            "groups": {name: dict(row) for name, row in self.groups.items()},
            "settings": dict(self.settings),
            "details": dict(self.details),
            "notes": list(self.notes),
            "files": dict(self.files),
            "unit": unit,
        }

    def write_samples(self, path: Path) -> None:
        """One JSON line per answer. The file appears whole or not at all: what stood there before survives an error.

        Raises:
            ValueError: ``path`` is a folder or a device, or the disk is full.
        """
        if path.exists() and not path.is_file():
            raise ValueError(f"{path} is no ordinary file; name a file for the samples.")
        try:
            write_text(path, "".join(dumps(row) + "\n" for row in self.samples))
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else str(error)
            raise ValueError(
                f"The samples could not be written to {path}: {reason}. Nothing was changed there; the answer file "
                "is untouched. Free space or name another file, then score again."
            ) from error

    def render(self) -> RenderableType:
        """Tables for the terminal, in percent."""
        shown = {key: value for key, value in self.settings.items() if value not in (None, "", False)}
        parts: list[RenderableType] = [
            Text(f"{self.benchmark}, n = {self.n}", style="bold"),
            Text(", ".join(f"{key}: {value}" for key, value in shown.items()), style="dim"),
        ]
        tables: dict[tuple[str, ...], dict[str, Mapping[str, Any]]] = {}
        for label, row in {**self.groups, "all": self.metrics}.items():
            names = tuple(n for n, v in row.items() if isinstance(v, int | float) and not isinstance(v, bool))
            tables.setdefault(tuple(n for n in names if n != "n"), {})[label] = row
        parts += [_table(names, rows) for names, rows in tables.items() if names]
        return Group(*parts, *(Text(note, style="yellow") for note in self.notes))


def _table(names: Sequence[str], rows: Mapping[str, Mapping[str, Any]]) -> Table:
    """Rows that have the same figures."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, header_style="bold")
    columns = (*(("n",) if any("n" in row for row in rows.values()) else ()), *names)
    for name in ("", *columns):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for label, row in rows.items():
        table.add_row(Text(label), *(_shown(name, row.get(name)) for name in columns))
    return table


def _shown(name: str, value: Any) -> str:
    if not isinstance(value, int | float):
        return "-"
    if isinstance(value, int):
        return str(value)
    return f"{value:.1f}" if name in (*POINTS, *LENGTHS) else f"{100 * value:.1f}"
