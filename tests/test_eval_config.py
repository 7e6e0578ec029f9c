"""Evaluation configs: precedence, closest matches, refusals, and what ships with the package."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlm_attn.evaluation.config import ConfigError, build_config, load_config, method_hash

SHIPPED = sorted((Path(__file__).resolve().parents[1] / "eval_configs").glob("*.yaml"))
MINIMAL = {"benchmarks": ["scenes_chair"]}


def test_defaults_and_the_implied_baseline() -> None:
    config = build_config({**MINIMAL, "methods": ["noop"]})
    assert [m.label for m in config.methods] == ["baseline", "noop"]
    assert (config.model, config.batch_size, config.seed, config.parser) == ("scenes", 1, 0, "pope")
    assert build_config({**MINIMAL, "methods": ["noop", "baseline"]}).methods[0].is_baseline
    assert build_config({**MINIMAL, "methods": "fastv"}).methods[1].spec() == {"name": "fastv"}


def test_command_line_beats_file_beats_defaults(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("benchmarks: [scenes_chair]\nlimit: 7\nseed: 3\n")
    config = load_config(path, {"limit": 9, "model": None})
    assert (config.limit, config.seed, config.batch_size, config.model) == (9, 3, 1, "scenes")
    assert config.output == "runs/mine"


def test_methods_with_parameters_and_pipelines() -> None:
    config = build_config(
        {
            **MINIMAL,
            "methods": [
                {"name": "fastv", "params": {"layer": 3}, "label": "fastv at 3"},
                {"pipeline": ["fastv", {"name": "var"}]},
            ],
        }
    )
    assert [m.label for m in config.methods] == ["baseline", "fastv at 3", "fastv+var"]
    assert config.methods[1].spec() == {"name": "fastv", "layer": 3}
    assert config.methods[2].spec() == [{"name": "fastv"}, {"name": "var"}]
    assert build_config(config.resolved()) == config
    assert method_hash(config.methods[1].spec()) != method_hash({"name": "fastv"})


def test_a_sweep_is_one_column_per_point() -> None:
    entry = {
        "label": "two stages",
        "name": "himap",
        "params": {"layers": [1, 2]},
        "sweep": {"keep": [[0.5, 0.125], [0.2, 0.1]], "sigma": [0.1, 0.2]},
    }
    config = build_config({**MINIMAL, "methods": [{"name": "fastv", "sweep": {"keep": [0.5, 24]}}, entry]})
    assert [m.label for m in config.methods] == [
        "baseline",
        "fastv keep=0.5",
        "fastv keep=24",
        "two stages keep=0.5+0.125, sigma=0.1",
        "two stages keep=0.2+0.1, sigma=0.2",
    ]
    assert [m.series for m in config.methods] == ["", "fastv", "fastv", "two stages", "two stages"]
    assert config.methods[2].spec() == {"name": "fastv", "keep": 24}
    assert config.methods[4].spec() == {"name": "himap", "layers": [1, 2], "keep": [0.2, 0.1], "sigma": 0.2}
    assert build_config(config.resolved()) == config


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"name": "fastv", "sweep": {}}, "sweep"),
        ({"name": "fastv", "sweep": {"keep": []}}, "sweep.keep"),
        ({"name": "fastv", "sweep": {"keep": 0.5}}, "sweep.keep"),
        ({"name": "fastv", "sweep": {"keep": [0.5, 0.5]}}, "occurs twice"),
        ({"name": "fastv", "sweep": {"keep": [0.5, 0.2], "layer": [1]}}, "lists of one length, got keep: 2, layer: 1"),
        ({"name": "fastv", "params": {"keep": 1}, "sweep": {"keep": [0.5]}}, "given in `params` and in `sweep`"),
        ({"name": "fastv", "sweep": {"keep": ["a/b"]}}, "Label 'fastv keep=a/b'"),
        ({"name": "baseline", "sweep": {"keep": [0.5]}}, "other than the baseline"),
        ({"pipeline": ["fastv", "vcd"], "sweep": {"keep": [0.5]}}, "one method"),
        ({"pipeline": [{"name": "fastv", "sweep": {"keep": [0.5]}}]}, "entries of a pipeline"),
        ({"name": "fastv", "series": "a/b"}, "Series 'a/b'"),
    ],
)
def test_mistakes_in_sweeps_are_named(entry: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_config({**MINIMAL, "methods": [entry]})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({**MINIMAL, "batchsize": 2}, "Did you mean 'batch_size'"),
        ({**MINIMAL, "methods": [{"name": "fastv", "parms": {}}]}, "Did you mean 'params'"),
        ({"benchmarks": [{"name": "x", "limmit": 3}]}, "Did you mean 'limit'"),
        ({**MINIMAL, "limit": 0}, "limit"),
        ({**MINIMAL, "limit": "many"}, "limit"),
        ({**MINIMAL, "seed": -1}, "seed"),
        ({**MINIMAL, "seed": float("nan")}, "seed"),
        ({**MINIMAL, "dtype": "int4"}, "dtype"),
        ({**MINIMAL, "device": "../../etc"}, "device"),
        ({"benchmarks": []}, "benchmarks"),
        ({}, "benchmarks"),
        ({"benchmarks": ["../secret"]}, "not a task name"),
        ({"benchmarks": ["a", "a"]}, "occurs twice"),
        ({**MINIMAL, "methods": ["fastv", "fastv"]}, "its own `label`"),
        ({**MINIMAL, "methods": [{"name": "baseline", "params": {"a": 1}}]}, "no parameters"),
        ({**MINIMAL, "methods": [{"label": "x"}]}, "either `name` or `pipeline`"),
        ({**MINIMAL, "methods": [{"name": "a", "label": "a/b"}]}, "Label"),
        ({**MINIMAL, "methods": [3]}, "name or a mapping"),
    ],
)
def test_mistakes_are_named(data: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_config(data)


def test_all_problems_at_once() -> None:
    with pytest.raises(ConfigError, match=r"3 problem"):
        build_config({**MINIMAL, "limit": 0, "seed": -1, "warmup": -1})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- a\n- b\n", "mapping"),
        ("a: [1", "not valid YAML"),
        ("x: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
        ("\x00", "not valid YAML"),
    ],
)
def test_bad_files(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        load_config(path)


def test_missing_or_foreign_files(tmp_path: Path) -> None:
    (tmp_path / "quickstart.yaml").write_text("")
    with pytest.raises(ConfigError, match="Did you mean 'quickstart.yaml'"):
        load_config(tmp_path / "quikstart.yaml")
    with pytest.raises(ConfigError, match=r"\.yaml file"):
        load_config(tmp_path / "notes.txt")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_configs(path: Path) -> None:
    """Each one validates (methods and benchmarks by name as well) and says in its header how to launch it."""
    from vlm_attn.evaluation import validate_config

    resolved = validate_config(path)
    assert resolved["methods"][0]["label"] == "baseline"
    assert build_config(resolved).resolved() == resolved  # the saved config repeats the run
    header = path.read_text().split("\nmodel:")[0]
    assert f"vlm-attn eval eval_configs/{path.name}" in header


def test_unknown_method_and_parameter_and_benchmark_are_found_before_the_run(tmp_path: Path) -> None:
    from vlm_attn.evaluation import validate_config

    path = tmp_path / "c.yaml"
    path.write_text("benchmarks: [scenes_chair]\nmethods: [fastvv, {name: fastv, params: {layr: 3}, label: b}]\n")
    with pytest.raises(ConfigError) as caught:
        validate_config(path)
    assert "did you mean 'fastv'" in str(caught.value)
    assert "did you mean 'layer'" in str(caught.value)


def test_unknown_benchmark_is_found_before_the_run(tmp_path: Path) -> None:
    from vlm_attn.evaluation import validate_config

    path = tmp_path / "c.yaml"
    path.write_text("benchmarks: [scenes_pope_popularr]\n")
    with pytest.raises(ConfigError, match="Did you mean 'scenes_pope_popular'"):
        validate_config(path)


def test_catalogue_lists_what_ships() -> None:
    from vlm_attn.evaluation import benchmarks
    from vlm_attn.evaluation.runner import local_tasks

    drawn = [row.name for row in benchmarks() if not row.name.startswith("local_")]
    assert sorted(drawn) == local_tasks()
    assert {row.n for row in benchmarks() if "pope" in row.name} == {3000, 2910}


def test_importing_the_package_is_light() -> None:
    import subprocess
    import sys

    code = "import sys, vlm_attn.evaluation as e; e.load_config; print([m for m in ('torch', 'lmms_eval', 'datasets') "
    code += "if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
