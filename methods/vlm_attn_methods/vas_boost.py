"""The intervention of the visual attention score: logits of the image up, of the system prompt down."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field

from vlm_attn.stages import EditView, KeyMap, LogitMap, ModelInfo, method_dataclass

from ._layers import Layer, check_layers


@method_dataclass
class VasBoost(LogitMap):
    """Raises the visual attention score (image mass over system mass) by scaling attention logits.

    ``z'_j = (1 + image) z_j`` for visual keys, ``z'_j = (1 - system) z_j`` for keys of the system prompt (text before
    the first image, the first token included), all heads. Acts before mask and softmax, in every row, prefill and
    decode; executed as scaled keys in one fused call. Prompts without a system part are scaled on the image only.

    Attributes:
        image: ``a_img``, relative gain of visual keys (0 = no change) [unverified: the strength is not published].
        system: ``a_sys``, relative loss of system keys (0 = no change) [unverified].
        layers: edited layers or ``"all"`` [unverified].

    Source: arXiv 2603.03825; formula ``Z' = Z + a_img M_enh Z - a_sys M_sup Z`` from secondary text, read as
    pre-softmax logits [unverified]. The released repository holds the training loss only.
    """

    name = "vas_boost"
    summary = "scale logits of visual keys up and of the system prompt down, in every row"
    paper = "arXiv:2603.03825"
    rows = "all"

    image: Annotated[float, Field(ge=0)] = 0.15
    system: Annotated[float, Field(ge=0, le=1)] = 0.05
    layers: Sequence[Layer] | Literal["all"] = "all"

    @classmethod
    def neutral(cls) -> VasBoost:
        return cls(image=0.0, system=0.0)

    def resolve(self, model: ModelInfo, profile: object) -> VasBoost:
        layers = range(model.layers) if isinstance(self.layers, str) else self.layers
        return self.with_values(layers=check_layers(self.name, layers, model))

    def edit_layers(self, model: ModelInfo) -> frozenset[int]:
        return frozenset(range(model.layers) if isinstance(self.layers, str) else self.layers)

    def key_map(self, view: EditView) -> KeyMap:
        tokens = view.tokens
        scale = torch.ones(tokens.vis.shape, device=tokens.vis.device)
        return KeyMap(scale=scale.masked_fill(tokens.vis, 1 + self.image).masked_fill(tokens.sys, 1 - self.system))
