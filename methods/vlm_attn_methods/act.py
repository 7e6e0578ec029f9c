"""ACT: take attention from sinks in the middle of the text and give it to everything else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from vlm_attn.ops import Mix
from vlm_attn.profiles import Profile
from vlm_attn.stages import EditView, ModelInfo, SegmentEdit, check_layer, method_dataclass

from ._layers import Layer, Pairs, check_pairs, heads_of


@method_dataclass
class ACT(SegmentEdit):
    """Attention calibration: per head, weights on keys that attract attention from everywhere shrink.

    Column mean of key k: ``abar_k``, the mean weight it receives from the valid rows that see it. Sinks:
    ``S = {k : abar_k > theta}`` without the first token, ``theta = alpha / N`` with N valid tokens. Every row: weights
    on S times ``beta``; the others ``A_k (1 + (1 - beta) M_S / (1 - M_S))``, the first token among them.

    Acts after the softmax in listed heads of layers ``first_layer..L-2``, in all rows of the prefill; in decoding S
    is frozen and the new row is calibrated [ours: the released function degenerates for a single row].

    Attributes:
        beta: share of their weight that sinks keep (1 = no change).
        theta_mode: ``"alpha_over_n"`` (paper) or ``"absolute"`` (code).
        alpha: numerator of theta. theta: absolute threshold.
        first_layer: first edited layer; the last layer is never edited.
        heads: (layer, head) pairs or ``"all"``; None reads the checkpoint's profile.
        scope: which keys may be sinks: ``"all"``, ``"visual"`` or ``"text"``.

    Heads are searched with ``vlm-attn calibrate CHECKPOINT --for act``: one head at a time, those that raise accuracy
    on calibration questions are kept. The released lists are for text models.

    Source: ICML 2024, arXiv 2406.15765 and its released code.
    Deviations: the first valid token is left out of S (the code leaves out the first sink it finds, which loses a
    true sink when the initial token is none); samples of a batch and padding are kept apart.
    """

    name = "act"
    summary = "shrink attention to sinks other than the first token, head by head"
    paper = "arXiv:2406.15765"
    needs = ("act (heads)",)
    segments = 2
    rows = "all"
    wants_columns = True

    beta: Annotated[float, Field(ge=0)] = 0.4
    theta_mode: Literal["alpha_over_n", "absolute"] = "alpha_over_n"
    alpha: Annotated[float, Field(gt=0)] = 5.0
    theta: Annotated[float, Field(gt=0)] = 0.1
    first_layer: Layer = 2
    heads: Pairs | Literal["all"] | None = None
    scope: Literal["all", "visual", "text"] = "all"

    @classmethod
    def neutral(cls) -> ACT:
        return cls(beta=1.0, heads="all", first_layer=0)

    def resolve(self, model: ModelInfo, profile: Profile) -> ACT:
        check_layer(self.name, "first_layer", self.first_layer, model)
        heads = profile.need("act", self.name)["heads"] if self.heads is None else self.heads
        if not isinstance(heads, str):
            heads = check_pairs(self.name, "heads", heads, model)
        return self.with_values(heads=heads)

    def edit_layers(self, model: ModelInfo) -> frozenset[int]:
        layers = frozenset(range(self.first_layer, model.layers - 1))
        if self.heads is None or isinstance(self.heads, str):
            return layers
        return layers & {pair[0] for pair in self.heads}

    def heads_at(self, layer: int) -> Sequence[int] | None:
        return None if self.heads is None or isinstance(self.heads, str) else heads_of(self.heads, layer)

    def labels(self, view: EditView) -> Tensor:
        if view.columns is None:
            raise ValueError("act ran without column means: attach it with vlm_attn.attach or wrap")
        tokens = view.tokens
        allowed = tokens.valid & ~tokens.first
        if self.scope != "all":
            allowed &= tokens.vis if self.scope == "visual" else ~tokens.vis
        length = tokens.valid.sum(1)[:, None, None]
        limit = self.alpha / length if self.theta_mode == "alpha_over_n" else self.theta
        return ((view.columns > limit) & allowed[:, None]).to(torch.uint8)

    def scales(self, masses: Tensor, counts: Tensor) -> Tensor:
        others, sinks = masses[..., 0], masses[..., 1]
        alone = others < torch.finfo(torch.float32).tiny  # nothing there to take what the sinks give up
        gain = torch.addcdiv(torch.ones_like(others), sinks, others, value=1 - self.beta)
        scales = torch.stack([gain, torch.full_like(gain, self.beta)], dim=-1)
        return scales.masked_fill_(alone[..., None], 1.0)

    def mix(self, counts: Tensor) -> tuple[Mix, Tensor] | None:
        whole = torch.ones(len(counts), dtype=torch.bool, device=counts.device)
        return (Mix((1,), (0,), self.beta), whole) if self.beta <= 1 else None
