"""The generic checks: one method on one tiny model of a family, through the public door, with figures.

Every check compares the attached model with the unwrapped one, or a batch with its rows alone; none of them knows a
method or a family.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn

from ..errors import AttachError, MissingProfileError, UnsupportedError
from ..profiles import Profile
from ..registry import MethodRow
from ..session import Session, attach
from ..stages import Method
from . import Family, resolve
from .zoo import SPECIMENS, Sample, Specimen

STEPS = 5  # the prefill and four cached steps
TOLERANCE = 1e-5
ROWS_TOLERANCE = 1e-4  # a batch and its rows alone round differently, and methods multiply heads and logits
REFUSALS = (UnsupportedError, AttachError, MissingProfileError)

# What stands in for calibrated data on a random model. Only the mechanics are executed with it.
_HEADS = [[layer, head] for layer in (1, 2) for head in range(4)]
STAND_INS: dict[str, dict[str, Any]] = {
    "act": {"heads": "all"},
    "adhh": {"heads": _HEADS},
    "gift": {"saliency_layer": 1, "enhance_layers": [1, 2]},
    "head_gate": {"heads": _HEADS},
    "zerotuning": {"gamma": 2.0, "heads": _HEADS},
    "trend": {"sigma": 0.5},
}


class StandInProfile(Profile):
    """A profile that answers every entry of :data:`STAND_INS`, and ``sinks`` so that some visual tokens are sinks."""

    def __init__(self, family: Family, inputs: dict[str, Tensor]):
        super().__init__("", {})
        self.stand_ins = {**STAND_INS, "sinks": _sinks(family, inputs)}

    def need(self, entry: str, method: str) -> dict[str, Any]:
        """The stand-in for an entry, whatever its layer or reading."""
        kind = entry.partition(":")[0]
        return self.stand_ins[kind] if kind in self.stand_ins else super().need(entry, method)


def _sinks(family: Family, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """Three dimensions, and the threshold that 30 % of the visual tokens exceed in the middle of the decoder."""
    dims, seen = [3, 7, 11], []

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    handle = family.layers[len(family.layers) // 2].register_forward_pre_hook(look, with_kwargs=True)
    try:
        trace(family.model, inputs, 1)
    finally:
        handle.remove()
    x = seen[0][inputs["input_ids"] == family.placeholders["image"]].float()
    strength = x[:, dims].abs().amax(-1) / x.pow(2).mean(-1).sqrt()
    return {"dims": dims, "tau": float(strength.quantile(0.7))}


@dataclass(frozen=True)
class Cell:
    """One method on one family with one attention backend.

    Attributes:
        status: ``"executed"`` (every check holds), ``"refused"`` or ``"failed"``.
        detail: the refusal, or what failed.
        figures: largest relative differences by check.
    """

    family: str
    backend: str
    method: str
    stage: str
    status: str
    detail: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)


def batches(specimen: Specimen) -> dict[str, list[Sample]]:
    """The prompts that every family is executed on: one alone, and unequal rows with different pictures."""
    rows = [
        Sample(),
        Sample(pictures=((80, 56), (56, 70)) if specimen.several else ((80, 56),), before=5, after=9, seed=1),
        Sample(pictures=((50, 90),), before=1, after=4, seed=2),
    ]
    return {"single": rows[:1], "padded": rows}


@torch.no_grad()
def trace(model: Any, inputs: dict[str, Tensor], steps: int = STEPS) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens ``[B, steps]``, raw logits and processed scores ``[steps, B, V]`` of greedy ``generate``."""
    out = model.generate(
        **inputs,
        max_new_tokens=steps,
        min_new_tokens=steps,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        output_scores=True,
    )
    logits, scores = torch.stack(out.logits), torch.stack(out.scores)
    return out.sequences[:, -steps:], logits, scores


def distance(left: Tensor, right: Tensor) -> float:
    """Largest difference relative to the scale of ``right``; infinities must stand at the same places."""
    finite = right.isfinite()
    if left.shape != right.shape or not torch.equal(finite, left.isfinite()):
        return float("inf")
    return float((left[finite] - right[finite]).abs().max() / right[finite].abs().max())


def fingerprint(model: nn.Module) -> list[Any]:
    """All that a session could leave behind on a model."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    mark: list[Any] = [
        (
            name,
            tuple(len(getattr(module, hook)) for hook in hooks),
            tuple(sorted(module.__dict__)),
            getattr(getattr(module, "config", None), "_attn_implementation", None),
        )
        for name, module in model.named_modules()
    ]
    generation: Any = getattr(model, "generation_config", None)
    return [*mark, generation.to_dict() if generation is not None else None]


class Bench:
    """A specimen with one attention backend: model, inputs and the unwrapped model's answers (``stock``)."""

    def __init__(self, specimen: Specimen, backend: str):
        self.specimen, self.backend = specimen, backend
        if specimen.since and Version(transformers.__version__) < Version(specimen.since):
            raise UnsupportedError(
                f"the tiny model of {specimen.name} needs transformers {specimen.since} or newer, this is "
                f"{transformers.__version__}: upgrade transformers to run it"
            )
        try:
            self.model = specimen.build(backend=backend)
        except ValueError as error:
            if "attention implementation" not in str(error):
                raise
            raise UnsupportedError(
                f"transformers itself does not run {specimen.name} with {backend}: load it with another implementation"
            ) from error
        self.rows = batches(specimen)
        # Rows are told apart before any attention runs; comparing them with one backend is enough.
        self.compared = tuple(range(len(self.rows["padded"]))) if backend == "sdpa" else ()
        rows: dict[str, list[int | None]] = {"single": [None], "padded": [None, *self.compared]}
        self.profile = StandInProfile(resolve(self.model), self.inputs("padded"))
        self.stock = {(kind, row): trace(self.model, self.inputs(kind, row)) for kind in rows for row in rows[kind]}

    @functools.cache  # noqa: B019 - benches are few and short-lived
    def inputs(self, kind: str, row: int | None = None) -> dict[str, Tensor]:
        """Model inputs of a batch, or of one of its rows alone."""
        rows = self.rows[kind]
        return self.specimen.inputs(rows if row is None else [rows[row]])

    def attached(self, method: Method) -> Session:
        """A session on the model."""
        return attach(self.model, method, self.specimen.processor(), profile=self.profile)


@functools.lru_cache(maxsize=4)
def bench(family: str, backend: str) -> Bench:
    """The bench of a family (the last few are kept)."""
    return Bench(SPECIMENS[family], backend)


def check(family: str, backend: str, row: MethodRow) -> Cell:
    """Runs every check of one cell."""

    def cell(status: str, detail: str = "") -> Cell:
        return Cell(family, backend, row.name, row.stage, status, detail, figures)

    figures: dict[str, float] = {}
    try:
        trouble = _checks(bench(family, backend), row, figures)
    except REFUSALS as refusal:
        return cell("refused", str(refusal))
    except Exception as error:  # a failure is a finding of the matrix, with the method and the family beside it
        return cell("failed", f"{type(error).__name__}: {error}")
    return cell("failed", trouble) if trouble else cell("executed")


def _checks(b: Bench, row: MethodRow, figures: dict[str, float]) -> str:
    """Fills ``figures`` and returns what does not hold."""
    before = fingerprint(b.model)
    stock = {kind: b.stock[kind, None] for kind in b.rows}
    with b.attached(row.neutral()):
        for kind, (_, logits, scores) in stock.items():
            _, neutral_logits, neutral_scores = trace(b.model, b.inputs(kind))
            figures[f"neutral {kind}"] = max(distance(neutral_logits, logits), distance(neutral_scores, scores))
    default = row.cls()
    if row.stage != "refine":  # a refining method acts on the picture, before the processor
        with b.attached(default) as session:
            together = trace(b.model, b.inputs("padded"), 2)
            # In a tiny model an edit may reach no later row, and no logits: then what it edited counts.
            figures["edited"] = float(sum(session.last.edited.values()))
            alone = [trace(b.model, b.inputs("padded", row), 2) for row in b.compared]
        # The whole batch counts: a method that looks at the picture first may leave one prompt alone.
        figures["effect"] = _effect(together, b.stock["padded", None])
        if alone:
            figures["rows alone"] = _rows_alone(together, alone)
            figures["rows alone, unwrapped"] = _rows_alone(
                b.stock["padded", None], [b.stock["padded", row] for row in b.compared]
            )
        if not _acts(figures) and row.stage in ("prune", "edit", "decode"):
            _search(b, default, figures)
    if fingerprint(b.model) != before:
        return "detach left something behind"
    if not torch.equal(trace(b.model, b.inputs("padded"), 1)[1][0], stock["padded"][1][0]):
        return "the detached model gives other logits"
    return _judge(row, figures)


Trace = tuple[Tensor, Tensor, Tensor]


def _acts(figures: dict[str, float]) -> bool:
    return figures["effect"] > 0 or figures["edited"] > 0


def _search(b: Bench, method: Method, figures: dict[str, float]) -> None:
    """Other prompts, for methods that act where they find a sink or a head above a threshold."""
    for seed in range(20, 28):
        inputs = b.specimen.inputs([dataclasses.replace(b.rows["single"][0], seed=seed, after=20)])
        stock = trace(b.model, inputs, 2)
        with b.attached(method) as session:
            figures["effect"] = _effect(trace(b.model, inputs, 2), stock)
            figures["edited"] = float(sum(session.last.edited.values()))
        if _acts(figures):
            return


def _effect(changed: Trace, stock: Trace) -> float:
    """Largest change over the prefill and the first decode step; later steps may answer different texts."""
    return max(distance(changed[i][:2], stock[i][:2]) for i in (1, 2))


def _rows_alone(together: Trace, alone: list[Trace]) -> float:
    """Largest difference between each row of a batch and the same row alone, as far as their tokens agree."""
    worst = 0.0
    for row, (tokens, _, scores) in enumerate(alone):
        agree = int((tokens[0] == together[0][row]).long().cumprod(0).sum())
        upto = min(agree + 1, len(scores))
        worst = max(worst, distance(together[2][:upto, row], scores[:upto, 0]))
    return worst


def _judge(row: MethodRow, figures: dict[str, float]) -> str:
    for name, value in figures.items():
        if name.startswith("neutral") and not value <= TOLERANCE:
            return f"{name}: {value:.1e} instead of at most {TOLERANCE:.0e}"
    changes_nothing = row.stage in ("read", "refine")
    if not changes_nothing and not _acts(figures):
        return "at its default strength the method changes nothing"
    if changes_nothing and figures.get("effect", 0.0) > TOLERANCE:
        return f"a method that must change nothing changes logits by {figures['effect']:.1e}"
    limit = max(ROWS_TOLERANCE, 4 * figures.get("rows alone, unwrapped", 0.0))
    if not figures.get("rows alone", 0.0) <= limit:
        return f"rows of a batch differ from the same rows alone by {figures['rows alone']:.1e} (at most {limit:.0e})"
    return ""
