"""What a method costs: paired, interleaved, single-thread timings on a random-weight LLaVA, next to what FLOPs allow.

Only the language model is timed: picture features are computed beforehand, one logit row is asked for. Every round
times every configuration once, in rotating order, and each timing is divided by stock's of the same round. A pruning
session that keeps every token is timed along: where it does not land within 5 % of stock, the run is void.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

from transformers import LlavaForConditionalGeneration

from ..flops import prefill_flops
from ..registry import method
from ..session import Session, attach
from ..stages import Method
from . import setup
from .setup import CLOCKS, CONTROL_TOLERANCE, SINK_DIMS, Request, Shape, spread

BARS = {"fastv": 0.88, "var": 1.15, "vhr": 1.05, "decode": 1.15}
PRUNE_LAYER, KEEP = 2, 64
CONTROL = "keep-all control"

SHAPES = {
    "deep": Shape("deep", layers=12, heads=16, kv_heads=16, visual=576, text=64),
    "long": Shape("long", layers=4, heads=16, kv_heads=4, visual=2304, text=64),
}


# --------------------------------------------------------------------------------------------------------- FLOPs


def ideal_ratio(shape: Shape, per_layer: Sequence[int]) -> float:
    """Prefill FLOPs with pruned layer lengths over those of the whole prompt (causal attention counted)."""
    share = shape.kv_heads / shape.heads
    whole = prefill_flops([shape.tokens] * shape.layers, shape.hidden, shape.inner, share, causal=True)
    return prefill_flops(per_layer, shape.hidden, shape.inner, share, causal=True) / whole


@dataclass
class Config:
    """One line of the table: a method (or none) and the tokens each layer processes under it."""

    name: str
    method: Method | None
    per_layer: list[int]
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    text_pass: list[float] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


def configurations(shape: Shape, tau: float) -> list[Config]:
    """Stock, the keep-all control and the three methods of the table."""
    whole = [shape.tokens] * shape.layers
    pruned = [shape.tokens if layer < PRUNE_LAYER else shape.text + KEEP for layer in range(shape.layers)]
    return [
        Config("stock", None, whole),
        Config(CONTROL, method("fastv", layer=PRUNE_LAYER, keep=shape.visual), whole),
        Config(f"fastv {KEEP}", method("fastv", layer=PRUNE_LAYER, keep=KEEP), pruned),
        Config("var", method("var", sink_dims=SINK_DIMS, tau=tau), whole),
        Config("vhr", method("vhr"), whole),
    ]


def _facts(session: Session) -> dict[str, Any]:
    last = session.last
    return {
        "visual_tokens_per_layer": last.kept_per_layer(session.info.layers)[0].tolist(),
        "edited_rows_per_layer": {str(layer): count for layer, count in last.edited.items()},
        "scaled_heads_per_layer": {str(layer): int((f[0] != 1).sum()) for (_, layer), f in last.factors.items()},
    }


def _time_one(
    model: LlavaForConditionalGeneration,
    job: Request,
    config: Config,
    steps: int,
    now: Callable[[], float],
    record: bool,
) -> None:
    with attach(model, config.method) if config.method is not None else nullcontext() as session:
        start = now()
        cache = setup.prefill(model, job)
        middle = now()
        setup.decode(model, job, cache, steps)
        end = now()
        if record:
            config.prefill.append(middle - start)
            config.decode.append((end - middle) / steps)
        if session is not None:
            config.facts = _facts(session)
    if record and config.facts.get("scaled_heads_per_layer"):
        start = now()
        setup.prefill(model, job, text_only=True)
        config.text_pass.append(now() - start)


def bench_shape(
    shape: Shape,
    rounds: int = 7,
    steps: int = 8,
    threads: int = 1,
    clock: str = "wall",
    tick: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Times one shape; see the module's first lines for the protocol.

    Args:
        shape: model and prompt.
        rounds: timed rounds, after one that warms up.
        steps: decode steps per configuration and round.
        threads: CPU threads of torch.
        clock: `"wall"`, or `"cpu"` (time of this process only).
        tick: called after every configuration.
    """
    with setup.quiet(threads):
        model = setup.build(shape)
        job = setup.request(model, shape)
        tau = setup.sink_threshold(model, job)
        configs = configurations(shape, tau)
        for number in range(rounds + 1):
            first = number % len(configs)
            for config in configs[first:] + configs[:first]:
                _time_one(model, job, config, steps, CLOCKS[clock], record=number > 0)
                tick()
    return _report(shape, configs, {"sink_dims": list(SINK_DIMS), "tau": tau})


def _report(shape: Shape, configs: list[Config], sinks: dict[str, Any]) -> dict[str, Any]:
    stock = configs[0]
    rows: list[dict[str, Any]] = []
    for config in configs:
        ideal = ideal_ratio(shape, config.per_layer)
        prefill = spread(config.prefill, stock.prefill)
        row: dict[str, Any] = {
            "config": config.name,
            "method": config.method.to_dict() if config.method is not None else None,
            "prefill": prefill,
            "decode": spread(config.decode, stock.decode),
            "flops_ideal": ideal,
            "of_ideal_speedup": ideal / prefill["ratio"],
            "facts": config.facts,
        }
        if config.text_pass:
            rest = [v - t for v, t in zip(config.prefill, config.text_pass, strict=True)]
            row["text_only_pass_s"] = statistics.median(config.text_pass)
            row["prefill_without_text_pass"] = spread(rest, stock.prefill)
        rows.append(row)
    control = next(r for r in rows if r["config"] == CONTROL)
    off = max(abs(control["prefill"]["ratio"] - 1), abs(control["decode"]["ratio"] - 1))
    return {
        "shape": asdict(shape),
        "sinks": sinks,
        "rows": rows,
        "control_off_by": off,
        "valid": off <= CONTROL_TOLERANCE,
        "bars": _bars(rows),
    }


def _bars(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    by_name = {row["config"].split()[0]: row for row in rows}
    bars = [
        ("fastv: share of the FLOPs-ideal speed-up", by_name["fastv"]["of_ideal_speedup"], ">=", BARS["fastv"]),
        ("var: prefill over stock", by_name["var"]["prefill"]["ratio"], "<=", BARS["var"]),
        (
            "vhr: prefill less its text-only pass over stock",
            by_name["vhr"]["prefill_without_text_pass"]["ratio"], "<=", BARS["vhr"],
        ),
        ("var: decode over stock", by_name["var"]["decode"]["ratio"], "<=", BARS["decode"]),
        ("vhr: decode over stock", by_name["vhr"]["decode"]["ratio"], "<=", BARS["decode"]),
    ]  # fmt: skip
    return [
        {"what": what, "value": value, "bar": f"{sign} {bar}", "met": value >= bar if sign == ">=" else value <= bar}
        for what, value, sign, bar in bars
    ]


def run_bench(
    shapes: Sequence[str] = ("deep", "long"),
    *,
    rounds: int = 7,
    steps: int = 8,
    threads: int = 1,
    clock: str = "wall",
    tick: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Times the named shapes.

    Args:
        shapes: names out of `SHAPES`.
        rounds: timed rounds per shape.
        steps: decode steps per configuration and round.
        threads: CPU threads; 1 is the protocol.
        clock: `"wall"` is the protocol; `"cpu"` counts this process only, for machines that do other work as well.
        tick: called `ticks(shapes, rounds)` times in all, for a progress bar.

    Returns:
        JSON-ready dict: `env`, `protocol`, `shapes` (rows, bars, control), `valid`.
    """
    setup.check(shapes, list(SHAPES), clock, rounds=rounds, steps=steps, threads=threads)
    results = [bench_shape(SHAPES[name], rounds, steps, threads, clock, tick) for name in shapes]
    return {
        "format": 1,
        "env": setup.environment(),
        "protocol": {"rounds": rounds, "decode_steps": steps, "threads": threads, "clock": clock, "warm_up_rounds": 1},
        "shapes": results,
        "valid": all(result["valid"] for result in results),
    }


def ticks(shapes: Sequence[str], rounds: int) -> int:
    """How often `run_bench` calls `tick`."""
    return len(shapes) * (rounds + 1) * 5
