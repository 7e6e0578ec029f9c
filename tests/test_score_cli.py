"""``vlm-attn score``: one JSON document, tables, exit codes."""

from __future__ import annotations

import inspect
import json
import re
from importlib import import_module
from pathlib import Path

import pytest

from tests.score_files import write_lines
from vlm_attn.cli import main
from vlm_attn.evaluation.scorers import SCORERS

QUESTION = {
    "question_id": 1,
    "image": "COCO_val2014_000000000042.jpg",
    "text": "Is there a dog in the image?",
    "label": "yes",
}


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["score", *arguments])
    return int(stop.value.code or 0)


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    write_lines(tmp_path / "coco_pope_random.jsonl", [QUESTION])
    answers = write_lines(tmp_path / "answers.jsonl", [{"question_id": 1, "text": "Yes."}])
    return ["pope", "--answers", str(answers), "--data", str(tmp_path)]


def test_json_and_samples(files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out" / "samples.jsonl"
    assert run(*files, "--json", "--output", str(output), "--set", "parser=strict") == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["metrics"]["accuracy"], result["settings"]["parser"]) == (0, "strict")
    assert result["details"]["coco random"]["parsers"]["pope"]["accuracy"] == 1
    assert set(result["files"]) == {"coco_pope_random.jsonl", "answers.jsonl"}
    assert json.loads(output.read_text())["prediction"] == "unknown"


def test_table(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*files) == 0
    out = capsys.readouterr().out
    assert "pope, n = 1" in out
    assert "100.0" in out


def test_mistakes_give_one_line_and_exit_code_2(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    write_lines(Path(files[2]), [{"question_id": 2, "text": "Yes."}])
    assert run(*files, "--json") == 2
    captured = capsys.readouterr()
    assert "belong to no question" in json.loads(captured.out)["error"]
    assert len(captured.err.strip().splitlines()) == 1
    assert run("popee", *files[1:]) == 2
    assert "Did you mean 'pope'" in capsys.readouterr().err
    assert run(*files, "--set", "splt=random") == 2
    assert "Did you mean 'split'" in capsys.readouterr().err


def test_the_commands_of_the_scoring_page() -> None:
    """Every benchmark and option named there exists."""
    page = (Path(__file__).parents[1] / "docs" / "scoring.md").read_text(encoding="utf-8")
    lines = re.findall(r"^vlm-attn score (\w+) (.*)$", page, re.MULTILINE)
    assert {name for name, _ in lines} == set(SCORERS)
    for name, rest in lines:
        known = inspect.signature(import_module(f"vlm_attn.evaluation.scorers.{name}").score).parameters
        assert set(re.findall(r"--set (\w+)=", rest)) <= known.keys()
