"""The runner through lmms-eval with a stand-in model: files, figures, failures, resuming after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.eval_fakes import FakeBackend
from vlm_attn.evaluation.config import ConfigError, EvalConfig, build_config
from vlm_attn.evaluation.parsers import pope_metrics
from vlm_attn.evaluation.runner import RunResult, run
from vlm_attn.evaluation.store import FolderLock, JsonLines, read_json_lines

pytest.importorskip("lmms_eval")

ROOT = Path(__file__).resolve().parents[1]
TASKS = ["scenes_pope_random", "scenes_chair", "scenes_mme"]
MEASURED = ("latency", "env")


def config(folder: Path, **changes: Any) -> EvalConfig:
    data = {
        "methods": ["baseline", "noop", {"name": "fastv", "params": {"harm": 60}}],
        "benchmarks": TASKS,
        "limit": 12,
        "warmup": 1,
        "resamples": 200,
        "output": str(folder),
        "quiet": True,
        "report": False,
    }
    return build_config({**data, **changes})


def unmeasured(folder: Path) -> dict[str, Any]:
    results = json.loads((folder / "results.json").read_text())
    return {key: value for key, value in results.items() if key not in MEASURED}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    return run(config(tmp_path_factory.mktemp("run")), FakeBackend())


def test_results_keep_the_keys_of_lmms_eval_and_add_ours(finished: RunResult) -> None:
    results = json.loads((finished.folder / "results.json").read_text())
    for key in ("results", "configs", "versions", "n-shot", "n-samples", "higher_is_better", "lmms_eval_version"):
        assert results[key], key
    for key in ("method", "scores", "paired", "latency", "kept_tokens", "decoder_tokens", "env", "config", "failed"):
        assert key in results
    assert results["n-samples"]["scenes_chair"] == {"original": 500, "effective": 12}
    assert "0x" not in json.dumps(results["configs"])
    one = json.loads((finished.folder / "methods" / "fastv.json").read_text())
    assert set(one["results"]) == set(TASKS)


def test_harness_and_our_scores_agree(finished: RunResult) -> None:
    """The same samples scored twice: by lmms-eval through the task's YAML, and by our summary."""
    for label in ("baseline", "fastv"):
        harness, ours = finished.results["results"][label], finished.results["scores"][label]
        pairs = [
            ("scenes_pope_random", {"pope_f1": "f1", "pope_accuracy": "accuracy", "pope_yes_ratio": "yes_ratio"}),
            ("scenes_chair", {"chair_i": "chair_i", "chair_recall": "recall", "chair_len_words": "len_words"}),
            ("scenes_mme", {"mme_score": "score", "mme_acc_plus": "acc_plus"}),
        ]
        for task, names in pairs:
            for theirs, name in names.items():
                assert harness[task][f"{theirs},none"] == pytest.approx(ours[task]["metrics"][name]), (task, name)


def test_sample_lines_can_be_scored_alone(finished: RunResult) -> None:
    rows = [
        row
        for row in read_json_lines(finished.folder / "samples.jsonl")
        if row["method"] == "baseline" and row["task"] == "scenes_pope_random"
    ]
    assert {"prompt", "text", "model", "method", "method_hash", "seed", "settings", "doc"} <= rows[0].keys()
    assert "times" not in rows[0]
    score = pope_metrics(
        [row["text"] for row in rows],
        [row["doc"]["label"] for row in rows],
        answer_ids=[row["doc"]["question_id"] for row in rows],
        label_ids=list(range(1, 13)),
    )
    assert score.accuracy == finished.results["scores"]["baseline"]["scenes_pope_random"]["metrics"]["accuracy"]


def test_the_comparison_is_paired(finished: RunResult) -> None:
    noop = finished.results["paired"]["noop"]["scenes_pope_random"]
    assert noop["same_text"] == 1.0
    assert noop["mcnemar"] == {"gained": 0, "lost": 0, "p": 1.0}
    assert noop["difference"]["f1"]["value"] == 0
    fastv = finished.results["paired"]["fastv"]["scenes_pope_random"]
    scores = finished.results["scores"]
    gap = scores["fastv"]["scenes_pope_random"]["metrics"]["accuracy"]
    gap -= scores["baseline"]["scenes_pope_random"]["metrics"]["accuracy"]
    assert fastv["difference"]["accuracy"]["value"] == pytest.approx(gap)
    assert fastv["mcnemar"]["gained"] - fastv["mcnemar"]["lost"] == round(12 * gap)


def test_latency_kept_tokens_and_all_parsers(finished: RunResult) -> None:
    times = finished.results["latency"]["fastv"]["scenes_chair"]
    assert (times["n"], times["warmup"]) == (12, 1)
    assert times["first_token_s"]["median"] == pytest.approx(0.003)
    assert {"encode_s", "prefill_s", "decode_s_per_token", "total_s"} <= times.keys()
    assert finished.results["kept_tokens"]["fastv"]["scenes_chair"]["keep_ratio"] == pytest.approx(0.4)
    parsers = finished.results["scores"]["baseline"]["scenes_pope_random"]["parsers"]
    assert list(parsers) == ["opera", "ours", "pope", "strict", "vcd", "vlmevalkit"] or len(parsers) == 6


def test_finished_run_is_read_not_repeated(finished: RunResult) -> None:
    backend = FakeBackend()
    before = (finished.folder / "samples.jsonl").read_bytes()
    again = run(config(finished.folder), backend)
    assert backend.vlm.calls == 0
    assert (finished.folder / "samples.jsonl").read_bytes() == before
    assert again.results["scores"] == finished.results["scores"]


def test_another_method_and_a_larger_limit_only_add(finished: RunResult, tmp_path: Path) -> None:
    first = run(config(tmp_path, limit=6), FakeBackend())
    assert first.results["scores"]["baseline"]["scenes_chair"]["n"] == 6
    backend = FakeBackend()
    run(config(tmp_path, limit=12), backend)
    assert backend.vlm.calls == 3 * len(TASKS) * (6 + 1)  # missing samples plus one warm-up each
    assert unmeasured(tmp_path)["scores"] == unmeasured(finished.folder)["scores"]
    smaller = run(config(tmp_path, limit=6), FakeBackend())
    assert smaller.results["scores"] == first.results["scores"]


def test_one_failing_method_does_not_cost_the_others(tmp_path: Path) -> None:
    result = run(config(tmp_path, methods=["broken", "broken_setup", "noop"]), FakeBackend())
    assert set(result.results["scores"]) == {"baseline", "noop"}
    assert "scenes_pope_random, sample 0" in result.failed["broken"]
    assert "vlm-attn calibrate" in result.failed["broken_setup"]
    assert result.results["failed"] == result.failed


def test_two_runs_in_one_folder_refuse(tmp_path: Path) -> None:
    with FolderLock(tmp_path), pytest.raises(ValueError, match="Another run is writing"):
        run(config(tmp_path), FakeBackend())


def test_other_settings_or_weights_are_not_mixed(tmp_path: Path) -> None:
    run(config(tmp_path, limit=6, benchmarks=["scenes_chair"]), FakeBackend())
    with pytest.raises(ConfigError, match="seed: 0 then, 1 now"):
        run(config(tmp_path, seed=1), FakeBackend())
    other = FakeBackend()
    other.vlm.model.weight += 1
    with pytest.raises(ConfigError, match="weights differ"):
        run(config(tmp_path, limit=7, benchmarks=["scenes_chair"]), other)
    calibrated = FakeBackend()
    calibrated.vlm.calibrated = {"sigma": 2.0}
    with pytest.raises(ConfigError, match="calibrated values"):
        run(config(tmp_path, limit=7, benchmarks=["scenes_chair"]), calibrated)
    anew = run(config(tmp_path, limit=6, benchmarks=["scenes_chair"], seed=1, resume=False), FakeBackend())
    assert anew.results["config"]["seed"] == 1


def test_truncated_last_line_is_repaired(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": 2}\n{"a": 3, "te')
    lines = JsonLines(path)
    assert lines.rows() == [{"a": 1}, {"a": 2}]
    lines.append({"a": "é\n"})
    lines.close()
    assert list(read_json_lines(path))[-1] == {"a": "é\n"}
    path.write_bytes(b'{"a": 1}\nnot json\n{"a": 2}\n')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        list(read_json_lines(path))
    path.write_bytes(b"half")
    assert JsonLines(path).rows() == []


CHILD = """
import sys
from tests.eval_fakes import FakeBackend
from tests.test_eval_runner import config
from vlm_attn.evaluation.runner import run
from pathlib import Path
run(config(Path(sys.argv[1])), FakeBackend(delay=0.01))
"""


def start(folder: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", CHILD, str(folder)], cwd=ROOT, env={**os.environ})


def lines(folder: Path) -> int:
    path = folder / "samples.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def compare(folder: Path, other: Path, ignore: tuple[str, ...] = ("output",)) -> None:
    """Everything but measured times is equal, sample for sample and byte for byte."""
    assert (folder / "samples.jsonl").read_bytes() == (other / "samples.jsonl").read_bytes()
    ours, theirs = unmeasured(folder), unmeasured(other)
    for key in ignore:
        del ours["config"][key], theirs["config"][key]
    assert ours == theirs
    for path in sorted((other / "methods").iterdir()):
        assert (folder / "methods" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("share", [0.0, 0.13, 0.5, 0.77, 0.999])
def test_cut_anywhere_and_continued_equals_uninterrupted(finished: RunResult, tmp_path: Path, share: float) -> None:
    """The files of a run that died at any byte: samples cut there, timings at the same sample or one later."""
    samples = (finished.folder / "samples.jsonl").read_bytes()
    timings = (finished.folder / "timings.jsonl").read_bytes().splitlines(keepends=True)
    cut = samples[: int(share * len(samples))]
    (tmp_path / "samples.jsonl").write_bytes(cut)
    (tmp_path / "timings.jsonl").write_bytes(b"".join(timings[: cut.count(b"\n") + 1])[:-3])
    (tmp_path / "run.json").write_bytes((finished.folder / "run.json").read_bytes())
    backend = FakeBackend()
    run(config(tmp_path), backend)
    missing = len(timings) - cut.count(b"\n")
    assert missing <= backend.vlm.calls <= missing + 3 * len(TASKS)  # at most one warm-up per method and benchmark
    compare(tmp_path, finished.folder)


@pytest.mark.slow
def test_killed_and_continued_equals_uninterrupted(finished: RunResult, tmp_path: Path) -> None:
    """kill -9 in the middle of a run, rerun: the same files as without."""
    child = start(tmp_path)
    deadline = time.monotonic() + 300
    while lines(tmp_path) < 20 and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    assert 20 <= lines(tmp_path) < lines(finished.folder)
    assert start(tmp_path).wait() == 0
    compare(tmp_path, finished.folder)


def test_a_full_disk_is_said_and_costs_nothing_that_was_there(finished: RunResult, tmp_path: Path) -> None:
    """The system takes half of a line and no more; with room again, the run continues to the same files."""
    resource = pytest.importorskip("resource")
    import multiprocessing

    room = len((finished.folder / "samples.jsonl").read_bytes()) // 2

    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        try:
            run(config(tmp_path), FakeBackend())
        except OSError as error:
            os._exit(77 if "disk" in str(error) or error.errno else 78)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    assert process.exitcode == 77
    kept = (tmp_path / "samples.jsonl").read_bytes()
    assert (finished.folder / "samples.jsonl").read_bytes().startswith(kept) and len(kept) == room
    run(config(tmp_path), FakeBackend())
    compare(tmp_path, finished.folder)
