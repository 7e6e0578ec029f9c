"""The bench's arithmetic against published FLOP ratios, and one miniature run of its protocol."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from rich.console import Console

import vlm_attn
from vlm_attn import bench
from vlm_attn.bench import edits, memory, overview, paired, report, setup, turns
from vlm_attn.flops import prefill_flops

LLAVA = {"hidden": 4096, "inner": 11008}
TEXT, VISUAL, LAYERS = 60, 576, 32


def ratio(visual_per_layer: list[float]) -> float:
    whole = prefill_flops([TEXT + VISUAL] * LAYERS, **LLAVA)
    return prefill_flops([TEXT + v for v in visual_per_layer], **LLAVA) / whole


@pytest.mark.parametrize(
    ("per_layer", "expected"),
    [
        ([576] * 2 + [288] * 30, 0.570),  # FastV, K=2, R=50 %
        ([576] * 8 + [288] * 8 + [144] * 8 + [72] * 8, 0.515),  # PyramidDrop, halving at 8, 16, 24
        ([192] * 32, 0.390),
        ([128] * 32, 0.290),
        ([64] * 32, 0.191),
    ],
)
def test_flop_oracles(per_layer: list[float], expected: float) -> None:
    assert ratio(per_layer) == pytest.approx(expected, abs=6e-4)


def test_ideal_ratios_of_the_two_shapes() -> None:
    """0.33 and 0.52 are the figures of the prototype whose shapes these are."""
    for name, expected in (("deep", 0.33), ("long", 0.52)):
        shape = bench.SHAPES[name]
        lengths = [shape.tokens] * 2 + [shape.text + 64] * (shape.layers - 2)
        assert bench.ideal_ratio(shape, lengths) == pytest.approx(expected, abs=6e-3)
        assert bench.ideal_ratio(shape, [shape.tokens] * shape.layers) == 1


def test_unknown_shape_and_empty_protocol_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown bench shape 'wide'"):
        bench.run_bench(["wide"])
    with pytest.raises(ValueError, match="rounds=0"):
        bench.run_bench(["deep"], rounds=0)


def test_miniature_run(monkeypatch: pytest.MonkeyPatch) -> None:
    mini = bench.Shape("mini", layers=4, heads=4, kv_heads=2, visual=100, text=12, hidden=32, inner=64)
    monkeypatch.setitem(bench.SHAPES, "mini", mini)
    seen: list[int] = []
    said = bench.run_bench(["mini"], rounds=2, steps=2, tick=lambda: seen.append(1))
    assert len(seen) == bench.ticks(["mini"], 2)
    json.dumps(said)
    rows = {row["config"]: row for row in said["shapes"][0]["rows"]}
    assert list(rows)[:2] == ["stock", bench.CONTROL]
    assert rows["stock"]["prefill"]["ratio"] == 1
    assert rows["fastv 64"]["flops_ideal"] < rows[bench.CONTROL]["flops_ideal"] == 1
    assert rows["vhr"]["text_only_pass_s"] > 0
    assert rows["fastv 64"]["facts"]["visual_tokens_per_layer"] == [100, 100, 64, 64]
    assert rows[bench.CONTROL]["facts"]["visual_tokens_per_layer"] == [100] * 4
    assert sum(rows["var"]["facts"]["edited_rows_per_layer"].values()) > 0
    assert rows["vhr"]["facts"]["scaled_heads_per_layer"]
    console = Console(record=True, width=160)
    bench.print_report(said, console)
    text = console.export_text()
    assert "fastv 64" in text
    assert ("VOID" in text) == (not said["valid"])


def test_a_loud_control_voids_the_run() -> None:
    def config(name: str, seconds: float) -> overview.Config:
        return overview.Config(name, None, [128] * 12, prefill=[seconds] * 3, decode=[seconds] * 3)

    names = ("stock", bench.CONTROL, "fastv 64", "var", "vhr")
    for control, valid in ((1.04, True), (1.06, False), (0.94, False)):
        configs = [config(n, control if n == bench.CONTROL else 1.0) for n in names]
        configs[-1].text_pass = [0.1] * 3
        assert overview._report(bench.SHAPES["deep"], configs, {})["valid"] is valid


# ---------------------------------------------------------------------------------------------------------- edits


def test_miniature_run_of_all_edits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every edit method of the registry stands in the table and did something; whole answers come with them."""
    mini = bench.Shape(
        "mini", layers=4, heads=4, kv_heads=2, visual=100, text=12, hidden=32, inner=64, pictures=4
    )  # fmt: skip
    monkeypatch.setitem(edits.SHAPES, "mini", mini)
    monkeypatch.setattr(memory, "peak", lambda run, device: run() and 1000)
    seen: list[int] = []
    said = bench.run_edits(["mini"], rounds=1, steps=2, tick=lambda: seen.append(1))
    assert len(seen) == bench.edit_ticks(["mini"], 1)
    json.dumps(said)
    result = said["shapes"][0]
    rows = {row["case"]: row for row in result["rows"]}
    names = {row.name for row in vlm_attn.methods() if row.stage == "edit"} - {"placebo"}
    assert names <= {name.split()[0] for name in rows}
    for name, row in rows.items():
        facts = {key: value for key, value in row["facts"].items() if value}
        assert bool(facts) == (name not in (edits.CONTROL, edits.EAGER)), name
        assert row["memory"]["ratio"] == 1
    assert rows["vhr"]["prefill"]["bar"] is None
    assert rows["var"]["prefill"]["bar"] == 1.10
    assert {row["method"] for row in result["answers"]} == {"stock", "vhr", "pai", "ilvad"}
    console = Console(record=True, width=240)
    bench.print_report(said, console)
    text = console.export_text()
    assert "less its text-only pass" in text
    assert "whole answers of 3 tokens" in text


def test_a_case_is_compared_with_the_stock_runs_around_it() -> None:
    pace, order = iter([1.0, 1.0, 3.0, 3.0, 3.0, 3.0]), []

    def stock() -> turns.Taken:
        order.append("stock")
        return turns.Taken(next(pace), 1.0)

    def run(case: edits.Case) -> turns.Taken:
        order.append(case.name)
        return turns.Taken(2.0, 1.0, 1.0)

    found = [edits.Case(name, turns.Trial.run) for name in ("a", "b", "c")]
    paired.time_round(found, stock, run)
    assert order == ["stock", "a", "b", "stock", "c", "stock"]
    ratios = [edits._row(case, None, "cpu")["prefill"]["ratio"] for case in found]
    assert ratios == [2.0, 2.0, 1.0]


@pytest.mark.parametrize(("ratio", "valid"), [(1.04, True), (0.96, True), (1.06, False), (0.94, False)])
def test_a_loud_control_voids_the_edits(ratio: float, valid: bool) -> None:
    even = turns.Taken(1.0)
    control = edits.Case(edits.CONTROL, turns.Trial.run, taken=[turns.Taken(1.0, ratio, 1.0)], around=[(even, even)])
    result = edits._report(edits.SHAPES["deep"], [control], None, [], "cpu")
    assert result["valid"] is valid
    assert ("VOID" in report._edit_caption(result)) is not valid
    assert "not measured" in result["memory"]


def test_stock_steps_are_taken_on_the_same_weights_untouched_by_what_is_attached() -> None:
    shape = bench.Shape("tiny", layers=2, heads=2, kv_heads=2, visual=16, text=8, hidden=32, inner=48)
    model = setup.build(shape)
    job = setup.request(model, shape)
    now = iter(range(100)).__next__
    beside = turns.Stock(model, job, now)
    before = {name: value.data_ptr() for name, value in model.named_parameters()}
    assert {name: value.data_ptr() for name, value in beside.model.named_parameters()} == before
    trial = turns.Trial(model, job, 3, now, beside)
    taken = trial.run()
    # Two layers' turns of stock lie within the prefill: a tick between each two readings, less the time of its own.
    assert (taken.prefill, taken.decode) == (1 + 2, 1)
    assert (taken.stock.prefill, taken.stock.decode) == (2 + 1, 1)
    assert beside.cache is not None
    assert beside.cache.get_seq_length() == job.ids.shape[1] + 3
    with vlm_attn.attach(model, vlm_attn.method("vas_boost", image=0.5)) as session:
        dataclasses.replace(trial, steps=1).run()
        assert beside.cache.get_seq_length() == job.ids.shape[1] + 1
        assert session.last.seen == job.ids.shape[1] + 1


def test_peak_memory_of_a_forked_run() -> None:
    small, large = (bench_peak(count) for count in (1, 64))
    if small is None or large is None:
        pytest.skip("no /proc here")
    assert 50 * 2**20 < large - small < 80 * 2**20
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        memory.peak(lambda: 1 / 0, "cpu")


def bench_peak(mebibytes: int) -> int | None:
    return memory.peak(lambda: torch.ones(mebibytes * 2**18), "cpu")


def test_edits_refuse_what_they_do_not_know() -> None:
    for kwargs, message in (
        ({"shapes": ["wide"]}, "unknown bench shape 'wide'"),
        ({"shapes": ["7b-640"]}, "unknown bench shape"),
        ({"clock": "sun"}, "unknown clock"),
        ({"rounds": 0}, "at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            bench.run_edits(**kwargs)
    with pytest.raises(ValueError, match="unknown edit 'fastv'"):
        bench.edit_ticks((), 1, ["fastv"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_shapes_need_a_gpu() -> None:
    with pytest.raises(ValueError, match="no CUDA device"):
        bench.run_edits(gpu=True)
