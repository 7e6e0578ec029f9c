"""Several processes for one run: which samples are whose, and how their files become the files of one process.

Each process (rank) answers its share of the missing samples in a folder of its own, ``ranks/<index>``, which looks
like the folder of a run. Ranks do not talk while they answer, so a dead one costs its unfinished samples and no more.
`gather` then moves their lines into ``samples.jsonl``, in the order in which one process would have written them.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from vlm_attn.evaluation import environment
from vlm_attn.evaluation.config import ConfigError
from vlm_attn.evaluation.recorder import Key, sample_key
from vlm_attn.evaluation.store import FolderLock, JsonLines, dumps, write_json, write_text

__all__ = ["LAUNCHER", "Order", "Rank", "ShareDone", "gather", "hidden", "rank_folder", "sort_files"]

LAUNCHER = "VLM_ATTN_LAUNCHER"
"""Environment variable of processes started by ``vlm-attn eval --launch``: the launcher's process id."""
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")

T = TypeVar("T")


class ShareDone(Exception):
    """Raised inside lmms-eval when a rank has answered its share: scoring waits until all answers are together."""


@dataclass(frozen=True)
class Rank:
    """One of ``count`` processes. ``launcher`` is the process id of ``vlm-attn eval --launch``, 0 under accelerate."""

    index: int = 0
    count: int = 1
    local: int = 0
    launcher: int = 0

    @classmethod
    def current(cls) -> Rank:
        """This process, from the variables that accelerate, torchrun and our launcher set."""
        rank, count, local = (os.environ.get(name, default) for name, default in zip(_VARIABLES, "010", strict=True))
        launcher = os.environ.get(LAUNCHER, "0")
        if not all(value.isdecimal() for value in (rank, count, local, launcher)) or int(rank) >= max(int(count), 1):
            raise ConfigError(f"RANK={rank}, WORLD_SIZE={count}, LOCAL_RANK={local} name no process of a run.")
        return cls(int(rank), max(int(count), 1), int(local), int(launcher))

    def share(self, items: Sequence[T]) -> list[T]:
        """Every ``count``-th item; the shares of all ranks are the whole."""
        return list(items[self.index :: self.count])

    def device(self, asked: str | None) -> str | None:
        """The device of this rank: ``cuda`` is one GPU per process of a machine."""
        return f"cuda:{self.local}" if asked == "cuda" and self.count > 1 else asked

    def check_launcher(self) -> None:
        """A process whose launcher is gone stops, so that nobody answers twice."""
        if self.launcher and os.getppid() != self.launcher:
            raise RuntimeError(f"The launcher of rank {self.index} is gone; what was answered is kept.")


@contextlib.contextmanager
def hidden() -> Iterator[None]:
    """Keep the rank from lmms-eval, which would wait for the other ranks to score together."""
    kept = {name: os.environ.pop(name) for name in _VARIABLES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def rank_folder(folder: Path, index: int) -> Path:
    """Where rank ``index`` of the run in ``folder`` works."""
    return folder / "ranks" / str(index)


@dataclass(frozen=True)
class Order:
    """The order of one process: methods and benchmarks as in the config, then what the config does not name."""

    methods: Sequence[str]
    tasks: Sequence[str]

    def of(self, key: Key) -> tuple[int, str, int, str, int]:
        method, task, doc_id = key
        places = [list(names).index(name) if name in names else len(names)
                  for names, name in ((self.methods, method), (self.tasks, task))]  # fmt: skip
        return places[0], method, places[1], task, doc_id


def gather(folder: Path, order: Order) -> None:
    """Move the answers of all ranks into the run's own files. Interrupted anywhere, it can be repeated.

    Raises:
        ValueError: a rank is still running.
        ConfigError: ranks that loaded other weights, or answered one sample differently.
    """
    parts = sorted(path for path in (folder / "ranks").glob("*") if path.name.isdecimal())
    if not parts:
        return
    with contextlib.ExitStack() as locks:
        for part in parts:
            locks.enter_context(FolderLock(part))
        identity = _identity(folder, parts)
        if identity:
            write_json(folder / "run.json", identity)
        sort_files(folder, order, parts)
        for part in parts:
            for name in ("samples.jsonl", "timings.jsonl", "run.json"):
                (part / name).unlink(missing_ok=True)


def sort_files(folder: Path, order: Order, parts: Sequence[Path] = ()) -> None:
    """Bring ``samples.jsonl`` and ``timings.jsonl`` into order, lines of ``parts`` included; no change, no write."""
    for name in ("timings.jsonl", "samples.jsonl"):  # samples last: a timing without its sample is harmless
        here = _rows(folder / name)
        rows: dict[Key, dict[str, Any]] = {}
        for row in [*here, *(row for part in parts for row in _rows(part / name))]:
            key = sample_key(row, folder / name)
            if name == "samples.jsonl" and rows.get(key, row) != row:
                raise ConfigError(
                    f"{folder} holds two different answers to sample {key[2]} of {key[1]}. Remove one of the two "
                    f"lines in {name} or below ranks/."
                )
            rows[key] = row
        ordered = [rows[key] for key in sorted(rows, key=order.of)]
        if ordered != here:
            write_text(folder / name, "".join(dumps(row) + "\n" for row in ordered))


def _rows(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    lines = JsonLines(path)  # drops a last line cut by a kill
    try:
        return lines.rows()
    finally:
        lines.close()


def _identity(folder: Path, parts: Sequence[Path]) -> dict[str, Any]:
    """``run.json`` of the whole run; every rank must have had the same settings, weights and calibrated values."""
    whole = environment.read_identity(folder / "run.json")
    for part in parts:
        one = environment.read_identity(part / "run.json")
        if not one:
            continue
        environment.check_identity(whole, {key: one[key] for key in ("settings", "weights") if key in one}, part)
        methods: Mapping[str, Any] = whole.get("methods", {})
        for digest, resolved in one.get("methods", {}).items():
            if methods.get(digest, resolved) != resolved:
                raise ConfigError(
                    f"{part} holds answers with other calibrated values ({methods[digest]} elsewhere, {resolved} "
                    "there). All processes must find the same profile."
                )
        whole = {**one, **whole, "methods": {**one.get("methods", {}), **methods}}
    return whole
