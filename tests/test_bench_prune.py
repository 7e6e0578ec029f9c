"""One miniature run of the pruning bench: every case, its arithmetic, its table."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from rich.console import Console

import vlm_attn
from vlm_attn import ops
from vlm_attn.bench import memory, overview, prune, report, setup, turns

MINI = setup.Shape("mini", layers=8, heads=4, kv_heads=4, visual=144, text=12, hidden=32, inner=64)


@pytest.fixture(scope="module")
def said() -> dict:
    patch = pytest.MonkeyPatch()
    patch.setitem(prune.SHAPES, "mini", MINI)
    patch.setattr(memory, "peak", lambda run, device: 1 << 20)  # forked runs are slow, and tested elsewhere
    ticks: list[int] = []
    try:
        out = prune.run_prune(["mini"], rounds=1, steps=2, tick=lambda: ticks.append(1))
        assert len(ticks) == prune.prune_ticks(["mini"], 1)
    finally:
        patch.undo()
    return out


def test_every_pruning_method_has_a_row(said: dict) -> None:
    wanted = {row.name for row in vlm_attn.methods() if row.stage == "prune"}
    assert {case.method.name for case in prune.cases(MINI) if case.method} == wanted
    assert len(said["shapes"][0]["rows"]) == len(prune.cases(MINI))
    assert json.loads(json.dumps(said))["bench"] == "prune"


def test_figures_follow_from_the_lengths(said: dict) -> None:
    rows = {row["case"]: row for row in said["shapes"][0]["rows"]}
    assert rows[overview.CONTROL]["equivalent_tokens"] == 144
    assert rows[overview.CONTROL]["flops_ideal"] == 1
    assert rows["random_prune"]["visual_tokens_per_layer"] == [16] * 8
    assert rows["fastv"]["visual_tokens_per_layer"] == [144] * 2 + [16] * 6
    assert rows["fastv"]["equivalent_tokens"] == 48
    assert rows[prune.SHORT]["flops_ideal"] == rows["random_prune"]["flops_ideal"]
    assert rows["tome"]["equivalent_tokens"] < 60
    for row in rows.values():
        assert row["of_ideal_speedup"] == pytest.approx(row["flops_ideal"] / row["prefill"]["ratio"])
        assert 0 <= row["scoring"]["median_s"] < row["prefill"]["median_s"]
        assert (row["scoring"]["median_s"] > 0) is (row["case"] != prune.SHORT)
        assert row["decode"]["ratio"] > 0
        assert row["end_to_end"]["ratio"] > 0


def test_on_a_gpu_readers_of_attention_run_with_and_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The protocol of a GPU on what is at hand: bf16, stock around the cases, choosing in a prefill of its own."""
    monkeypatch.setattr(setup, "machine", lambda gpu: setup.Machine("cpu", torch.bfloat16, 1, queued=gpu))
    monkeypatch.setattr(prune, "GPU_SHAPES", {"mini": MINI})
    monkeypatch.setattr(memory, "peak", lambda run, device: [run(), 1 << 20][1])
    run, readers, by_torch = prune.run_case, set(), set()

    def run_case(trial: turns.Trial, shape: setup.Shape, case: prune.Case) -> turns.Taken:
        mass, reference = ops.key_mass, ops.key_mass_reference
        with monkeypatch.context() as patch:
            patch.setattr(ops, "key_mass", lambda *args, **kwargs: [readers.add(case.name), mass(*args, **kwargs)][1])
            patch.setattr(ops, "key_mass_reference", lambda *args: [by_torch.add(case.name), reference(*args)][1])
            taken = run(trial, shape, case)
        return taken

    monkeypatch.setattr(prune, "run_case", run_case)
    ticks: list[int] = []
    said = prune.run_prune(gpu=True, rounds=1, steps=2, tick=lambda: ticks.append(1))
    assert len(ticks) == prune.prune_ticks((), 1, gpu=True)
    assert said["env"]["dtype"] == "bfloat16"
    rows = {row["case"]: row for row in said["shapes"][0]["rows"]}
    alone = {f"{name}, no kernel" for name in prune.KERNEL_READERS}
    assert by_torch == alone
    assert readers == alone | {*prune.KERNEL_READERS, overview.CONTROL, "fastv auto"}
    for name in alone:
        assert rows[name]["flops_ideal"] == rows[name.removesuffix(", no kernel")]["flops_ideal"]
    for row in rows.values():
        assert [row["of_ideal_bar"], row["decode"]["bar"], row["scoring"]["bar"]] == [None] * 3
        assert (row["scoring"]["median_s"] > 0) is (row["case"] != prune.SHORT)
        assert row["prefill"]["ratio"] > 0
        assert row["end_to_end"]["ratio"] > 0


def test_the_clock_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[int] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append(1))
    setup.CPU.clock("wall")()
    assert not waited
    setup.Machine("cuda", torch.bfloat16, None, queued=True).clock("wall")()
    assert waited


@pytest.mark.gpu
def test_a_miniature_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prune, "GPU_SHAPES", {"mini": dataclasses.replace(MINI, hidden=256)})
    said = prune.run_prune(gpu=True, rounds=1, steps=2, only=["spatten"])
    rows = {row["case"]: row for row in said["shapes"][0]["rows"]}
    assert rows["spatten"]["equivalent_tokens"] == pytest.approx(
        rows["spatten, no kernel"]["equivalent_tokens"], rel=0.1
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_shapes_need_a_gpu() -> None:
    with pytest.raises(ValueError, match="no CUDA device"):
        prune.run_prune(gpu=True)


def test_table_shows_every_row(said: dict) -> None:
    console = Console(width=300, record=True)
    report.print_report(said, console)
    text = console.export_text()
    for row in said["shapes"][0]["rows"]:
        assert row["case"] in text
    assert "vlm_attn/flops.py" in text
    assert "s of stock's vision tower" in " ".join(text.split())


def test_the_vision_tower_comes_off_on_both_sides() -> None:
    case = prune.cases(MINI)[2]
    case.taken = [turns.Taken(1.5, 0.1, 0.1, 0.0, {"per_layer": [16] * 8})]
    case.around = [(turns.Taken(4.5), turns.Taken(4.5))]
    short = prune.cases(MINI)[1]
    short.taken, short.around = case.taken, case.around
    rows = [prune._row(MINI, one, 2, 0.5, 4.0, None) for one in (case, short)]
    assert [row["prefill"]["ratio"] for row in rows] == pytest.approx([1.0 / 4.0, 1.5 / 4.0])  # text passes no tower
    assert rows[0]["end_to_end"]["ratio"] == pytest.approx(1.7 / 4.7)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown pruning method 'var'"):
        prune.run_prune(only=["var"])
    with pytest.raises(ValueError, match="unknown bench shape 'wide'"):
        prune.run_prune(["wide"])
