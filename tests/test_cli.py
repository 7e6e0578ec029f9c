"""The command line: verbs, --json, errors in one line, overrides."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import vlm_attn
from vlm_attn import cli, evaluation

ROOT = Path(__file__).parent.parent


@dataclass
class Said:
    """Exit code and the two streams of one call."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        """Standard output as one JSON document."""
        return json.loads(self.out)


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*arguments: str) -> Said:
        with pytest.raises(SystemExit) as stop:
            cli.main(list(arguments))
        captured = capsys.readouterr()
        return Said(int(stop.value.code or 0), captured.out, captured.err)

    return call


def test_help_is_fast_because_it_loads_no_torch() -> None:
    code = "import sys, vlm_attn.cli as c; c._run(['--help'], False, False); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for verb in ("ls", "ask", "eval", "validate", "calibrate", "bench", "demo"):
        assert f" {verb} " in done.stdout


def test_an_unknown_public_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(AttributeError, match="it offers VLM"):
        vlm_attn.nothing  # noqa: B018


def test_version_and_no_verb(say: Any) -> None:
    assert say("--version").out.strip() == vlm_attn.__version__
    assert "Usage" in say().out


@pytest.mark.parametrize("what", ["methods", "families", "benchmarks"])
def test_ls(say: Any, what: str) -> None:
    rows = say("ls", what, "--json").json()
    table = say("ls", what)
    assert table.code == 0 and rows
    for row in rows:
        assert row["name"][:8] in table.out
    if what == "methods":
        assert [row["name"] for row in rows] == [row.name for row in vlm_attn.methods()]
        assert {"name", "stage", "summary", "paper", "needs"} <= set(rows[0])


def test_ask_answers_with_and_without_a_method(say: Any) -> None:
    plain = say("ask", "scene:19", "Describe this image.", "--max-new-tokens", "8")
    assert plain.code == 0 and plain.out.strip() and "visual tokens kept 100 of 100" in plain.err.replace("\n", " ")
    kept = say("ask", "scene:19", "Describe this image.", "--method", "fastv", "--set", "keep=24", "--json").json()
    assert kept["method"][0]["keep"] == 24 and kept["stats"]["kept_tokens"]["last"] == 24
    assert kept["answer"] and len(kept["stats"]["kept_cells"][0]) == 24


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ask", "nowhere.png", "hi"], "nowhere.png does not exist"),
        (["ask", "https://example.org/a.png", "hi"], "not fetched from addresses"),
        (["ask", str(ROOT / "LICENSE"), "hi"], "not a readable picture"),
        (["ask", "scene:1", "hi", "--method", "fastw"], "did you mean 'fastv'?"),
        (["ask", "scene:1", "hi", "--method", "fastv", "--set", "kep=3"], "did you mean 'keep'?"),
        (["ask", "scene:1", "hi", "--method", "fastv", "--set", "layer=99"], "layer=99"),
        (["ask", "scene:1", "hi", "--method", "fastv", "--set", "keep=.nan"], "keep"),
        (["ask", "scene:1", "hi", "--method", "fastv", "--set", "keep"], "KEY=VALUE"),
        (["ask", "scene:1", "hi", "--set", "keep=3"], "add --method NAME"),
        (["ask", "scene:1", "hi", "--method", "fastv", "--method", "vhr", "--set", "keep=3"], "METHOD.keep"),
        (["ask", "scene:1", "hi", "--method", "fastv", "--set", "vhr.alpha=3"], "no method 'vhr' is chosen"),
        (["ask", "scene:1", "hi", "--max-new-tokens", "0"], "max-new-tokens"),
        (["ls", "metods"], "metods"),
        (["eval", "quickstrat"], "did you mean 'quickstart.yaml'?"),
        (["validate", "nothing/there.yaml"], "does not exist"),
        (["calibrate", "scenes", "--for", "vcd"], "needs no calibration"),
        (["bench", "--shape", "round"], "unknown bench shape"),
        (["fly"], "No such command"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(say: Any, arguments: list[str], message: str) -> None:
    said = say(*arguments)
    assert said.code == 2 and message in said.err
    lines = [line for line in said.err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and "Traceback" not in said.err
    as_json = say(*arguments, "--json")
    assert as_json.code == 2 and message in as_json.json()["error"]


def test_debug_shows_where(say: Any) -> None:
    assert "Traceback" in say("ask", "nowhere.png", "hi", "--debug").err


def test_a_bug_is_no_user_error(say: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("inside")

    monkeypatch.setattr(cli, "listing", broken)
    said = say("ls", "methods")
    assert said.code == 1 and "RuntimeError: inside (--debug shows where)" in said.err


def test_a_missing_extra_is_named(say: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: Any, **__: Any) -> None:
        raise ModuleNotFoundError("No module named 'lmms_eval'", name="lmms_eval.api")

    monkeypatch.setattr(evaluation, "run_config", absent, raising=False)
    said = say("eval", "quickstart")
    assert said.code == 2 and 'pip install "vlm-attn[eval]"' in said.err


@dataclass
class Ran:
    """Stands in for the evaluation and remembers what it was asked."""

    calls: list[tuple[Path, dict[str, Any]]] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    processes: int = 0

    def __call__(self, path: Path, overrides: dict[str, Any], *, processes: int) -> Any:
        self.calls.append((path, overrides))
        self.processes = processes
        sys.stdout.write("a library talks\n")
        return SimpleNamespace(to_dict=lambda: {"score": float("nan"), "folder": Path("runs/x")}, failed=self.failed)


def test_eval_options_win_over_the_file(say: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = Ran()
    monkeypatch.setattr(evaluation, "run_config", ran, raising=False)
    said = say("eval", "quickstart", "--limit", "5", "-o", "elsewhere", "--set", "methods=[fastv]", "--json")
    assert said.code == 0 and said.json() == {"score": None, "folder": "runs/x"}
    path, overrides = ran.calls[0]
    assert path.name == "quickstart.yaml"
    assert overrides["output"] == "elsewhere" and overrides["methods"] == ["fastv"] and "model" not in overrides
    assert overrides["benchmarks"] and all(b["limit"] == 5 for b in overrides["benchmarks"])
    resolved = evaluation.load_config(path, overrides).resolved()
    assert [b["limit"] for b in resolved["benchmarks"]] == [5] * len(resolved["benchmarks"])
    ran.failed["vcd"] = "out of memory"
    assert say("eval", "quickstart", "--launch", "3").code == 1
    assert ran.processes == 3


def test_a_limit_keeps_what_else_a_benchmark_says() -> None:
    path = ROOT / "eval_configs" / "llava15_7b.yaml"
    overrides = cli.eval_overrides(path, {"limit": 4}, ["data=elsewhere"])
    chair = next(b for b in overrides["benchmarks"] if b["name"] == "local_chair")
    assert chair == {"name": "local_chair", "ids": "opera500", "limit": 4}
    assert overrides["data"] == "elsewhere"


@pytest.mark.parametrize("config", sorted((ROOT / "eval_configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_config_is_valid(say: Any, config: Path) -> None:
    said = say("validate", str(config), "--json")
    assert said.code == 0, said.err
    assert said.json()["valid"] is True and said.json()["config"]["benchmarks"]


def test_validate_says_what_is_wrong(say: Any, tmp_path: Path) -> None:
    for text, message in (
        ("benchmarks: [scenes_chair]\nmetods: [fastv]\n", "metods"),
        ("benchmarks: [scenes_chair]\nmethods: [{name: fastv, params: {layer: -1}}]\n", "layer"),
        ("benchmarks: [scenes_chair]\nmethods: [fastw]\n", "fastv"),
        ("benchmarks: !!python/object/apply:os.system ['true']\n", "YAML"),
    ):
        path = tmp_path / "config.yaml"
        path.write_text(text)
        said = say("validate", str(path))
        assert said.code == 2 and message in said.err, text


def test_calibrate_writes_a_profile(say: Any, tmp_path: Path) -> None:
    out = tmp_path / "profile.json"
    said = say("calibrate", "scenes", "--for", "fastv", "-n", "4", "-o", str(out), "--json")
    assert said.code == 0, said.err
    assert said.json()["profile"] == str(out) and json.loads(out.read_text())["entries"]
