"""Peak memory of one run: resident memory of a forked process on the CPU, allocated memory on a GPU."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import re
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch

HOW = {
    "cpu": "highest resident memory (VmHWM) of a process forked for this one run, the loaded model included, what is "
    "freed given back at once",
    "cuda": "highest memory allocated by torch during the run, the loaded model included",
}
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_PATIENCE = 600.0
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD, _BLOCK = -3, -1, 1 << 16


def peak(run: Callable[[], object], device: str) -> int | None:
    """Bytes at the highest point of ``run()``; None where the system cannot say.

    On the CPU a forked child runs it, so that no run inherits what the allocator kept from another one.

    Raises:
        RuntimeError: the run failed in the child.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    if not _CLEAR.exists():
        return None
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_measure, args=(run, sender))
    child.start()
    sender.close()
    try:
        if not receiver.poll(_PATIENCE):
            raise RuntimeError(f"the memory run did not end within {_PATIENCE:.0f} s")
        said = receiver.recv()
    except EOFError:
        said = "its process ended early"
    finally:
        child.kill()
        child.join()
    if not isinstance(said, int):
        raise RuntimeError(f"the memory run failed: {said}")
    return said


def _measure(run: Callable[[], object], sender: Connection) -> None:
    try:
        _give_back_what_is_freed()
        _CLEAR.write_text("5", encoding="ascii")  # the high-water mark starts anew
        run()
        found = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text(encoding="ascii"))
        sender.send(int(found[1]) * 1024 if found else "no high-water mark in /proc/self/status")
    except Exception as error:
        sender.send(f"{type(error).__name__}: {error}")
    finally:
        sender.close()


def _give_back_what_is_freed() -> None:
    """Tensors get pages of their own, gone when they are freed: the holes that glibc otherwise leaves between blocks
    depend on where the process happened to be loaded, and move the peak by 5 % from start to start."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, _BLOCK)
        libc.mallopt(_M_TRIM_THRESHOLD, _BLOCK)
        libc.malloc_trim(0)
