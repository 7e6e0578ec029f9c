"""What a method costs: paired, interleaved, single-thread timings on a random-weight LLaVA, next to what FLOPs allow.

Only the language model is timed: picture features are computed beforehand, one logit row is asked for. Every round
times every configuration once, in rotating order, and each timing is divided by stock's of the same round. A pruning
session that keeps every token is timed along: where it does not land within 5 % of stock, the run is void.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    DynamicCache,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    __version__,
)

from .flops import prefill_flops
from .registry import method
from .session import Session, attach
from .stages import Method

CONTROL_TOLERANCE = 0.05
BARS = {"fastv": 0.88, "var": 1.15, "vhr": 1.05, "decode": 1.15}
PRUNE_LAYER, KEEP = 2, 64
SINK_SHARE = 0.01  # of the visual tokens: the healthy range of published models ends near 5 %
CONTROL = "keep-all control"
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Shape:
    """A language model and a prompt: `visual` image tokens (a square number) and `text` others."""

    name: str
    layers: int
    heads: int
    kv_heads: int
    visual: int
    text: int
    hidden: int = 1024
    inner: int = 2816

    @property
    def tokens(self) -> int:
        """Prompt length."""
        return self.visual + self.text


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


# --------------------------------------------------------------------------------------------------------- model


def build(shape: Shape, seed: int = 0) -> LlavaForConditionalGeneration:
    """Random-weight LLaVA of this shape, fp32, sdpa, with a vision tower that is only there to give features."""
    side = round(shape.visual**0.5)
    if side * side != shape.visual:
        raise ValueError(f"{shape.name}: {shape.visual} visual tokens are not a square grid")
    text = LlamaConfig(
        vocab_size=1000, hidden_size=shape.hidden, intermediate_size=shape.inner, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, max_position_embeddings=8192,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=14 * side,
        patch_size=14, projection_dim=32,
    )  # fmt: skip
    torch.manual_seed(seed)
    config = LlavaConfig(
        text_config=text, vision_config=vision, image_token_id=999, vision_feature_layer=-1,
        image_seq_length=shape.visual,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    model.set_attn_implementation("sdpa")
    return model.eval().requires_grad_(False)


@dataclass
class Request:
    """A prompt with its picture features, and the tokens of the decode steps."""

    ids: Tensor
    features: Any
    next_ids: list[int] = field(default_factory=lambda: list(range(11, 43)))


def request(model: LlavaForConditionalGeneration, shape: Shape) -> Request:
    """BOS, half of the text, the picture, the other half."""
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(3, 900, (shape.text - 1,), generator=generator)
    half = shape.text // 2
    ids = torch.cat([torch.tensor([1]), words[: half - 1], torch.full((shape.visual,), 999), words[half - 1 :]])[None]
    size = model.config.vision_config.image_size
    pixels = torch.randn((1, 3, size, size), generator=generator)
    features = model.base_model.get_image_features(pixel_values=pixels, return_dict=True)
    # Unit scale, like word embeddings after the first layers of a trained model: the tiny tower gives almost nothing.
    features.pooler_output = [f / f.std() * 0.02 for f in features.pooler_output]
    return Request(ids, features)


def sink_threshold(model: LlavaForConditionalGeneration, job: Request, dims: Sequence[int]) -> float:
    """The `tau` above which at least a `SINK_SHARE` of the visual tokens are sinks, in each of the layers 2 .. L-2."""
    visual = job.ids[0] == model.config.image_token_id
    seen: list[Tensor] = []

    def look(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0][0, visual].float()
        phi = x[:, list(dims)].abs().amax(-1) / (x.pow(2).mean(-1) + 1e-6).sqrt()
        seen.append(phi)

    hooks = [layer.register_forward_pre_hook(look) for layer in model.get_decoder().layers[2:-1]]
    try:
        _prefill(model, job)
    finally:
        for hook in hooks:
            hook.remove()
    return min(float(phi.quantile(1 - SINK_SHARE)) for phi in seen)


# -------------------------------------------------------------------------------------------------------- timing


def _prefill(model: LlavaForConditionalGeneration, job: Request, text_only: bool = False) -> DynamicCache:
    ids = job.ids[job.ids != model.config.image_token_id][None] if text_only else job.ids
    extra = {} if text_only else {"mm_encoder_outputs": {"image": job.features}}
    cache = DynamicCache(config=model.config.get_text_config())
    position = torch.arange(ids.shape[1])[None]
    model(input_ids=ids, position_ids=position, past_key_values=cache, use_cache=True, logits_to_keep=1, **extra)
    return cache


def _decode(model: LlavaForConditionalGeneration, job: Request, cache: DynamicCache, steps: int) -> None:
    start = job.ids.shape[1]
    for step in range(steps):
        model(
            input_ids=torch.tensor([[job.next_ids[step % len(job.next_ids)]]]),
            position_ids=torch.tensor([[start + step]]), past_key_values=cache, use_cache=True, logits_to_keep=1,
        )  # fmt: skip


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


def configurations(shape: Shape, sink_dims: Sequence[int], tau: float) -> list[Config]:
    """Stock, the keep-all control and the three methods of the table."""
    whole = [shape.tokens] * shape.layers
    pruned = [shape.tokens if layer < PRUNE_LAYER else shape.text + KEEP for layer in range(shape.layers)]
    return [
        Config("stock", None, whole),
        Config(CONTROL, method("fastv", layer=PRUNE_LAYER, keep=shape.visual), whole),
        Config(f"fastv {KEEP}", method("fastv", layer=PRUNE_LAYER, keep=KEEP), pruned),
        Config("var", method("var", sink_dims=tuple(sink_dims), tau=tau), whole),
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
        cache = _prefill(model, job)
        middle = now()
        _decode(model, job, cache, steps)
        end = now()
        if record:
            config.prefill.append(middle - start)
            config.decode.append((end - middle) / steps)
        if session is not None:
            config.facts = _facts(session)
    if record and config.facts.get("scaled_heads_per_layer"):
        start = now()
        _prefill(model, job, text_only=True)
        config.text_pass.append(now() - start)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _spread(values: Sequence[float], stock: Sequence[float]) -> dict[str, float]:
    return {
        "median_s": statistics.median(values),
        "min_s": min(values),
        "ratio": statistics.median(v / s for v, s in zip(values, stock, strict=True)),
        "ratio_of_min": min(values) / min(stock),
    }


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
    with torch.inference_mode(False), torch.no_grad(), _threads(threads):
        model = build(shape)
        job = request(model, shape)
        sink_dims = (5, 11)
        tau = sink_threshold(model, job, sink_dims)
        configs = configurations(shape, sink_dims, tau)
        for number in range(rounds + 1):
            first = number % len(configs)
            for config in configs[first:] + configs[:first]:
                _time_one(model, job, config, steps, CLOCKS[clock], record=number > 0)
                tick()
    return _report(shape, configs, {"sink_dims": list(sink_dims), "tau": tau})


def _report(shape: Shape, configs: list[Config], sinks: dict[str, Any]) -> dict[str, Any]:
    stock = configs[0]
    rows: list[dict[str, Any]] = []
    for config in configs:
        ideal = ideal_ratio(shape, config.per_layer)
        prefill = _spread(config.prefill, stock.prefill)
        row: dict[str, Any] = {
            "config": config.name,
            "method": config.method.to_dict() if config.method is not None else None,
            "prefill": prefill,
            "decode": _spread(config.decode, stock.decode),
            "flops_ideal": ideal,
            "of_ideal_speedup": ideal / prefill["ratio"],
            "facts": config.facts,
        }
        if config.text_pass:
            rest = [v - t for v, t in zip(config.prefill, config.text_pass, strict=True)]
            row["text_only_pass_s"] = statistics.median(config.text_pass)
            row["prefill_without_text_pass"] = _spread(rest, stock.prefill)
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
    unknown = [name for name in shapes if name not in SHAPES]
    if unknown:
        raise ValueError(f"unknown bench shape {unknown[0]!r}: choose from {', '.join(SHAPES)}")
    if clock not in CLOCKS:
        raise ValueError(f"unknown clock {clock!r}: choose from {', '.join(CLOCKS)}")
    if rounds < 1 or steps < 1 or threads < 1:
        raise ValueError(f"rounds={rounds}, steps={steps} and threads={threads} must all be at least 1")
    results = [bench_shape(SHAPES[name], rounds, steps, threads, clock, tick) for name in shapes]
    return {
        "format": 1,
        "env": {
            "torch": torch.__version__,
            "transformers": __version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
            "cpus": os.cpu_count(),
            "load_before_1min": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
            "dtype": "float32",
            "attention": "sdpa",
        },
        "protocol": {"rounds": rounds, "decode_steps": steps, "threads": threads, "clock": clock, "warm_up_rounds": 1},
        "shapes": results,
        "valid": all(result["valid"] for result in results),
    }


def ticks(shapes: Sequence[str], rounds: int) -> int:
    """How often `run_bench` calls `tick`."""
    return len(shapes) * (rounds + 1) * 5


def tables(report: dict[str, Any]) -> list[Table]:
    """One rich table per shape."""
    found = []
    for result in report["shapes"]:
        shape = result["shape"]
        tokens = shape["visual"] + shape["text"]
        title = (
            f"{shape['name']}: {shape['layers']} layers, hidden {shape['hidden']}, {shape['heads']}/"
            f"{shape['kv_heads']} heads, {tokens} tokens ({shape['visual']} visual)"
        )
        table = Table(title=title, caption=_caption(result))
        for head in (
            "configuration",
            "prefill s",
            "min s",
            "x stock",
            "FLOPs-ideal",
            "of ideal",
            "token ms",
            "x stock",
        ):
            table.add_column(head, justify="left" if head == "configuration" else "right")
        for row in result["rows"]:
            prefill, decode = row["prefill"], row["decode"]
            table.add_row(
                row["config"], f"{prefill['median_s']:.3f}", f"{prefill['min_s']:.3f}", f"{prefill['ratio']:.3f}",
                f"{row['flops_ideal']:.3f}", f"{row['of_ideal_speedup']:.0%}", f"{decode['median_s'] * 1e3:.1f}",
                f"{decode['ratio']:.3f}",
            )  # fmt: skip
            if "text_only_pass_s" in row:
                rest = row["prefill_without_text_pass"]
                table.add_row(
                    "  less its text-only pass", f"{rest['median_s']:.3f}", f"{rest['min_s']:.3f}",
                    f"{rest['ratio']:.3f}", "", "", "", "",
                )  # fmt: skip
        found.append(table)
    return found


def _caption(result: dict[str, Any]) -> str:
    if not result["valid"]:
        return (
            f"VOID: the keep-all control is {result['control_off_by']:.1%} off stock (5 % allowed). "
            "Something else used the machine; run again when it is quiet."
        )
    lines = [f"{'met' if b['met'] else 'MISSED'}: {b['what']} {b['value']:.3f} ({b['bar']})" for b in result["bars"]]
    return "\n".join([f"control off by {result['control_off_by']:.1%}", *lines])


def print_report(report: dict[str, Any], console: Console | None = None) -> None:
    """Writes the tables to a console."""
    out = console or Console()
    for table in tables(report):
        out.print(table)
