"""The whole way with the checkpoint that ships: documents, the runner on real methods, batches, kill and continue."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lmms_eval")

import vlm_attn
from tests.test_eval_runner import compare, lines, unmeasured
from vlm_attn.evaluation import run_config
from vlm_attn.evaluation.kept import drawing, masks
from vlm_attn.evaluation.runner import RunResult
from vlm_attn.evaluation.scenes_docs import documents, object_words, picture
from vlm_attn.evaluation.store import read_json_lines

ROOT = Path(__file__).resolve().parents[1]
SMOKE = ROOT / "eval_configs" / "scenes_smoke.yaml"
CHECKPOINT = Path(vlm_attn.__file__).parent / "scenes" / "checkpoint"
needs_checkpoint = pytest.mark.skipif(not (CHECKPOINT / "config.json").is_file(), reason="no scenes checkpoint here")
FEW: dict[str, Any] = {
    "methods": ["baseline", "noop", "fastv", "vcd", "carve"],
    "benchmarks": ["scenes_pope_adversarial", "scenes_chair"],
    "limit": 2,
    "max_new_tokens": 6,
    "resamples": 100,
    "quiet": True,
}


@pytest.mark.parametrize("split", ["random", "popular", "adversarial"])
def test_pope_documents(split: str) -> None:
    docs = documents(f"pope_{split}")
    assert len(docs) == 3000
    assert [doc["label"] for doc in docs] == ["yes", "no"] * 1500
    assert set(Counter(doc["image_id"] for doc in docs).values()) == {6}
    assert [doc["question_id"] for doc in docs] == list(range(1, 3001))


def test_caption_and_pair_documents() -> None:
    captions = documents("chair")
    assert len(captions) == 500
    assert all(kind in object_words().nodes for doc in captions for kind in doc["truth"])
    assert picture(captions[0]).mode == "RGB"
    pairs = Counter((doc["category"], doc["pair"]) for doc in documents("mme"))
    assert len(pairs) == 120
    assert set(pairs.values()) == {2}
    with pytest.raises(ValueError, match="Did you mean 'pope_random'"):
        documents("pope_randm")


def test_plurals_count_as_mentions() -> None:
    assert object_words().mentions("Two dogs, three benches and a bus.") == ["dog", "bench", "bus"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    return run_config(SMOKE, {**FEW, "output": str(tmp_path_factory.mktemp("scenes"))})


@needs_checkpoint
def test_methods_run_and_noop_changes_nothing(finished: RunResult) -> None:
    assert finished.failed == {}
    for task in FEW["benchmarks"]:
        assert finished.results["paired"]["noop"][task]["same_text"] == 1.0
        assert finished.results["latency"]["fastv"][task]["n"] == 2
        kept = {label: finished.results["kept_tokens"][label][task] for label in FEW["methods"]}
        assert kept["baseline"]["keep_ratio"] == 1
        assert kept["fastv"]["keep_ratio"] < 1
        assert kept["carve"]["visual_tokens"] == 2 * kept["baseline"]["visual_tokens"]
    assert finished.report is not None
    assert finished.report.stat().st_size > 10_000


@needs_checkpoint
def test_every_pass_of_a_method_is_work(finished: RunResult) -> None:
    for task in FEW["benchmarks"]:
        work = {label: finished.results["decoder_tokens"][label][task] for label in FEW["methods"]}
        assert work["noop"] == work["baseline"]
        assert work["fastv"] < work["baseline"]
        assert 1.8 * work["baseline"] < work["vcd"] < 2.2 * work["baseline"]
        assert work["carve"] > 1.5 * work["baseline"]
    assert finished.report is not None
    page = finished.report.read_text(encoding="utf-8")
    assert "<th>compute</th>" in page


@needs_checkpoint
def test_batches_answer_like_single_requests(finished: RunResult, tmp_path: Path) -> None:
    batched = run_config(SMOKE, {**FEW, "batch_size": 2, "output": str(tmp_path), "report": False})
    texts = [
        {(r["method"], r["task"], r["doc_id"]): r["text"].strip() for r in read_json_lines(f / "samples.jsonl")}
        for f in (finished.folder, batched.folder)
    ]
    assert texts[0] == texts[1]
    assert noted_masks(finished) == noted_masks(batched)


def noted_masks(result: RunResult) -> dict[tuple[str, str, int], list[str]]:
    rows = read_json_lines(result.folder / "samples.jsonl")
    return {
        (r["method"], r["task"], r["doc_id"]): r["kept_mask"] for r in rows if "kept_mask" in r and not r["doc_id"]
    }


@needs_checkpoint
def test_the_report_draws_what_a_pruner_kept(finished: RunResult) -> None:
    noted = noted_masks(finished)
    assert set(noted) == {("fastv", task, 0) for task in FEW["benchmarks"]}
    rows = read_json_lines(finished.folder / "samples.jsonl")
    for (_, task, _), mask in noted.items():
        row = next(r for r in rows if (r["method"], r["task"], r["doc_id"]) == ("fastv", task, 0))
        cells = "".join(mask)
        share = row["kept_tokens"]["last"] / row["visual_tokens"]
        assert 0 < share < 1
        assert cells.count("1") / len(cells) == pytest.approx(share, abs=0.02)
        model = vlm_attn.wrap("scenes", "fastv")
        model.ask(picture(row["doc"]), row["prompt"], max_new_tokens=1)
        assert masks(model, [[picture(row["doc"])]]) == [{"kept_mask": mask}]
    assert finished.report is not None
    page = finished.report.read_text(encoding="utf-8")
    assert "<h2>Kept visual tokens</h2>" in page
    assert page.count("<use href='#seen'/>") == 1


def test_a_mask_is_drawn_as_its_dropped_runs() -> None:
    svg = drawing(["0110", "1111", "1001"], "seen", (40, 30))
    path = "M0.0 0.0h10.0v10.0h-10.0zM30.0 0.0h10.0v10.0h-10.0zM10.0 20.0h20.0v10.0h-20.0z"
    assert f"d='{path}'" in svg


@needs_checkpoint
@pytest.mark.slow
def test_killed_and_continued_on_the_real_model(finished: RunResult, tmp_path: Path) -> None:
    """kill -9 between two samples of a real run, rerun with the same command: the same files."""
    code = "import sys; from tests.test_eval_scenes import FEW, SMOKE, run_config; "
    code += "run_config(SMOKE, {**FEW, 'output': sys.argv[1], 'report': False})"
    command = [sys.executable, "-c", code, str(tmp_path)]
    child = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 300
    while lines(tmp_path) < 7 and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    assert 7 <= lines(tmp_path) < lines(finished.folder)
    subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
    assert unmeasured(tmp_path)["config"]["report"] is False
    compare(tmp_path, finished.folder, ignore=("output", "report"))
