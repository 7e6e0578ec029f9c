"""The bench's arithmetic against published FLOP ratios, and one miniature run of its protocol."""

from __future__ import annotations

import json

import pytest
from rich.console import Console

from vlm_attn import bench

LLAVA = {"hidden": 4096, "inner": 11008}
TEXT, VISUAL, LAYERS = 60, 576, 32


def ratio(visual_per_layer: list[float]) -> float:
    whole = bench.prefill_flops([TEXT + VISUAL] * LAYERS, **LLAVA)
    return bench.prefill_flops([TEXT + v for v in visual_per_layer], **LLAVA) / whole


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
    monkeypatch.setattr(bench, "SHAPES", {"mini": mini})
    seen: list[int] = []
    report = bench.run_bench(["mini"], rounds=2, steps=2, tick=lambda: seen.append(1))
    assert len(seen) == bench.ticks(["mini"], 2)
    json.dumps(report)
    rows = {row["config"]: row for row in report["shapes"][0]["rows"]}
    assert list(rows)[:2] == ["stock", bench.CONTROL]
    assert rows["stock"]["prefill"]["ratio"] == 1
    assert rows["fastv 64"]["flops_ideal"] < rows[bench.CONTROL]["flops_ideal"] == 1
    assert rows["vhr"]["text_only_pass_s"] > 0
    assert rows["fastv 64"]["facts"]["visual_tokens_per_layer"] == [100, 100, 64, 64]
    assert rows[bench.CONTROL]["facts"]["visual_tokens_per_layer"] == [100] * 4
    assert sum(rows["var"]["facts"]["edited_rows_per_layer"].values()) > 0
    assert rows["vhr"]["facts"]["scaled_heads_per_layer"]
    console = Console(record=True, width=160)
    bench.print_report(report, console)
    text = console.export_text()
    assert "fastv 64" in text
    assert ("VOID" in text) == (not report["valid"])


def test_a_loud_control_voids_the_run() -> None:
    def config(name: str, seconds: float) -> bench.Config:
        return bench.Config(name, None, [128] * 12, prefill=[seconds] * 3, decode=[seconds] * 3)

    names = ("stock", bench.CONTROL, "fastv 64", "var", "vhr")
    for control, valid in ((1.04, True), (1.06, False), (0.94, False)):
        configs = [config(n, control if n == bench.CONTROL else 1.0) for n in names]
        configs[-1].text_pass = [0.1] * 3
        assert bench._report(bench.SHAPES["deep"], configs, {})["valid"] is valid
