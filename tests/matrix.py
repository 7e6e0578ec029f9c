"""The test matrix: one row per method. A method without a row here fails `test_architecture.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests import models
from tests.matrix_pruning import PRUNING
from tests.reference import edits, edits_heads, edits_logits, edits_rows, pruning
from tests.reference.llava import Dense

SINKS = {"sink_dims": (3, 7), "tau": 1.6}  # the tiny random models have sinks there
GIFT = {"content_only": False, "suffix_tokens": 2}
HEADS = [[0, 1], [1, 0], [1, 2], [2, 3], [3, 1]]
Reference = Callable[[Any, dict[str, Any], Any, int], Dense]


@dataclass(frozen=True)
class Row:
    """How a method is tested.

    Attributes:
        default: per-checkpoint data only, all else at the method's defaults.
        variants: parameters for the comparison with the dense reference.
        reference: dense reference for (model, parameters, session facts, row of the batch), if it acts on logits.
        acts_on: "logits" (raw), "scores" (after the decode stage), "picture" (before the processor) or "nothing".
        pictures: pictures a prompt must have for the method to act.
        generates_only: acts inside `generate` alone, and without beams.
    """

    default: dict[str, Any] = field(default_factory=dict)
    variants: tuple[dict[str, Any], ...] = ({},)
    reference: Reference | None = None
    acts_on: str = "logits"
    pictures: int = 1
    generates_only: bool = False

    @property
    def batch(self) -> models.Batch:
        """A padded batch on which the method has something to do."""
        return models.padded() if self.pictures == 1 else models.pairs()


def given_kept(model: Any, params: dict[str, Any], last: Any, row: int) -> Dense:
    """Masking with the kept set that the session reports."""
    layer = params.get("layer", 2)
    pad = int((~last.tokens.valid[row]).sum())
    return pruning.Masked(model, layer, [last.kept(layer)[row] - pad])


def fastv(model: Any, params: dict[str, Any], last: Any, row: int) -> Dense:
    """Own selection."""
    return pruning.FastV(model, params.get("layer", 2), params.get("keep", 0.5))


class GivenDonors(edits.Var):
    """Redistribution whose donors come from elsewhere."""

    donors: dict[int, Tensor]

    def on_layer_input(self, layer: int, x: Tensor, prefill: bool) -> None:
        """Takes the donors as given."""
        if prefill and layer in self.layers:
            self.sinks[layer] = self.donors[layer]


def placebo(model: Any, params: dict[str, Any], last: Any, row: int) -> Dense:
    """VAR's redistribution with the donors that the session drew."""
    allowed = {"visual_mass_min", "rho_nonsink", "keep", "first_layer", "skip_last"}
    reference = GivenDonors(model, (0,), 0.0, **{k: v for k, v in params.items() if k in allowed})
    pad = int((~last.tokens.valid[row]).sum())
    reference.donors = {layer: labels[row, pad:] >= 2 for (_, layer), labels in last.labels.items()}
    return reference


MATRIX: dict[str, Row] = {
    "noop": Row(reference=lambda model, params, last, row: Dense(model), acts_on="nothing"),
    "fastv": Row(
        variants=({}, {"layer": 1, "keep": 5}, {"layer": 3, "keep": 0.25}, {"keep": 1}, {"keep": "auto"}),
        reference=fastv,
    ),
    "random_prune": Row(
        variants=({}, {"layer": 0, "keep": 5}, {"layer": 3, "keep": 0.25, "seed": 3}),
        reference=given_kept,
    ),
    "uniform_prune": Row(variants=({}, {"layer": 0, "keep": 5}, {"layer": 1, "keep": 0.25}), reference=given_kept),
    **{name: Row(**row) for name, row in PRUNING.items()},
    "var": Row(
        default=SINKS,
        variants=(
            SINKS,
            {**SINKS, "keep": 0.0, "first_layer": 0, "skip_last": False},
            {**SINKS, "include_text_sinks": False, "need_visual_sink": False, "visual_mass_min": 0.4},
            {**SINKS, "rho_nonsink": 0.8, "first_layer": 1},
        ),
        reference=lambda model, params, last, row: edits.Var(model, **params),
    ),
    "placebo": Row(default={}, variants=({}, {"first_layer": 1, "keep": 0.1}), reference=placebo),
    "vhr": Row(
        variants=(
            {},
            {"alpha": 0.5, "last_layers": 1, "filter_outliers": False},
            {"include_layer1": False, "distance": "l2_squared"},
            {"text_stream": "paired", "last_layers": 3},
        ),
        reference=lambda model, params, last, row: edits.Vhr(model, **params),
    ),
    # guidance off: it has tests of its own, beside the other contrasts
    "pai": Row(
        default={"gamma": 1.0},
        variants=({"gamma": 1.0}, {"gamma": 1.0, "alpha": 0.7, "first_layer": 0, "end_layer": 3}),
        reference=lambda model, params, last, row: edits_logits.Pai(model, **params),
    ),
    "paint": Row(
        variants=(
            {},
            {"alpha": 0.4, "beta": 0.9, "iqr_factor": 0.2, "spatial_ratio": 0.2, "first_layer": 0, "end_layer": 3},
        ),
        reference=lambda model, params, last, row: edits_logits.Paint(model, **params),
    ),
    "vaf": Row(
        variants=({}, {"enh": 1.6, "sup": 0.5, "layers": [0, 3]}),
        reference=lambda model, params, last, row: edits_logits.Vaf(model, **params),
    ),
    "vas_boost": Row(
        variants=({}, {"image": 0.6, "system": 1.0, "layers": [1, 2]}),
        reference=lambda model, params, last, row: edits_logits.VasBoost(model, **params),
    ),
    "zerotuning": Row(
        default={"gamma": 2.0},
        variants=(
            {"gamma": 2.0},
            {"gamma": 0.3, "heads": [[0, 1], [1, 3], [1, 0], [3, 2]]},
            {"gamma": 4.0, "layers": [1, 2], "heads": "all"},
        ),
        reference=lambda model, params, last, row: edits_logits.ZeroTuning(model, **params),
    ),
    "adhh": Row(
        default={"heads": HEADS},
        variants=({"heads": HEADS}, {"heads": HEADS, "threshold": 0.1, "renormalise": True}),
        reference=lambda model, params, last, row: edits_heads.Adhh(model, **params),
    ),
    "head_gate": Row(
        default={"heads": HEADS},
        variants=(
            {"heads": HEADS},
            {"heads": HEADS, "mode": "block"},
            {"heads": HEADS, "mode": "block", "drop": "context", "where": "text"},
            {"heads": HEADS, "mode": "block", "drop": "output"},
        ),
        reference=lambda model, params, last, row: edits_heads.HeadGate(model, **params),
    ),
    "act": Row(
        default={"heads": "all"},
        variants=(
            {"heads": "all", "alpha": 2.5, "first_layer": 0},
            {
                "heads": HEADS,
                "beta": 0.0,
                "first_layer": 1,
                "theta_mode": "absolute",
                "theta": 0.12,
                "scope": "visual",
            },
        ),
        reference=lambda model, params, last, row: edits_heads.Act(model, **params),
    ),
    # tiny models have no words: which tokens make up the question is given, not read
    "gift": Row(
        default={**GIFT, "saliency_layer": 1, "enhance_layers": [2, 3]},
        variants=(
            {**GIFT, "saliency_layer": 1, "enhance_layers": [2, 3]},
            {**GIFT, "saliency_layer": 2, "enhance_layers": [0, 1, 3], "alpha": 2.0, "beta": 0.5},
            {**GIFT, "saliency_layer": 1, "enhance_layers": [1], "beta": None, "head_fraction": 0.3},
        ),
        reference=lambda model, params, last, row: edits_rows.Gift(model, **params),
    ),
    # in the first layer of the tiny models several heads see text alone, so that a choice among them is a tie
    "ilvad": Row(
        default={"tau": 2.0, "first_layer": 1},
        variants=(
            {"tau": 2.0, "first_layer": 1},
            {"tau": 2.0, "beta": 0.3, "draft": 4, "alpha": 2.0, "first_layer": 1, "end_layer": 4, "prompt_row": False},
        ),
        reference=lambda model, params, last, row: edits_rows.Ilvad(model, **params),
        generates_only=True,
    ),
    "sofa": Row(
        variants=({}, {"mode": "output", "sigma": 0.7, "layer_stride": 1}, {"intra_image": True, "sigma": 1.0}),
        reference=lambda model, params, last, row: edits_heads.Sofa(model, **params),
        pictures=2,
    ),
    "vcd": Row(variants=({}, {"alpha": 0.5, "beta": 0.3, "noise_step": 800}), acts_on="scores"),
    "carve": Row(acts_on="picture"),
}

TENSOR_METHODS = [name for name, row in MATRIX.items() if row.reference is not None]


def visual_kept(last: Any, layer: int, row: int) -> list[int]:
    """Kept visual ranks `0..N-1` of one sample."""
    return last.kept_visual(layer)[row].tolist()


def batch_inputs(kind: str) -> tuple[models.Batch, dict[str, torch.Tensor]]:
    """Batch and keyword arguments by name."""
    batch = models.BATCHES[kind]()
    return batch, batch.inputs()
