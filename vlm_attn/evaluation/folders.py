"""Finished result folders, read for comparing them with each other."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from vlm_attn.evaluation.store import dumps, read_json_lines
from vlm_attn.evaluation.summary import Rater, rater_for

__all__ = ["ResultFolder", "read_folder"]

Row = Mapping[str, Any]


@dataclass(frozen=True)
class ResultFolder:
    """One run: its ``results.json``, and its samples by (column, benchmark), in the order of their ids."""

    path: Path
    results: Mapping[str, Any]
    samples: Mapping[tuple[str, str], list[Row]] = field(repr=False)

    @property
    def columns(self) -> list[str]:
        """Labels of the methods that were finished, the baseline first."""
        return list(self.results["scores"])

    def tasks(self, label: str) -> list[str]:
        """Benchmarks on which a column has scores."""
        return list(self.results["scores"][label])

    def benchmark(self, task: str) -> Mapping[str, Any]:
        """The config's entry of a benchmark."""
        return next((b for b in self.results["config"]["benchmarks"] if b["name"] == task), {"name": task})

    def rater(self, task: str) -> Rater:
        """How this run was scored on a benchmark."""
        rater = rater_for(task, self.results["config"]["parser"], self.benchmark(task).get("data"))
        if rater is None:
            raise ValueError(f"{task} has no statistics of ours; compare lmms-eval's own figures in results.json.")
        return rater

    def protocol(self, label: str, task: str) -> str:
        """Eight hex digits that two runs share if they asked the same questions in the same way and read the answers
        in the same way."""
        rows = self.samples[label, task]
        asked = [[row["doc_id"], row["doc_hash"], row["settings"]] for row in rows]
        parser = self.results["scores"][label][task].get("parser")
        return sha256(dumps([task, asked, parser]).encode()).hexdigest()[:8]


def read_folder(path: str | Path) -> ResultFolder:
    """Read the folder of a finished run.

    Raises:
        FileNotFoundError, ValueError: no folder of a finished run, or broken files.
    """
    path = Path(path)
    for name in ("results.json", "samples.jsonl"):
        if not (path / name).is_file():
            raise FileNotFoundError(f"{path} holds no {name}: name the output folder of a finished `vlm-attn eval`.")
    try:
        results = json.loads((path / "results.json").read_text(encoding="utf-8"))
        digests = {label: results["method"][label]["hash"] for label in results["scores"]}
        ids = {b["name"]: b["limit"] for b in results["config"]["benchmarks"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path / 'results.json'} was not written by this program ({error!r}).") from None
    by_hash: dict[tuple[str, str], list[Row]] = {}
    for row in read_json_lines(path / "samples.jsonl"):
        limit = ids.get(row["task"])
        if limit is None or row["doc_id"] < limit:  # a larger earlier run may have left more
            by_hash.setdefault((row["method_hash"], row["task"]), []).append(row)
    samples = {
        (label, task): sorted(by_hash.get((digest, task), []), key=lambda row: row["doc_id"])
        for label, digest in digests.items()
        for task in results["scores"][label]
    }
    for (label, task), rows in samples.items():
        if len(rows) != results["scores"][label][task]["n"]:
            raise ValueError(
                f"{path}: {len(rows)} samples of {label} on {task}, but results.json was made from "
                f"{results['scores'][label][task]['n']}. Run the config again; it completes the folder."
            )
    return ResultFolder(path, results, samples)
