"""Files of a run: append-only JSON lines that survive a kill, atomic whole files, one writer per folder.

A line is written in one call before the next sample starts, so a killed run loses at most the sample in flight. Lines
are synced to the disk once a second and at the end, so a power failure costs at most the last second's samples. A line
cut in half by either is removed when the folder is opened again.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Any, BinaryIO

__all__ = ["FolderLock", "JsonLines", "read_json_lines", "write_json", "write_text"]

logger = logging.getLogger(__name__)

_SYNC_S = 1.0


def dumps(value: Any) -> str:
    """One line of JSON with sorted keys, so that equal content gives equal bytes. NaN and infinities are refused."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True, allow_nan=False)


def write_text(path: Path, text: str) -> None:
    """Write a whole file: temporary file beside it, sync, rename. Readers see old or new content, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # a full disk keeps the old file and gets its room back
        raise


def write_json(path: Path, value: Any) -> None:
    """`write_text` of indented JSON, keys in the order given (methods stay in the order of the config)."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False) + "\n")


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON-lines file; a line that is not a JSON object raises with its number."""
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path.name}, line {number} is not JSON ({error}). Remove that line; the sample will "
                    "be produced again."
                ) from error
            if not isinstance(row, dict):
                raise ValueError(f"{path.name}, line {number} holds {type(row).__name__}, expected an object.")
            yield row


class JsonLines:
    """An append-only JSON-lines file. Opening repairs a truncated last line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: BinaryIO = path.open("ab+", buffering=0)
        self._synced = monotonic()
        self._repair()

    def _repair(self) -> None:
        size = self._file.seek(0, os.SEEK_END)
        end = size
        while end > 0:  # look for the last newline from the back, in blocks
            start = max(0, end - 65536)
            self._file.seek(start)
            block = self._file.read(end - start)
            found = block.rfind(b"\n")
            if found >= 0:
                end = start + found + 1
                break
            end = start
        if end < size:
            logger.warning("%s: removed an unfinished last line (%d bytes)", self.path.name, size - end)
            self._file.truncate(end)
            os.fsync(self._file.fileno())

    def rows(self) -> list[dict[str, Any]]:
        """Everything written so far."""
        return list(read_json_lines(self.path))

    def append(self, row: Mapping[str, Any], *, sync: bool = True) -> None:
        """Write one line; it is the system's when this returns, and on the disk a second later (with ``sync``)."""
        data = (dumps(row) + "\n").encode()
        written = self._file.write(data)
        if written != len(data):
            raise OSError(
                f"Only {written} of {len(data)} bytes of a line reached {self.path}: is the disk full? Free "
                "space and start the same command again; it continues."
            )
        if sync and monotonic() - self._synced > _SYNC_S:
            os.fsync(self._file.fileno())
            self._synced = monotonic()

    def close(self) -> None:
        os.fsync(self._file.fileno())
        self._file.close()


class FolderLock:
    """One running evaluation per folder. The lock belongs to the process: a killed run leaves nothing to clean up."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file: BinaryIO | None = None

    def __enter__(self) -> FolderLock:
        self.folder.mkdir(parents=True, exist_ok=True)
        file = (self.folder / ".lock").open("ab+")
        try:
            _lock(file)
        except OSError as error:
            file.close()
            raise ValueError(
                f"Another run is writing in {self.folder}. Wait for it, or choose another output folder "
                "(`output: ...` in the config, `--output` on the command line)."
            ) from error
        self._file = file
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _lock(file: BinaryIO) -> None:
    """Take an exclusive lock on an open file or raise ``OSError`` at once."""
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    else:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
