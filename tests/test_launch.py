"""Runs of several processes: equal files for any number, a killed rank, what stops them; a stand-in answers."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lmms_eval")

from tests.eval_fakes import FakeBackend, FakeVlm
from tests.test_eval_runner import compare, config
from vlm_attn.evaluation import launch, ranks
from vlm_attn.evaluation.config import ConfigError, EvalConfig, build_config
from vlm_attn.evaluation.ranks import LAUNCHER, Order, Rank, ShareDone, gather, rank_folder
from vlm_attn.evaluation.runner import RunResult, VlmBackend, run
from vlm_attn.evaluation.store import FolderLock

ROOT = Path(__file__).resolve().parents[1]
IGNORED = ("output", "resume")


class Forked:
    """A rank as a fork of this process, which spares it ten seconds of imports."""

    def __init__(self, rank: Rank, config: EvalConfig, failing: bool = False) -> None:
        context: Any = multiprocessing.get_context("fork")
        self.process = context.Process(target=self.work, args=(rank, config, failing))
        self.process.start()

    @staticmethod
    def work(rank: Rank, config: EvalConfig, failing: bool) -> None:
        if failing:
            raise SystemExit(3)
        os.environ |= {"RANK": str(rank.index), "WORLD_SIZE": str(rank.count), LAUNCHER: str(rank.launcher)}
        assert launch.run_rank(config, Rank.current(), FakeBackend()) is None

    def poll(self) -> int | None:
        return self.process.exitcode

    def terminate(self) -> None:
        self.process.terminate()

    def wait(self) -> int:
        self.process.join()
        return int(self.process.exitcode)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    return run(config(tmp_path_factory.mktemp("alone")), FakeBackend())


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_any_number_of_processes_writes_the_files_of_one(alone: RunResult, tmp_path: Path, processes: int) -> None:
    scorer = FakeBackend()
    result = launch.launch(config(tmp_path), processes, start=Forked, backend=scorer)
    assert scorer.vlm.calls == 0  # the launching process only scores
    assert result.results["scores"] == alone.results["scores"]
    compare(tmp_path, alone.folder, IGNORED)
    assert not (tmp_path / "ranks").exists()
    assert len((tmp_path / "timings.jsonl").read_bytes().splitlines()) == 108


def test_batches_are_shared_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("vlm_attn.evaluation.lmms.one_by_one", lambda vlm: True)  # the stand-in has no processor
    one = run(config(tmp_path / "one", batch_size=5, methods=[]), FakeBackend())
    two = launch.launch(config(tmp_path / "two", batch_size=5, methods=[]), 2, start=Forked, backend=FakeBackend())
    compare(two.folder, one.folder, IGNORED)


class Killed(Forked):
    """Rank 1 is killed at its eighth generation, as by the system; the others work on."""

    @staticmethod
    def work(rank: Rank, config: EvalConfig, failing: bool) -> None:
        if rank.index == 1:
            ask = FakeVlm.ask

            def ask_or_die(self: FakeVlm, image: Any, text: str, **settings: Any) -> Any:
                if self.calls == 8:
                    os.kill(os.getpid(), signal.SIGKILL)
                return ask(self, image, text, **settings)

            FakeVlm.ask = ask_or_die  # type: ignore[method-assign]  # of this fork alone
        Forked.work(rank, config, failing)


def test_a_killed_rank_costs_its_own_unfinished_samples(alone: RunResult, tmp_path: Path) -> None:
    with pytest.raises(launch.RanksFailed, match="rank 1 of 3 was ended by SIGKILL.*Start the same command"):
        launch.launch(config(tmp_path), 3, start=Killed, backend=FakeBackend())
    kept = (tmp_path / "samples.jsonl").read_bytes().splitlines()
    assert len(kept) == 2 * 36 + 8 - 2  # two of the eight were warm-ups
    assert not (tmp_path / "results.json").exists()
    assert not list(tmp_path.glob("ranks/*/samples.jsonl"))
    launch.launch(config(tmp_path), 2, start=Forked, backend=FakeBackend())
    compare(tmp_path, alone.folder, IGNORED)


def test_a_killed_launcher_loses_nothing(alone: RunResult, tmp_path: Path) -> None:
    """Its ranks' folders are found by whatever runs next, here one process; half a line is dropped."""
    settings = config(tmp_path)
    for index in range(2):
        os.environ |= {"RANK": str(index), "WORLD_SIZE": "2", LAUNCHER: str(os.getppid())}
        try:
            launch.run_rank(settings, Rank.current(), FakeBackend())
        finally:
            for name in ("RANK", "WORLD_SIZE", LAUNCHER):
                del os.environ[name]
    file = rank_folder(tmp_path, 1) / "samples.jsonl"
    file.write_bytes(file.read_bytes()[:-40])
    backend = FakeBackend()
    run(settings, backend)
    assert backend.vlm.calls == 2  # one warm-up and the one sample that was cut
    compare(tmp_path, alone.folder, IGNORED)


def test_ranks_under_accelerate_meet_at_rank_0(
    alone: RunResult, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Rank 1 in a fork, rank 0 here; they know each other only by the address that a launcher would give them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", str(port)), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    other = Forked(Rank(1, 2), config(tmp_path))
    monkeypatch.setenv("RANK", "0")
    backend = FakeBackend()
    result = launch.run_rank(config(tmp_path), Rank.current(), backend)
    assert other.wait() == 0
    assert result is not None and result.results["scores"] == alone.results["scores"]
    assert backend.vlm.calls == 54 + 9  # its half, and a warm-up for each method and benchmark
    compare(tmp_path, alone.folder, IGNORED)


def test_how_a_process_is_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "python"
    program.write_text('#!/bin/sh\necho "$RANK of $WORLD_SIZE: $@"\n')
    program.chmod(0o755)
    monkeypatch.setattr(launch.sys, "executable", str(program))
    settings = config(tmp_path / "run")
    rank_folder(tmp_path / "run", 1).mkdir(parents=True)
    process = launch.start_process(Rank(1, 2, launcher=os.getpid()), settings)
    assert process.wait() == 0
    said = (rank_folder(tmp_path / "run", 1) / "log.txt").read_text()
    assert said == f"1 of 2: -m vlm_attn eval {tmp_path / 'run' / 'config.yaml'}\n"


def test_a_failing_rank_is_named(tmp_path: Path) -> None:
    def start(rank: Rank, config: EvalConfig) -> Forked:
        (rank_folder(Path(config.output), rank.index) / "log.txt").write_text("loading\nno room on this device\n")
        return Forked(rank, config, failing=rank.index == 0)

    with pytest.raises(launch.RanksFailed, match=r"rank 0 of 2 ended with code 3 \(no room on this device\)"):
        launch.launch(config(tmp_path, limit=2, methods=[]), 2, start=start, backend=FakeBackend())


def test_ranks_of_one_run_must_agree(tmp_path: Path) -> None:
    settings = config(tmp_path, limit=2, benchmarks=["scenes_chair"], methods=[])
    order = Order(["x"], ["scenes_chair"])

    def part(index: int, text: str, weights: str) -> None:
        folder = rank_folder(tmp_path, index)
        folder.mkdir(parents=True, exist_ok=True)
        row = {"method_hash": "x", "task": "scenes_chair", "doc_id": 0, "text": text}
        (folder / "samples.jsonl").write_text(json.dumps(row) + "\n")
        identity = {"settings": settings.answer_key(), "weights": weights, "methods": {}}
        (folder / "run.json").write_text(json.dumps(identity))

    part(0, "a cat", "1")
    part(1, "a cat", "2")
    with pytest.raises(ConfigError, match="weights differ"):
        gather(tmp_path, order)
    part(1, "a dog", "1")
    with pytest.raises(ConfigError, match="two different answers to sample 0"):
        gather(tmp_path, order)
    part(1, "a cat", "1")
    with FolderLock(rank_folder(tmp_path, 1)), pytest.raises(ValueError, match="Another run is writing"):
        gather(tmp_path, order)
    gather(tmp_path, order)
    assert (tmp_path / "samples.jsonl").read_text().count("a cat") == 1


def test_an_orphan_stops(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="launcher of rank 0 is gone"):
        Rank(0, 2, launcher=os.getpid()).check_launcher()
    Rank(0, 2).check_launcher()


def test_rank_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Rank.current() == Rank()
    for name, value in (("RANK", "3"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    rank = Rank.current()
    assert (rank.index, rank.count, rank.device("cuda"), rank.device("auto")) == (3, 4, "cuda:1", "auto")
    assert rank.share(range(10)) == [3, 7]
    with ranks.hidden():
        assert "WORLD_SIZE" not in os.environ
    assert os.environ["WORLD_SIZE"] == "4"
    monkeypatch.setenv("RANK", "4")
    with pytest.raises(ConfigError, match="name no process"):
        Rank.current()


def test_a_model_may_be_spread_over_devices(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("vlm_attn.wrap", lambda model, method, **options: (model, options))
    loaded = VlmBackend().load(config(tmp_path, device="auto", dtype="bfloat16", attention="sdpa", model="folder"))
    assert loaded == ("folder", {"device_map": "auto", "dtype": "bfloat16", "attn_implementation": "sdpa"})


def test_gpus_are_dealt_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert launch.visible_gpus(Rank(1, 2)) == {"CUDA_VISIBLE_DEVICES": "6,7"}
    assert launch.visible_gpus(Rank(1, 8)) == {}


def test_a_share_leaves_the_harness_before_scoring() -> None:
    from tests.test_eval_lmms import chat, request

    with pytest.raises(ShareDone):
        chat(rank=Rank(1, 2)).generate_until([request(0), request(1)])


@pytest.mark.slow
def test_accelerate_launch_gives_the_files_of_one_process(tmp_path: Path) -> None:
    """Two real processes of the shipped model, through the module and accelerate's own launcher (its option for
    several processes is called multi_gpu; there is none here)."""
    settings = {
        "limit": 2, "methods": ["baseline", "vcd"], "benchmarks": ["scenes_pope_random"], "report": False,
        "warmup": 0, "threads": 1, "dtype": "float32", "device": "cpu", "resamples": 100, "quiet": True,
    }  # fmt: skip
    file = tmp_path / "small.yaml"
    file.write_text(json.dumps(settings))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
               "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port",
               str(29000 + os.getpid() % 900), "-m", "vlm_attn", "eval", str(file), "-o",
               str(tmp_path / "two")]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "two" / "ranks" / "1" / "harness.log").exists()
    run(build_config({**settings, "output": str(tmp_path / "one")}))
    compare(tmp_path / "two", tmp_path / "one", IGNORED)
