"""lmms-eval's own command line with our model class gives the figures of `vlm-attn eval`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

pytest.importorskip("lmms_eval")

from vlm_attn.evaluation.config import build_config
from vlm_attn.evaluation.runner import TASK_FOLDER, run

LIMIT = 4
METHOD = {"name": "vcd", "alpha": 0.5}


@pytest.mark.slow
def test_the_command_line_of_lmms_eval_gives_our_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shipped model with a method that draws random noise, so that the seeds must agree too."""
    from lmms_eval.__main__ import cli_evaluate

    ours = run(
        build_config(
            {
                "methods": [{"name": "vcd", "params": {"alpha": 0.5}}], "benchmarks": ["scenes_mme", "scenes_chair"],
                "limit": LIMIT, "warmup": 0, "dtype": "float32", "device": "cpu", "max_new_tokens": 16,
                "resamples": 100, "report": False, "quiet": True, "output": str(tmp_path / "ours"),
            }
        )
    )  # fmt: skip
    for name, value in os.environ.items():
        monkeypatch.setenv(name, value)  # lmms-eval sets variables of its own; all are put back
    method = json.dumps(METHOD)
    arguments = ["--model", "vlm_attn", "--model_args",
                 f"pretrained=scenes,method='{method}',dtype=float32,max_new_tokens=16", "--device", "cpu", "--tasks",
                 "scenes_mme,scenes_chair", "--include_path", str(TASK_FOLDER), "--limit", str(LIMIT), "--batch_size",
                 "1", "--log_samples", "--output_path", str(tmp_path / "theirs"), "--verbosity", "DEBUG"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["lmms-eval", *arguments])
    cli_evaluate()
    theirs = json.loads(next((tmp_path / "theirs").rglob("*_results.json")).read_text())
    figures = ours.results["results"]["vcd"]
    assert not ours.failed
    for task in ("scenes_mme", "scenes_chair"):
        numbers = {name: value for name, value in figures[task].items() if isinstance(value, float)}
        assert numbers, task
        for name, value in numbers.items():
            assert theirs["results"][task][name] == pytest.approx(value), (task, name)
    said = [json.loads(line) for path in sorted((tmp_path / "theirs").rglob("*scenes_chair*.jsonl"))
            for line in path.read_text().splitlines()]  # fmt: skip
    kept = [json.loads(line) for line in (tmp_path / "ours" / "samples.jsonl").read_text().splitlines()]
    captions = [row["text"] for row in kept if row["task"] == "scenes_chair" and row["method"] == "vcd"]
    assert [row["filtered_resps"] for row in sorted(said, key=lambda row: int(row["doc_id"]))] == captions
    assert len(captions) == LIMIT
