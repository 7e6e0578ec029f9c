"""Two result folders compared sample by sample, many on one page; what must not stand beside each other is refused."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lmms_eval")
pytest.importorskip("matplotlib")

from tests.eval_fakes import FakeBackend
from vlm_attn.evaluation.compare import compare_folders, comparison_table
from vlm_attn.evaluation.config import build_config
from vlm_attn.evaluation.folders import read_folder
from vlm_attn.evaluation.leaderboard import build_leaderboard, rows_of, write_leaderboard
from vlm_attn.evaluation.runner import run
from vlm_attn.evaluation.statistics import holm

TASKS = ["scenes_pope_random", "scenes_chair", "scenes_mme"]
HARMFUL = {"name": "fastv", "params": {"harm": 90}}


def made(folder: Path, **changes: Any) -> Path:
    settings = {"methods": [HARMFUL], "benchmarks": TASKS, "limit": 24, "warmup": 0, "resamples": 200, "quiet": True,
                "report": False, "output": str(folder), **changes}  # fmt: skip
    run(build_config(settings), FakeBackend())
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    root = tmp_path_factory.mktemp("runs")
    return str(made(root / "first")), str(made(root / "second", methods=[{**HARMFUL, "label": "mine"}]))


def test_one_run_against_itself_is_no_difference(folders: tuple[str, str]) -> None:
    result = compare_folders(folders[0], folders[0], resamples=100)
    assert [(pair["a"], pair["task"]) for pair in result["pairs"]] == [
        (label, task) for label in ("baseline", "fastv") for task in TASKS
    ]
    for pair in result["pairs"]:
        assert all(difference["value"] == 0 for difference in pair["difference"].values())
        assert pair["same_text"] == pair["p_holm"] == 1


def test_columns_by_name_give_the_paired_figures_of_a_run(folders: tuple[str, str]) -> None:
    """Baseline of one folder against the method of another: the comparison that one run makes within itself."""
    result = compare_folders(*folders, a="baseline", b="mine", resamples=200)
    inside = read_folder(folders[0]).results["paired"]["fastv"]
    for pair in result["pairs"]:
        assert pair["difference"] == inside[pair["task"]]["difference"]
        assert pair.get("mcnemar") == inside[pair["task"]].get("mcnemar")
    flipped = result["pairs"][0]["mcnemar"]
    assert flipped["gained"] + flipped["lost"] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"limit": 20}, r"other samples \(4 only in the first run, 0 only in the second\)"),
        ({"max_new_tokens": 4}, "other generation settings, sample 0"),
        ({"parser": "opera"}, "read by other parsers"),
        ({"benchmarks": ["scenes_pope_popular"]}, "no benchmark in common"),
    ],
)
def test_other_protocols_are_refused(
    folders: tuple[str, str], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    other = made(tmp_path / "other", **changes)
    with pytest.raises(ValueError, match=message):
        compare_folders(folders[0], str(other))


def test_another_prompt_or_truth_is_refused(folders: tuple[str, str], tmp_path: Path) -> None:
    other = made(tmp_path / "other")
    lines = (other / "samples.jsonl").read_text().splitlines()
    for key, message in (("prompt", "another prompt, sample 0"), ("doc_hash", "another question or truth")):
        rows = [json.loads(line) for line in lines]
        rows[0][key] += "?"
        (other / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        with pytest.raises(ValueError, match=message):
            compare_folders(folders[0], str(other))


def test_unfinished_and_foreign_folders(folders: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no results.json"):
        read_folder(tmp_path)
    with pytest.raises(ValueError, match=r"Did you mean 'fastv'"):
        compare_folders(folders[0], folders[0], a="fast")
    with pytest.raises(ValueError, match="column.*fastv"):
        compare_folders(folders[0], folders[1], a="fastv", b="fastv")
    cut = made(tmp_path / "cut")
    text = (cut / "samples.jsonl").read_text().splitlines(keepends=True)
    (cut / "samples.jsonl").write_text("".join(text[:-1]))
    with pytest.raises(ValueError, match="Run the config again"):
        read_folder(cut)
    (cut / "results.json").write_text("[1]")
    with pytest.raises(ValueError, match="not written by this program"):
        read_folder(cut)


def test_holm() -> None:
    assert holm([]) == []
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([0.2]) == [0.2]


def test_the_terminal_table(folders: tuple[str, str]) -> None:
    from rich.console import Console

    console = Console(record=True, width=200, file=io.StringIO())
    console.print(comparison_table(compare_folders(*folders, b="mine", a="fastv", resamples=100)))
    text = console.export_text()
    assert "fastv / mine" in text and "CHAIRi" in text and "Holm" in text


def test_the_leaderboard(folders: tuple[str, str], tmp_path: Path) -> None:
    other = made(tmp_path / "<b>other", limit=20)
    runs = [read_folder(path) for path in (*folders, other)]
    rows = rows_of(runs)
    assert len(rows) == 3 * 2 * 3
    groups = {(row["task"], row["protocol"]) for row in rows}
    assert len(groups) == 6  # three benchmarks; the run with other samples in tables of its own
    page = build_leaderboard(runs)
    assert page.count("<table>") == 6
    assert "&lt;b&gt;other" in page and "<b>other" not in page
    assert not re.search(r"<(script|link|iframe)|src=['\"]?http|@import", page)
    table = page[page.index("POPE random") :]
    best = [row for row in rows if row["task"] == TASKS[0] and row["n"] == 24]
    order = sorted(best, key=lambda row: (-row["metrics"]["f1"], row["method"]))
    assert re.findall(r"<td>\d+</td><td>([^<]+)</td>", table)[:4] == [row["method"] for row in order]
    assert all(("p_holm" in row) == (row["method"] != "baseline") for row in rows)
    assert write_leaderboard(tmp_path / "page.html", folders).read_text().startswith("<!doctype html>")
    with pytest.raises(ValueError, match="at least one"):
        write_leaderboard(tmp_path / "page.html", [])


def test_verbs(folders: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from vlm_attn.cli import main

    for arguments, key in (
        (["compare", folders[0], folders[1], "--a", "fastv", "--b", "mine", "--resamples", "100"], "pairs"),
        (["leaderboard", *folders, "-o", str(tmp_path / "board.html")], "rows"),
    ):
        with pytest.raises(SystemExit) as ended:
            main([*arguments, "--json"])
        assert not ended.value.code
        assert json.loads(capsys.readouterr().out)[key]
    with pytest.raises(SystemExit) as ended:
        main(["compare", str(tmp_path), folders[0]])
    assert ended.value.code == 2
