"""Every pruning method against the stock model: what it keeps, what that allows, what it gives, what choosing costs.

The language model is timed on random weights; what the tiny vision tower takes by itself comes off every prefill. Each
round times every case once, in rotating order. Decoder layers of a prefill and decode steps alternate with those of
stock on a twin of the model and are divided by them. Keys projected ahead that a layer then takes over are no cost of
choosing: the layer would have projected them. A pruner that keeps everything is timed along: where it does not land
within 5 % of stock, the run is void. A text prompt as long as the shortest pruned one is timed too: no choice of
tokens can be faster. On a GPU a prefill is divided by the mean of the stock prefills around it, choosing is timed in a
prefill of its own, and what reads attention is timed with the kernels and without.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from .. import ops
from ..installation import Installation
from ..kit.budgets import equivalent_tokens
from ..registry import method
from ..session import Session, attach
from ..stages import Method
from . import memory, paired, setup
from .overview import CONTROL, ideal_ratio
from .setup import CONTROL_TOLERANCE, CPU, GPU_SHAPES, Machine, Shape
from .turns import Stock, Taken, Trial

FORMULA = "(2 + 2 s) n d^2 + n (n + 1) d + 3 n d m per layer, s = share of key/value heads (vlm_attn/flops.py, causal)"
SHARE = 1 / 9
SHORT = "short prompt"
BARS = {"input": 0.85, "layer 2": 0.90}
SCORING_BAR, DECODE_BAR = 0.02, 1.0

KERNEL_READERS = ("fastv", "tokencarve", "himap", "pyramiddrop", "feather", "sparsevlm", "spatten", "illava")

SHAPES = {
    "640": Shape("640", layers=12, heads=16, kv_heads=16, visual=576, text=64),
    "2944": Shape("2944", layers=12, heads=16, kv_heads=16, visual=2880, text=64, pictures=5),
}


@dataclass
class Case:
    """One row of the table.

    Attributes:
        method: None in the short text prompt.
        kind: where tokens leave: ``input``, ``layer 2``, ``stages`` or ``encoder``; the first two have a bar.
        attention: attention, of the language model or of the encoder, takes part in the choice; its cost has a bar.
        kernels: whether attention may be read by the kernels of the device.
    """

    name: str
    method: Method | None
    kind: str
    attention: bool = False
    kernels: bool = True
    taken: list[Taken] = field(default_factory=list)
    around: list[tuple[Taken, Taken]] = field(default_factory=list)
    peak: int | None = None


def cases(shape: Shape, apart: bool = False) -> list[Case]:
    """The keep-all control, a text prompt of the short length and every pruning method, one ninth kept where the
    budget is one number; with ``apart`` also without kernels, where they would read attention."""

    def case(name: str, kind: str, attention: bool = False, label: str = "", **params: Any) -> Case:
        return Case(label or name, method(name, **params), kind, attention)

    ninth: dict[str, Any] = {"keep": SHARE}
    found = [
        case("fastv", "control", label=CONTROL, keep=1.0),
        Case(SHORT, None, "floor"),
        case("random_prune", "input", layer=0, **ninth),
        case("uniform_prune", "input", layer=0, **ninth),
        case("norm_prune", "input", **ninth),
        case("fastervlm", "input", True, **ninth),
        case("text_dominance_compress", "input", True, reduction=1 - SHARE),
        case("vispruner", "input", True, **ninth),
        case("visionzip", "input", True, **ninth),
        case("holov", "input", True, **ninth),
        case("prumerge", "input", True),
        case("apet", "input", **ninth),
        case("divprune", "input", **ninth),
        case("cdpruner", "input", **ninth),
        case("zoo_prune", "input", label="zoo_prune m=8", m=8, **ninth),
        case("zoo_prune", "input", label="zoo_prune m=8 rank 128", m=8, rank=128, **ninth),
        case("fastv", "layer 2", True, **ninth),
        case("fastv", "layer 2", True, "fastv auto", keep="auto"),
        case("dart", "layer 2", **ninth),
        case("tokencarve", "layer 2", True, **ninth),
        case("himap", "stages", True),
        case("pyramiddrop", "stages", True),
        case("feather", "stages", True),
        case("sparsevlm", "stages", True, budget=64),
        case("sparsevlm", "stages", True, "sparsevlm plus", version="plus", budget=64),
        case("spatten", "stages", True, **ninth),
        case("tome", "encoder", **ninth),
        case("flowcut", "encoder", True, **ninth),
        case("illava", "encoder", True),
    ]
    return with_and_without(found) if apart else found


def with_and_without(found: list[Case]) -> list[Case]:
    """Beside every one of the `KERNEL_READERS` the same case by torch operators alone."""
    rows: list[Case] = []
    for case in found:
        rows.append(case)
        if case.name in KERNEL_READERS:
            rows.append(replace(case, name=f"{case.name}, no kernel", kernels=False, taken=[], around=[]))
    return rows


# ------------------------------------------------------------------------------------------------------- the runs


class _Meter:
    """Seconds spent inside some methods of an object, and inside key projections that they call."""

    def __init__(self, now: Callable[[], float]):
        self.now, self.seconds, self._inside = now, 0.0, False
        self.keys: dict[int, float] = {}

    def watch(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Times a call; calls inside timed calls count once. Shadows what is watched."""
        if self._inside:
            return inner(*args, **kwargs)
        self._inside, start = True, self.now()
        try:
            return inner(*args, **kwargs)
        finally:
            self._inside = False
            self.seconds += self.now() - start

    def watch_keys(self, number: int, project: Callable[..., Any], *args: Any) -> Any:
        """Times the key projections of a layer that watched calls make; shadows them."""
        start = self.now()
        out = project(*args)
        if self._inside:
            self.keys[number] = self.keys.get(number, 0.0) + self.now() - start
        return out


def run_case(trial: Trial, shape: Shape, case: Case) -> Taken:
    """One run with the method attached; attaching itself is not timed."""
    if case.method is None:
        kept = round(shape.visual * SHARE)
        short = replace(trial, job=setup.words(trial.model, shape.text + kept))
        taken = short.run()
        taken.facts["per_layer"] = [kept] * shape.layers
        return taken
    with nullcontext() if case.kernels else ops.references(), attach(trial.model, case.method) as session:
        if trial.queued:
            taken = trial.run()
            with choosing(session, trial.clock) as meter:
                setup.prefill(trial.model, trial.job, encode=True)
        else:
            with choosing(session, trial.clock) as meter:
                taken = trial.run()
        taken.facts["per_layer"] = _lengths(session)
        spared = session.last.spared
    taken.apart = meter.seconds - sum(seconds * spared.get(n, 0.0) for n, seconds in meter.keys.items())
    return taken


@contextmanager
def choosing(session: Session, now: Callable[[], float]) -> Iterator[_Meter]:
    """Inside, what the session takes to choose is timed."""
    meter = _Meter(now)
    installed = Installation()
    for name in ("read", "_read_ahead", "_cut", "cut_heads"):
        installed.shadow(session.pruner, name, meter.watch)
    if session.encoder.shrinker is not None:
        installed.shadow(session.encoder.shrinker, "_decide", meter.watch)
    for number in session.pruner.readings.ahead():
        project = session.family.attention(number).k_proj
        installed.shadow(project, "forward", functools.partial(meter.watch_keys, number))
    try:
        yield meter
    finally:
        installed.undo()


def _lengths(session: Session) -> list[int]:
    """Visual tokens that every layer processed."""
    return [int(n) for n in session.last.kept_per_layer(session.info.layers)[0]]


def bench_shape(
    shape: Shape,
    rounds: int,
    steps: int,
    clock: str = "wall",
    place: Machine = CPU,
    only: Sequence[str] = (),
    tick: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Measures one shape; see :func:`run_prune`."""
    with setup.quiet(place.threads):
        model = setup.build(shape, place=place)
        job = setup.request(model, shape)
        now = place.clock(clock)
        found = chosen(cases(shape, place.queued), only)

        trial = Trial(model, job, steps, now, Stock(model, job, now, layers=not place.queued))
        alone = replace(trial, steps=1, beside=None)

        def run(case: Case) -> Taken:
            tick()
            return run_case(trial, shape, case)

        bytes_of_stock = memory.peak(alone.run, place.device)
        for case in found:
            case.peak = memory.peak(functools.partial(run_case, alone, shape, case), place.device)
            tick()
        trial.run()  # warm-up
        tower = encoding(trial)
        paired.time_rounds(found, rounds, run, replace(alone, steps=0).run if place.queued else None)
    return _report(shape, found, steps, tower, bytes_of_stock, place)


def encoding(trial: Trial, runs: int = 5) -> float:
    """Median seconds of the stock vision tower with its projector."""
    seconds = []
    for _ in range(runs):
        start = trial.now()
        trial.model.base_model.get_image_features(pixel_values=trial.job.pixels, return_dict=True)
        seconds.append(trial.now() - start)
    return statistics.median(seconds)


def chosen(found: list[Case], only: Sequence[str]) -> list[Case]:
    """The cases of these methods, the control and the short prompt.

    Raises:
        ValueError: no case of that name.
    """
    names = {case.method.name for case in found if case.method is not None}
    for name in only:
        if name not in names:
            raise ValueError(f"unknown pruning method {name!r}: choose from {', '.join(sorted(names))}")
    always = (CONTROL, SHORT)
    return [case for case in found if not only or case.name in always or (case.method and case.method.name in only)]


# --------------------------------------------------------------------------------------------------------- report


def _report(
    shape: Shape, found: list[Case], steps: int, tower: float, stock_peak: int | None, place: Machine = CPU
) -> dict[str, Any]:
    prefills = [taken.prefill for case in found for pair in case.around for taken in pair]
    stock_prefill = statistics.median(prefills) - tower
    stock_decode = statistics.median(taken.stock_decode for case in found for taken in case.taken)
    rows = [_row(shape, case, steps, tower, stock_prefill, stock_peak) for case in found]
    if place.queued:  # the bars are those of the processor
        rows = [_without_bars(row) for row in rows]
    control = rows[0]
    off = max(abs(control[name]["ratio"] - 1) for name in ("prefill", "decode"))
    return {
        "shape": asdict(shape),
        "flops_formula": FORMULA,
        "stock": {
            "prefill_s": stock_prefill,
            "tower_s": tower,
            "decode_s": stock_decode,
            "peak_bytes": stock_peak,
        },
        "rows": rows,
        "memory": memory.HOW[place.device] if stock_peak is not None else "not measured: no /proc here",
        "control_off_by": off,
        "valid": off <= CONTROL_TOLERANCE,
    }


def _row(
    shape: Shape, case: Case, steps: int, tower: float, stock_prefill: float, stock_peak: int | None
) -> dict[str, Any]:
    own = tower if case.method is not None else 0.0
    prefill = paired.ratio(case, lambda taken: taken.prefill - own, lambda taken: taken.prefill - tower)
    per_layer = case.taken[-1].facts["per_layer"]
    ideal = ideal_ratio(shape, [shape.text + n for n in per_layer])
    scoring = statistics.median(taken.apart for taken in case.taken)
    return {
        "case": case.name,
        "kind": case.kind,
        "nominal": "" if case.method is None else nominal(case.method),
        "equivalent_tokens": equivalent_tokens(per_layer),
        "visual_tokens_per_layer": per_layer,
        "flops_ideal": ideal,
        "prefill": prefill,
        "of_ideal_speedup": ideal / prefill["ratio"],
        "of_ideal_bar": BARS.get(case.kind),
        "end_to_end": {"ratio": _end_to_end(case, steps), "decode_steps": steps},
        "decode": {**paired.decode_ratio(case), "bar": DECODE_BAR},
        "scoring": {
            "median_s": scoring,
            "of_stock_prefill": scoring / stock_prefill,
            "bar": SCORING_BAR if case.attention else None,
        },
        "memory": {
            "peak_bytes": case.peak,
            "ratio": case.peak / stock_peak if case.peak and stock_peak else None,
        },
    }


def _without_bars(row: dict[str, Any]) -> dict[str, Any]:
    timed = {name: {**row[name], "bar": None} for name in ("decode", "scoring")}
    return {**row, **timed, "of_ideal_bar": None}


def _end_to_end(case: Case, steps: int) -> float:
    """Prefill and ``steps`` tokens over stock's."""
    return statistics.median(
        (taken.prefill + steps * taken.decode)
        / (statistics.fmean(stock.prefill for stock in pair) + steps * taken.stock_decode)
        for taken, pair in zip(case.taken, case.around, strict=True)
    )


def nominal(chosen: Method) -> str:
    """The budget as the method's parameters say it."""
    said = {k: v for k, v in chosen.to_dict().items() if k in ("keep", "reduction", "budget") and v is not None}
    if chosen.name == "prumerge":
        return "adaptive"
    return ", ".join(f"{k} {round(v, 4) if isinstance(v, float) else v}" for k, v in said.items())


def run_prune(
    shapes: Sequence[str] = (),
    *,
    rounds: int = 5,
    steps: int = 12,
    clock: str = "wall",
    gpu: bool = False,
    only: Sequence[str] = (),
    tick: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Measures every pruning method on the named shapes.

    Args:
        shapes: names out of `SHAPES` (`GPU_SHAPES` with ``gpu``); all of them by default.
        rounds: timed rounds per shape, after one stock run that warms up.
        steps: decode steps per run.
        clock: `"wall"` is the protocol; `"cpu"` counts this process only.
        gpu: shapes of LLaVA-1.5-7B and LLaVA-NeXT in bf16 on the CUDA device, with and without the kernels that read
            attention, instead of fp32 on one CPU thread.
        only: these methods alone, with the control.
        tick: called `prune_ticks(...)` times in all.

    Returns:
        JSON-ready dict: `env`, `protocol`, `shapes` (stock, rows, control), `valid`.

    Raises:
        ValueError: unknown shape, method or clock, an empty protocol, or no CUDA device for ``gpu``.
    """
    known = GPU_SHAPES if gpu else SHAPES
    setup.check(shapes, list(known), clock, rounds=rounds, steps=steps)
    chosen(cases(SHAPES["640"]), only)
    place = setup.machine(gpu)
    env = setup.environment(place)
    results = [bench_shape(known[name], rounds, steps, clock, place, only, tick) for name in shapes or list(known)]
    return paired.document("prune", env, results, rounds, steps, clock, place.threads)


def prune_ticks(shapes: Sequence[str], rounds: int, only: Sequence[str] = (), gpu: bool = False) -> int:
    """How often `run_prune` calls `tick`."""
    found = chosen(cases(SHAPES["640"], gpu), only)
    return (len(shapes) or len(GPU_SHAPES if gpu else SHAPES)) * (rounds + 1) * len(found)
