"""Control for attention edits: redistribution away from random visual tokens."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from vlm_attn.stages import EditView, ModelInfo, SegmentEdit, check_layer, method_dataclass

from ._redistribution import RECEIVER, SEGMENTS, VISUAL_DONOR, redistribute


@method_dataclass
class Placebo(SegmentEdit):
    """Redistributes attention as sink redistribution does, but the donors are randomly chosen visual tokens.

    What an edit gains over this control is due to *which* tokens it takes attention from. Acts after the softmax in
    layers ``first_layer..L-2``, in text rows that see the image, prefill and decode. The donors depend on the seed,
    the layer and the number of visual tokens, never on the batch.

    Attributes:
        share: share of the visual tokens that donate.
        keep: share of their weight that donors keep (1 = no change).
        visual_mass_min: least visual mass of an edited row.
        rho_nonsink: least share of the visual mass outside the donors.
        first_layer: first edited layer.
        seed: seed of the choice.

    A control of this project; no publication.
    """

    name = "placebo"
    summary = "control: redistribute attention away from random visual tokens"
    segments = SEGMENTS

    share: Annotated[float, Field(gt=0, lt=1)] = 0.05
    keep: Annotated[float, Field(ge=0, le=1)] = 0.6
    visual_mass_min: Annotated[float, Field(ge=0, le=1)] = 0.2
    rho_nonsink: Annotated[float, Field(ge=0, le=1)] = 0.5
    first_layer: Annotated[int, Field(ge=0)] = 2
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0

    @classmethod
    def neutral(cls) -> Placebo:
        return cls(keep=1.0, first_layer=0)

    def resolve(self, model: ModelInfo, profile: object) -> Placebo:
        check_layer(self.name, "first_layer", self.first_layer, model)
        return self

    def edit_layers(self, model: ModelInfo) -> frozenset[int]:
        return frozenset(range(self.first_layer, model.layers - 1))

    def labels(self, view: EditView) -> Tensor:
        tokens = view.tokens
        labels = torch.zeros(tokens.vis.shape, dtype=torch.uint8, device=tokens.vis.device)
        for row in range(tokens.batch):
            slots = tokens.vis[row].nonzero()[:, 0]
            if slots.numel() == 0:
                continue
            labels[row, slots] = RECEIVER
            generator = torch.Generator().manual_seed(self.seed * 1009 + view.layer)
            count = max(1, round(self.share * slots.numel()))
            donors = torch.randperm(slots.numel(), generator=generator)[:count].to(slots.device)
            labels[row, slots[donors]] = VISUAL_DONOR
        return labels

    def scales(self, masses: Tensor, counts: Tensor) -> Tensor:
        return redistribute(masses, self.keep, self.visual_mass_min, self.rho_nonsink)
