"""Every attention edit against the stock model: prefill, decode, peak memory, beside attention read the eager way.

Each round times every case once, in rotating order. Decoder layers of a prefill and decode steps alternate with those
of stock on a twin of the model and are divided by them; on a GPU a prefill is divided by the mean of the stock
prefills around it (one before the first case, after the last and after every second one). A session that edits nothing
is timed along: where it does not land within 5 % of stock, the run is void.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from transformers import LlavaForConditionalGeneration

from .. import draft
from ..registry import method
from ..session import Session, attach
from ..stages import Method, RowEdit
from . import memory, overview, paired, setup
from .setup import CONTROL_TOLERANCE, CPU, SINK_DIMS, Machine, Request, Shape
from .turns import Stock, Taken, Trial

CONTROL = "noop control"
EAGER = "eager, attentions returned"
DECODE_BAR, MEMORY_BAR = 1.10, 1.05
LAST_ROW_BAR = 1.03

SHAPES = {
    "deep": replace(overview.SHAPES["deep"], pictures=4),
    "long": replace(overview.SHAPES["long"], pictures=4),
}
GPU_SHAPES = {**setup.GPU_SHAPES, "7b-640": replace(setup.GPU_SHAPES["7b-640"], pictures=4)}
GPU_BARS = {"var": 1.10, "vhr": 1.02, "decode": 1.03}


Runner = Callable[[Trial], Taken]
"""A way of running the prompt and the tokens behind it."""


@dataclass
class Case:
    """One row of the table.

    Attributes:
        bar: highest prefill ratio aimed at, None where none is set.
        ours: a method of this package: the bars of decode and memory hold for it.
        said: per-checkpoint data made up for the bench.
    """

    name: str
    run: Runner
    bar: float | None = None
    ours: bool = True
    said: str = ""
    taken: list[Taken] = field(default_factory=list)
    around: list[tuple[Taken, Taken]] = field(default_factory=list)
    peak: int | None = None


# ------------------------------------------------------------------------------------------------------- the runs


def eager_run(trial: Trial) -> Taken:
    """The whole model eager, with attention matrices returned."""
    trial.model.set_attn_implementation("eager")
    try:
        return trial.run(output_attentions=True)
    finally:
        trial.model.set_attn_implementation("sdpa")


class MethodRun:
    """A run with a method attached; attaching itself and a draft are not timed."""

    def __init__(self, chosen: Method):
        self.method = chosen
        self.drafted: draft.Drafted | None = None

    def __call__(self, trial: Trial) -> Taken:
        with attach(trial.model, self.method) as session:
            drafting = session.edits.drafting
            if drafting is not None:
                session._drafted = self.drafted = self.drafted or _draft(session, drafting, trial)
            taken = trial.run()
            taken.facts = _facts(session)
            second_pass = session.last.text is not None
        if second_pass:  # with the clock of the run, hence once more
            start = trial.now()
            setup.prefill(trial.model, trial.job, text_only=True)
            taken.apart = trial.now() - start
        return taken


def _draft(session: Session, drafting: tuple[int, RowEdit], trial: Trial) -> draft.Drafted:
    number, edit = drafting
    generate = functools.partial(type(trial.model).generate, trial.model)
    inputs = {"input_ids": trial.job.ids, "pixel_values": trial.job.pixels}
    return draft.run(session, edit, session.edits.layers[number], generate, (), inputs)


def _facts(session: Session) -> dict[str, Any]:
    last = session.last
    scaled = {layer: int((factors[0] != 1).sum()) for (_, layer), factors in last.factors.items()}
    return {
        "edited_rows_per_layer": {str(layer): n for layer, n in last.edited.items()},
        "scaled_heads_per_layer": {str(layer): n for layer, n in scaled.items()},
        "biased_layers": sorted(layer for _, layer in last.biases),
        "mapped_layers": sorted(layer for (_, layer), m in last.maps.items() if m.scale is not None),
    }


# ------------------------------------------------------------------------------------------------------ the cases


def cases(shape: Shape, tau: float, gpu: bool = False) -> list[Case]:
    """Control, every edit method with stated data where it needs some, and the eager way."""
    layers, heads = range(shape.layers), shape.heads
    one_each = [[layer, (5 * layer + 1) % heads] for layer in layers]
    half = [[layer, head] for layer in layers for head in range(0, heads, 2)]
    upper = [pair for pair in one_each if pair[0] >= shape.layers // 2]
    middle = max(1, shape.layers // 3)

    def case(name: str, bar: float | None = None, said: str = "", label: str = "", **params: Any) -> Case:
        bar = GPU_BARS.get(name) if gpu else bar
        return Case(label or name, MethodRun(method(name, **params)), bar, said=said)

    return [
        case("noop", label=CONTROL),
        case("var", 1.10, f"sink dimensions {SINK_DIMS}, tau {tau:.2f}", sink_dims=SINK_DIMS, tau=tau),
        case("zerotuning", 1.10, "gamma 2 in every second head", gamma=2.0, heads=half),
        case("sofa", 1.25),
        case("act", 1.35, "every head of layers 2..L-2, alpha 3", heads="all", alpha=3.0),
        case("pai", LAST_ROW_BAR, "logit part", gamma=1.0),
        case("paint", LAST_ROW_BAR),
        case(
            "gift", LAST_ROW_BAR, f"map from layer {middle}, every layer behind it edited", saliency_layer=middle,
            enhance_layers=list(layers)[middle + 1 :], content_only=False, suffix_tokens=1,
        ),
        case("adhh", LAST_ROW_BAR, "one head per upper layer, always cut", heads=upper, threshold=0.0),
        case("ilvad", LAST_ROW_BAR, "its draft apart"),
        case(
            "head_gate", LAST_ROW_BAR, "one head per layer", "head_gate block", heads=one_each, mode="block"
        ),
        case("head_gate", None, "one head per layer", "head_gate amplify", heads=one_each),
        case("vaf"),
        case("vas_boost"),
        case("vhr"),
        Case(EAGER, eager_run, ours=False),
    ]  # fmt: skip


# --------------------------------------------------------------------------------------------------------- timing


def bench_shape(
    shape: Shape,
    rounds: int,
    steps: int,
    clock: str = "wall",
    place: Machine = CPU,
    peers: Sequence[Case] = (),
    only: Sequence[str] = (),
    tick: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Measures one shape; see :func:`run_edits`."""
    with setup.quiet(place.threads):
        model = setup.build(shape, place=place)
        job = setup.request(model, shape)
        tau = setup.sink_threshold(model, job)
        found = cases(shape, tau, gpu=place.device == "cuda")
        found = [*_chosen(found, only), *(replace(peer, taken=[], around=[]) for peer in peers)]
        now = place.clock(clock)

        trial = Trial(model, job, steps, now, Stock(model, job, now, layers=not place.queued))
        alone = replace(trial, steps=2, beside=None)

        bytes_of_stock = memory.peak(alone.run, place.device)
        for case in found:
            case.peak = memory.peak(functools.partial(case.run, alone), place.device)
            tick()

        def run(case: Case) -> Taken:
            tick()
            return case.run(trial)

        trial.run()  # warm-up
        around = replace(alone, steps=0).run if place.queued else None
        paired.time_rounds(found, rounds, run, around)
        answers = whole_answers(model, job, steps, now, min(rounds, 3)) if not only else []
    return _report(shape, found, bytes_of_stock, answers, place.device)


def _chosen(found: list[Case], only: Sequence[str]) -> list[Case]:
    names = {case.name.split()[0] for case in found}
    unknown = [name for name in only if name not in names]
    if unknown:
        raise ValueError(f"unknown edit {unknown[0]!r}: choose from {', '.join(sorted(names - {'noop', 'eager,'}))}")
    wanted = (*only, *CONTROL.split()[:1], *EAGER.split()[:1])
    return [case for case in found if not only or case.name.split()[0] in wanted]


def whole_answers(
    model: LlavaForConditionalGeneration, job: Request, steps: int, now: Callable[[], float], rounds: int
) -> list[dict[str, Any]]:
    """Seconds of a whole answer through ``generate`` for the methods that pass over the prompt more than once."""
    extra = {"vhr": "a text-only prefill", "pai": "a text-only second stream", "ilvad": "a draft of 10 tokens"}
    seconds: dict[str, list[float]] = {"stock": [], **{name: [] for name in extra}}

    def answer(name: str) -> float:
        start = now()
        model.generate(
            input_ids=job.ids, pixel_values=job.pixels, max_new_tokens=steps + 1, do_sample=False,
        )  # fmt: skip
        return now() - start

    for _ in range(rounds):
        seconds["stock"].append(answer("stock"))
        for name in extra:
            with attach(model, method(name)):
                seconds[name].append(answer(name))
    return [
        {"method": name, "extra": extra.get(name, ""), "tokens": steps + 1, **setup.spread(taken, seconds["stock"])}
        for name, taken in seconds.items()
    ]


# --------------------------------------------------------------------------------------------------------- report


def _report(
    shape: Shape, found: list[Case], stock_peak: int | None, answers: list[dict[str, Any]], device: str
) -> dict[str, Any]:
    rows = [_row(case, stock_peak, device) for case in found]
    control = rows[0]
    off = max(abs(control["prefill"]["ratio"] - 1), abs(control["decode"]["ratio"] - 1))
    around = [taken for case in found for pair in case.around for taken in pair]
    every = [taken for case in found for taken in case.taken]
    return {
        "shape": asdict(shape),
        "stock": {
            "prefill_s": statistics.median(t.prefill for t in around),
            "decode_s": statistics.median(t.stock_decode for t in every),
            "peak_bytes": stock_peak,
        },
        "rows": rows,
        "answers": answers,
        "memory": memory.HOW[device] if stock_peak is not None else "not measured: no /proc here",
        "control_off_by": off,
        "valid": off <= CONTROL_TOLERANCE,
    }


def _row(case: Case, stock_peak: int | None, device: str) -> dict[str, Any]:
    decode_bar = None if not case.ours else GPU_BARS["decode"] if device == "cuda" else DECODE_BAR
    row: dict[str, Any] = {
        "case": case.name,
        "data": case.said,
        "prefill": {**paired.ratio(case, _prefill), "bar": case.bar},
        "decode": {**paired.decode_ratio(case), "bar": decode_bar},
        "memory": {
            "peak_bytes": case.peak,
            "ratio": case.peak / stock_peak if case.peak and stock_peak else None,
            "bar": MEMORY_BAR if case.ours else None,
        },
        "facts": case.taken[-1].facts,
    }
    if any(taken.apart for taken in case.taken):
        row["text_only_pass_s"] = statistics.median(taken.apart for taken in case.taken)
        row["prefill_without_text_pass"] = {**paired.ratio(case, _bare_prefill, _prefill), "bar": case.bar}
        row["prefill"]["bar"] = None
    return row


def _prefill(taken: Taken) -> float:
    return taken.prefill


def _bare_prefill(taken: Taken) -> float:
    return taken.prefill - taken.apart


def run_edits(
    shapes: Sequence[str] = (),
    *,
    rounds: int = 5,
    steps: int = 12,
    clock: str = "wall",
    gpu: bool = False,
    peers: Sequence[Case] = (),
    only: Sequence[str] = (),
    tick: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Measures every attention edit on the named shapes.

    Args:
        shapes: names out of `SHAPES` (`GPU_SHAPES` with ``gpu``); all of them by default.
        rounds: timed rounds per shape, after one stock run that warms up.
        steps: decode steps per run.
        clock: `"wall"` is the protocol; `"cpu"` counts this process only.
        gpu: LLaVA-1.5-7B shapes in bf16 on the CUDA device, instead of fp32 on one CPU thread.
        peers: further cases timed in the same rounds.
        only: these methods alone (with control and the eager way), without whole answers.
        tick: called `edit_ticks(...)` times in all.

    Returns:
        JSON-ready dict: `env`, `protocol`, `shapes` (stock, rows, answers, control), `valid`.

    Raises:
        ValueError: unknown shape, method or clock, an empty protocol, or no CUDA device for ``gpu``.
    """
    known = GPU_SHAPES if gpu else SHAPES
    setup.check(shapes, list(known), clock, rounds=rounds, steps=steps)
    place = setup.machine(gpu)
    env = setup.environment(place)
    results = [
        bench_shape(known[name], rounds, steps, clock, place, peers, only, tick) for name in shapes or list(known)
    ]
    return paired.document("edits", env, results, rounds, steps, clock, place.threads)


def edit_ticks(shapes: Sequence[str], rounds: int, only: Sequence[str] = (), peers: int = 0) -> int:
    """How often `run_edits` calls `tick`."""
    each = len(_chosen(cases(SHAPES["long"], 1.0), only)) + peers
    return (len(shapes) or 2) * (rounds + 1) * each
