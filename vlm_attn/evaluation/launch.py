"""``vlm-attn eval CONFIG --launch N``, and the same run under ``accelerate launch -m vlm_attn eval CONFIG``.

The launcher starts N processes on this machine, waits for all of them, gathers their answers and scores. Under
accelerate or torchrun, rank 0 gathers and scores; all machines write to one shared output folder.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import yaml

from vlm_attn.evaluation import runner
from vlm_attn.evaluation.config import ConfigError, EvalConfig
from vlm_attn.evaluation.progress import terminal
from vlm_attn.evaluation.ranks import LAUNCHER, Rank, gather, rank_folder
from vlm_attn.evaluation.store import FolderLock, write_text

__all__ = ["Process", "RanksFailed", "launch", "run_rank"]

_WAIT_S = 0.1


class RanksFailed(RuntimeError):
    """Processes ended before their share was answered; the message names them and says how to continue."""


class Process(Protocol):
    """What is needed of ``subprocess.Popen``."""

    def poll(self) -> int | None: ...

    def terminate(self) -> None: ...

    def wait(self) -> int: ...


Start = Callable[[Rank, EvalConfig], Process]


def launch(
    config: EvalConfig, processes: int, *, start: Start | None = None, backend: runner.Backend | None = None
) -> runner.RunResult:
    """Answer with ``processes`` processes, then gather and score in this one.

    Args:
        start: starts one rank (default: ``python -m vlm_attn eval`` on the config as it was resolved).

    Raises:
        RanksFailed: a process died or failed; everything answered is kept, the same command continues.
    """
    folder = Path(config.output or "runs/evaluation")
    order = runner.check(config, backend)
    console = terminal(quiet=config.quiet)
    with FolderLock(folder):
        runner.start_anew(config, folder)
        gather(folder, order)
        config = config.model_copy(update={"resume": True, "output": str(folder)})
        write_text(folder / "config.yaml", yaml.safe_dump(config.resolved(), sort_keys=False))
        console.print(f"{processes} processes answer; their logs: {folder / 'ranks'}/*/log.txt", highlight=False)
        codes = _supervise([Rank(i, processes, launcher=os.getpid()) for i in range(processes)], config,
                           start or start_process)  # fmt: skip
        gather(folder, order)
        failed = {index: code for index, code in enumerate(codes) if code}
        if failed:
            raise RanksFailed(_explain(failed, processes, folder))
    result = runner.run(config, backend)
    shutil.rmtree(folder / "ranks", ignore_errors=True)
    return result


def _supervise(ranks: list[Rank], config: EvalConfig, start: Start) -> list[int]:
    """Exit codes of all ranks. A dead rank does not stop the others; an interrupt stops all."""
    running: list[Process] = []
    try:
        for rank in ranks:
            rank_folder(Path(config.output), rank.index).mkdir(parents=True, exist_ok=True)
            running.append(start(rank, config))
        while any(process.poll() is None for process in running):
            time.sleep(_WAIT_S)
    finally:
        for process in running:
            if process.poll() is None:
                process.terminate()
    return [process.wait() for process in running]


def start_process(rank: Rank, config: EvalConfig) -> subprocess.Popen[bytes]:
    """One rank as a process of its own; it reads the resolved config and writes what it prints to its log."""
    folder = Path(config.output)
    variables = {"RANK": rank.index, "WORLD_SIZE": rank.count, "LOCAL_RANK": 0, LAUNCHER: rank.launcher}
    environment = {**os.environ, **{name: str(value) for name, value in variables.items()}, **visible_gpus(rank)}
    with (rank_folder(folder, rank.index) / "log.txt").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "vlm_attn", "eval", str(folder / "config.yaml")],
            env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        )  # fmt: skip


def visible_gpus(rank: Rank) -> Mapping[str, str]:
    """``CUDA_VISIBLE_DEVICES`` of a rank: an equal slice of this machine's GPUs, so that ``device: auto`` spreads a
    model over several of them; nothing without GPUs, or with fewer GPUs than ranks (then they share)."""
    import torch

    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = listed.split(",") if listed else [str(i) for i in range(torch.cuda.device_count())]
    each = len(gpus) // rank.count
    if not each:
        return {}
    return {"CUDA_VISIBLE_DEVICES": ",".join(gpus[rank.index * each : (rank.index + 1) * each])}


def _explain(failed: Mapping[int, int], processes: int, folder: Path) -> str:
    parts = []
    for index, code in failed.items():
        log = rank_folder(folder, index) / "log.txt"
        text = log.read_text(encoding="utf-8", errors="replace").strip() if log.is_file() else ""
        end = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        parts.append(f"rank {index} of {processes} {end}" + (f" ({text.splitlines()[-1][:300]})" if text else ""))
    samples = folder / "samples.jsonl"
    kept = samples.read_bytes().count(b"\n") if samples.is_file() else 0
    return (
        f"{'; '.join(parts)}. The {kept} answered samples are kept in {folder}. Start the same command again, with "
        "any number of processes: it answers only what is missing."
    )


def run_rank(config: EvalConfig, rank: Rank, backend: runner.Backend | None = None) -> runner.RunResult | None:
    """The part of one process; the result where this process also scores (rank 0 under accelerate), else None."""
    if not config.output:
        raise ConfigError("A run of several processes needs an `output` folder that all of them share.")
    if rank.launcher:
        runner.answer_share(config, rank, backend)
        return None
    folder = Path(config.output)
    others = [str(index) for index in range(1, rank.count)]
    meeting = _meeting(rank)
    if rank.index:
        meeting.wait(["0"])
        runner.answer_share(config, rank, backend)
        meeting.set(str(rank.index), "answered")
        return None
    order = runner.check(config, backend)
    with FolderLock(folder):
        runner.start_anew(config, folder)
        gather(folder, order)
        meeting.set("0", "gathered")
        runner.answer_share(config, rank, backend)
        meeting.wait(others)
        gather(folder, order)
    return runner.run(config.model_copy(update={"resume": True}), backend)


def _meeting(rank: Rank) -> Any:
    """The key-value store of the launcher (MASTER_ADDR, MASTER_PORT). A process group would make lmms-eval wait for
    every rank at every benchmark; two keys are enough here."""
    from torch.distributed import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    forever = timedelta(days=30)  # the launcher ends all ranks when one dies
    store, _, _ = next(rendezvous("env://", rank.index, rank.count, timeout=forever))
    meeting = PrefixStore("vlm_attn", store)
    meeting.set_timeout(forever)
    return meeting
