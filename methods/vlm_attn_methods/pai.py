"""PAI: pay more attention to the image, and contrast with the prompt without it."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from vlm_attn.stages import Contrast, EditView, KeyMap, LogitMap, ModelInfo, method_dataclass

from ._layers import Layer, layer_range


@method_dataclass
class PAI(LogitMap, Contrast):
    """Raises the logits of visual keys by their own size, and guides decoding away from the text-only prompt.

    Logit part: ``z'_j = z_j + alpha |z_j|`` for visual keys j, all heads. Acts before mask and softmax (after a
    softcap), in the last row of every forward, layers ``first_layer..end_layer - 1``.

    Guidance part (``gamma != 1``): with ``s = log_softmax(l_image)``, ``u = log_softmax(l_text)`` the scores are
    ``gamma (s - u) + u``, forbidden where ``s < max s + log plausibility``. The text-only stream (image placeholders
    removed, positions compact) keeps its own cache and runs without edits. Acts on the logits inside ``generate``.

    Attributes:
        alpha: strength of the logit part (0 = none; 0.2 in the code, tuned per model).
        gamma: guidance strength (1 = none; 1.1 in the documented command, the flag's default is 2).
        first_layer: first edited layer.
        end_layer: end of the edited layers, exclusive; None = all.
        plausibility: plausibility threshold of the guidance part.

    Source: ECCV 2024, arXiv 2407.21771 and its released code.
    """

    name = "pai"
    summary = "raise the logits of visual keys; contrast with the prompt without its image"
    paper = "arXiv:2407.21771"
    stage = "edit"
    text_branch = True

    alpha: Annotated[float, Field(ge=0)] = 0.2
    gamma: Annotated[float, Field(ge=1)] = 1.1
    first_layer: Layer = 2
    end_layer: Layer | None = None
    plausibility: Annotated[float, Field(gt=0, le=1)] = 0.1

    @classmethod
    def neutral(cls) -> PAI:
        return cls(alpha=0.0, gamma=1.0, first_layer=0)

    @property
    def active(self) -> bool:
        return self.gamma != 1

    def resolve(self, model: ModelInfo, profile: object) -> PAI:
        first, end = layer_range(self.name, self.first_layer, self.end_layer, model)
        return self.with_values(first_layer=first, end_layer=end)

    def edit_layers(self, model: ModelInfo) -> frozenset[int]:
        return frozenset(range(*layer_range(self.name, self.first_layer, self.end_layer, model)))

    def key_map(self, view: EditView) -> KeyMap:
        return KeyMap(boost=self.alpha * view.tokens.vis.float())

    def combine(self, logits: Tensor, branch: Tensor) -> Tensor:
        with_image, text = logits.log_softmax(-1), branch.log_softmax(-1)
        out = self.gamma * (with_image - text) + text
        floor = with_image.amax(-1, keepdim=True) + math.log(self.plausibility)
        return torch.where(with_image < floor, float("-inf"), out)
