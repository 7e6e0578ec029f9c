"""AD-HH: cut the text off from heads that hallucinate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from vlm_attn.ops import Mix
from vlm_attn.profiles import Profile
from vlm_attn.stages import EditView, ModelInfo, SegmentEdit, method_dataclass

from ._layers import Pairs, check_pairs, heads_of


@method_dataclass
class ADHH(SegmentEdit):
    """Adaptive deactivation of hallucination heads: where such a head looks at the text, that part is dropped.

    For a listed head, last row: if ``M_T = sum_{j in T} A_j >= threshold``, the weights on T become 0 without
    renormalising, ``O' = O - M_T O_T``. T = text keys after the last visual token, generated tokens included.

    Acts after the softmax, in the last row of every forward.

    Attributes:
        heads: hallucination heads, (layer, head) pairs; None reads the checkpoint's profile.
        threshold: least text mass of a head that is cut (0.4; 0.5 for MiniGPT-4; above 1 = no change).
        renormalise: scale the remaining weights to sum 1 (the code does not).

    Source: ICLR 2025 and its released code; its list for LLaVA-1.5-7B holds 20 heads. How to find heads of other
    checkpoints is not described in what was read: ``vlm-attn calibrate CHECKPOINT --for adhh`` takes those whose
    cutting raises the margin of the right answer most [ours].
    """

    name = "adhh"
    summary = "drop the text part of listed hallucination heads when it is large"
    paper = "ICLR 2025"
    needs = ("adhh (heads)",)
    segments = 2
    generated = 1
    rows = "last"
    redistributes = False

    heads: Pairs | None = None
    threshold: Annotated[float, Field(ge=0)] = 0.4
    renormalise: bool = False

    @classmethod
    def neutral(cls) -> ADHH:
        return cls(heads=((0, 0),), threshold=2.0)

    def resolve(self, model: ModelInfo, profile: Profile) -> ADHH:
        heads = profile.need("adhh", self.name)["heads"] if self.heads is None else self.heads
        return self.with_values(heads=check_pairs(self.name, "heads", heads, model))

    def edit_layers(self, model: ModelInfo) -> frozenset[int]:
        return frozenset(pair[0] for pair in self.heads or ())

    def heads_at(self, layer: int) -> Sequence[int]:
        return heads_of(self.heads or (), layer)

    def labels(self, view: EditView) -> Tensor:
        return view.tokens.qry.to(torch.uint8)

    def scales(self, masses: Tensor, counts: Tensor) -> Tensor:
        others, text = masses[..., 0], masses[..., 1]
        cut, gain = text >= self.threshold, torch.ones_like(text)
        if self.renormalise:
            cut &= others > 0
            gain = 1 / others.clamp(min=torch.finfo(torch.float32).tiny)
        return torch.where(cut[..., None], torch.stack([gain, torch.zeros_like(text)], dim=-1), 1.0)

    def mix(self, counts: Tensor) -> tuple[Mix, Tensor]:
        receivers = (0,) if self.renormalise else ()
        whole = torch.ones(len(counts), dtype=torch.bool, device=counts.device)
        return Mix((1,), receivers, 0.0, gate_min=self.threshold), whole
