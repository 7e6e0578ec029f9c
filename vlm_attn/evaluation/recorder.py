"""Keeps every answer as it is produced and gives it back when a run is continued."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from vlm_attn.evaluation.answers import STATS, Produced, plain
from vlm_attn.evaluation.config import ConfigError
from vlm_attn.evaluation.store import JsonLines, dumps, read_json_lines

__all__ = ["Key", "RunRecorder", "sample_key"]

Key = tuple[str, str, int]


class RunRecorder:
    """Samples and timings of a run by (method hash, task, sample id).

    The timing line is written first: a kill between the two leaves a timing without a sample, which is ignored and
    replaced when the sample is produced again.
    """

    def __init__(
        self, samples: JsonLines, timings: JsonLines, *, model: str, seed: int, earlier: Path | None = None
    ) -> None:
        """``earlier``: a file of samples that are known too and stay where they are."""
        self._samples, self._timings = samples, timings
        self._fixed = {"model": model, "seed": seed}
        self._rows: dict[Key, dict[str, Any]] = {}
        self._times: dict[Key, dict[str, Any]] = {}
        self.used: dict[tuple[str, str], set[int]] = {}
        self._label, self._hash = "", ""
        for row in samples.rows():
            key = sample_key(row, samples.path)
            if key in self._rows:
                raise ConfigError(
                    f"{samples.path} holds sample {key[2]} of {key[1]} twice for one method. Remove one "
                    "of the two lines."
                )
            self._rows[key] = row
        for row in timings.rows():
            self._times[sample_key(row, timings.path)] = row
        if earlier is not None and earlier.is_file():
            self._rows |= {sample_key(row, earlier): row for row in read_json_lines(earlier)}

    def use(self, label: str, digest: str) -> None:
        """Answers recalled and kept from now on belong to this method."""
        self._label, self._hash = label, digest

    def recall(self, task: str, doc_id: int, prompt: str, doc: Mapping[str, Any]) -> Produced | None:
        """The stored answer to exactly this question, or None."""
        self.used.setdefault((self._hash, task), set()).add(doc_id)
        row = self._rows.get((self._hash, task, doc_id))
        if row is None:
            return None
        if row["doc_hash"] != _digest(prompt, doc):
            raise ConfigError(
                f"Sample {doc_id} of {task} is another question than the stored one: the benchmark has "
                f"changed since this run began. Start a new folder, or pass resume=false."
            )
        return Produced(row["text"], row["n_tokens"])

    def keep(self, task: str, doc_id: int, prompt: str, doc: Mapping[str, Any], produced: Produced) -> None:
        """Write one answer; returns when it is on disk."""
        facts = {key: value for key, value in doc.items() if not _is_media(value)}
        stats = {key: value for key, value in produced.stats.items() if key != "times"}
        key = (self._hash, task, doc_id)
        identity = {"method_hash": self._hash, "task": task, "doc_id": doc_id}
        timing = {**identity, "times": produced.stats.get("times", {})}
        row = {
            **identity,
            **self._fixed,
            "method": self._label,
            "prompt": prompt,
            "text": produced.text,
            "n_tokens": produced.n_tokens,
            "settings": produced.settings,
            "doc": plain(facts),
            "doc_hash": _digest(prompt, doc),
            **{name: stats.get(name) for name in STATS if name in stats},
        }
        self._timings.append(timing, sync=False)
        self._times[key] = timing
        self._samples.append(row)
        self._rows[key] = row

    def samples(self, digest: str, task: str) -> list[dict[str, Any]]:
        """The samples of this run (not those a larger earlier limit left behind), by sample id."""
        ids = sorted(self.used.get((digest, task), ()))
        return [self._rows[digest, task, i] for i in ids if (digest, task, i) in self._rows]

    def timings(self, digest: str, task: str) -> list[dict[str, Any]]:
        ids = sorted(self.used.get((digest, task), ()))
        return [self._times[digest, task, i] for i in ids if (digest, task, i) in self._times]


def sample_key(row: Mapping[str, Any], path: Path) -> Key:
    """Method hash, task and sample id of a line; ``path`` is for the message if it has none."""
    try:
        return str(row["method_hash"]), str(row["task"]), int(row["doc_id"])
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{path} holds a line without {error}; it was not written by this program. Choose another output folder."
        ) from error


def _digest(prompt: str, doc: Mapping[str, Any]) -> str:
    facts = {key: value for key, value in doc.items() if not _is_media(value)}
    return sha256(dumps([prompt, plain(facts)]).encode()).hexdigest()[:16]


def _is_media(value: Any) -> bool:
    return hasattr(value, "tobytes") or isinstance(value, bytes | bytearray)
