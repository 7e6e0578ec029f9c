"""VAF: amplify the logits of visual keys and damp those of the system prompt, in middle layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field

from vlm_attn.stages import EditView, KeyMap, LogitMap, ModelInfo, method_dataclass

from ._layers import Layer, check_layers, transferred


@method_dataclass
class VAF(LogitMap):
    """Visual amplification fusion: scale the attention logits of image and system keys where modalities meet.

    ``z'_j = enh z_j`` for visual keys, ``z'_j = sup z_j`` for keys before the first image, all heads. A negative logit
    of a visual key thus falls. Acts before mask and softmax, in text rows that see the image, prefill and decode.

    Attributes:
        enh: factor of visual keys (1 = no change).
        sup: factor of keys before the image (1 = no change).
        layers: edited layers; None means 9..14 of 32, by relative depth in other models [unverified].

    Source: ClearSight, CVPR 2025 (arXiv 2503.13107) and its released code.
    Deviations: several images: every text row behind the first of them counts as a row after the image.
    """

    name = "vaf"
    summary = "amplify logits of visual keys, damp those of the system prompt, in middle layers"
    paper = "arXiv:2503.13107"
    rows = "sees_image"

    enh: Annotated[float, Field(ge=0)] = 1.15
    sup: Annotated[float, Field(ge=0)] = 0.95
    layers: Sequence[Layer] | None = None

    @classmethod
    def neutral(cls) -> VAF:
        return cls(enh=1.0, sup=1.0)

    def resolve(self, model: ModelInfo, profile: object) -> VAF:
        layers = transferred(range(9, 15), 32, model) if self.layers is None else self.layers
        return self.with_values(layers=check_layers(self.name, layers, model))

    def edit_layers(self, model: ModelInfo) -> frozenset[int]:
        return frozenset(self.layers or ())

    def key_map(self, view: EditView) -> KeyMap:
        tokens = view.tokens
        scale = torch.ones(tokens.vis.shape, device=tokens.vis.device)
        return KeyMap(scale=scale.masked_fill(tokens.vis, self.enh).masked_fill(tokens.sys, self.sup))
