"""ZeroTuning: scale the attention that the first token receives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from vlm_attn.profiles import Profile
from vlm_attn.stages import EditView, KeyBias, ModelInfo, method_dataclass

from ._layers import Layer, Pairs, check_layers, check_pairs, heads_of


@method_dataclass
class ZeroTuning(KeyBias):
    """Multiplies the weight of the first token by ``gamma`` in chosen heads and renormalises.

    ``A'_0 = gamma A_0 / D``, ``A'_j = A_j / D``, ``D = 1 + (gamma - 1) A_0``: the same as adding ``log gamma`` to the
    logit of the first token's key. Acts in all rows, prefill and decode; "first" is the first valid token of each
    sample. Above 1 attention flattens over the rest less than before, below 1 it spreads.

    Attributes:
        gamma: factor (1 = no change); None reads gamma and heads from the checkpoint's profile.
        heads: ``"all"`` or (layer, head) pairs; None = those of the profile with ``gamma=None``, otherwise all.
        layers: ``"all"`` or the layers to act in.

    Heads are profiled on calibration questions (``vlm-attn calibrate CHECKPOINT --for zerotuning``): by accuracy
    (supervised) or by the entropy of the answer's distribution (``--by entropy``); the dominant type of head is
    kept, then gamma is searched on a grid.

    Source: ICLR 2026, arXiv 2505.11739 and its released code.
    Deviations: the code takes index 0, which is padding in a left-padded batch.
    """

    name = "zerotuning"
    summary = "scale the attention weight of the first token in chosen heads"
    paper = "arXiv:2505.11739"
    needs = ("zerotuning (only with gamma=None)",)

    gamma: Annotated[float, Field(gt=0)] | None = None
    heads: Pairs | Literal["all"] | None = None
    layers: Sequence[Layer] | Literal["all"] = "all"

    @classmethod
    def neutral(cls) -> ZeroTuning:
        return cls(gamma=1.0)

    def resolve(self, model: ModelInfo, profile: Profile) -> ZeroTuning:
        gamma, heads = self.gamma, self.heads
        if gamma is None:
            record = profile.need("zerotuning", self.name)
            gamma, heads = float(record["gamma"]), record["heads"] if heads is None else heads
        layers = range(model.layers) if isinstance(self.layers, str) else self.layers
        if heads is not None and not isinstance(heads, str):
            heads = check_pairs(self.name, "heads", heads, model)
        return self.with_values(gamma=gamma, heads=heads, layers=check_layers(self.name, layers, model))

    def edit_layers(self, model: ModelInfo) -> frozenset[int]:
        layers = frozenset(range(model.layers) if isinstance(self.layers, str) else self.layers)
        if self.heads is None or isinstance(self.heads, str):
            return layers
        return layers & {pair[0] for pair in self.heads}

    def heads_at(self, layer: int) -> Sequence[int] | None:
        return None if self.heads is None or isinstance(self.heads, str) else heads_of(self.heads, layer)

    def bias(self, view: EditView) -> Tensor:
        return math.log(self.gamma or 1.0) * view.tokens.first[:, None].float()
