"""PAINT: raise the attention on patches that the vision encoder itself finds important."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from vlm_attn.stages import EditView, EncoderScore, KeyMap, LogitMap, ModelInfo, method_dataclass
from vlm_attn.tokens import TokenMap

from ._layers import Layer, layer_range


@method_dataclass
class Paint(LogitMap):
    """Boosts the logits of local and summary tokens, chosen per image by the vision encoder's attention.

    Local: the top ``int(local_ratio N)`` patches by the class token's attention in encoder layer ``vit_local_layer``,
    joined by the top ``int(spatial_ratio N)`` by the attention received from all patches there. Summary: with the
    class token's attention in ``vit_summary_layer``, as many top patches as lie above ``Q3 + iqr_factor (Q3 - Q1)``;
    they leave the local set. Then ``z'_j = z_j + alpha |z_j|`` (local), ``z_j + beta |z_j|`` (summary), all heads.

    Acts before mask and softmax, in the last row of every forward, layers ``first_layer..end_layer - 1``.

    Attributes:
        alpha: strength on local tokens (0 = none). Useful values lie close together: at 0.8 F1 falls to 51 [paper].
        beta: strength on summary tokens (0 = none); 0.3 in the code, 0.4 the paper's best row.
        local_ratio: share of local tokens.
        spatial_ratio: share of spatial tokens (0.05 in the paper's variant).
        iqr_factor: distance of the summary threshold in interquartile ranges.
        vit_local_layer: encoder layer of local and spatial tokens.
        vit_summary_layer: encoder layer of summary tokens, counted from the end if negative.
        first_layer: first edited layer.
        end_layer: end of the edited layers, exclusive; None = all.

    Source: arXiv 2501.12206 and its released code.
    Deviations: spatial tokens follow the paper's intent (the code sums each softmax row to 1 and ranks a constant);
    encoders without class token: mean attention from all patches stands in [unverified]; the code's guidance stream
    is left out. Only encoders whose patches are the visual tokens, one for one.
    """

    name = "paint"
    summary = "raise logits of patches that the vision encoder attends to (local and summary tokens)"
    paper = "arXiv:2501.12206"

    alpha: Annotated[float, Field(ge=0)] = 0.7
    beta: Annotated[float, Field(ge=0)] = 0.4
    local_ratio: Annotated[float, Field(ge=0, le=1)] = 0.25
    spatial_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    iqr_factor: Annotated[float, Field(ge=0)] = 1.5
    vit_local_layer: int = 0
    vit_summary_layer: int = -2
    first_layer: Layer = 2
    end_layer: Layer | None = None

    @classmethod
    def neutral(cls) -> Paint:
        return cls(alpha=0.0, beta=0.0, first_layer=0)

    def resolve(self, model: ModelInfo, profile: object) -> Paint:
        first, end = layer_range(self.name, self.first_layer, self.end_layer, model)
        return self.with_values(first_layer=first, end_layer=end)

    def edit_layers(self, model: ModelInfo) -> frozenset[int]:
        return frozenset(range(*layer_range(self.name, self.first_layer, self.end_layer, model)))

    @property
    def encoder_scores(self) -> tuple[EncoderScore, ...]:
        if self.alpha == 0 and self.beta == 0:
            return ()
        spatial = (EncoderScore(self.vit_local_layer, "patches"),) if self.spatial_ratio else ()
        return EncoderScore(self.vit_local_layer), EncoderScore(self.vit_summary_layer), *spatial

    def key_map(self, view: EditView) -> KeyMap:
        if not view.encoder:
            return KeyMap()
        local, summary, *spatial = (view.encoder[score] for score in self.encoder_scores)
        boost = torch.zeros(local.shape, device=local.device)
        for row, slots in _images(view.prompt):
            chosen = top(local[row, slots], int(self.local_ratio * slots.numel()))
            for received in spatial:
                chosen |= top(received[row, slots], int(self.spatial_ratio * slots.numel()))
            key = summary[row, slots]
            low, high = key.quantile(key.new_tensor([0.25, 0.75]))
            outlying = top(key, int((key > high + self.iqr_factor * (high - low)).sum()))
            values = torch.where(chosen, self.alpha, 0.0)
            boost[row, slots] = torch.where(outlying, self.beta, values).to(boost.device)
        return KeyMap(boost=boost.gather(1, view.tokens.index) * view.tokens.vis)


def top(values: Tensor, count: int) -> Tensor:
    """bool ``[n]`` of the ``count`` largest values, earlier ones first among equals."""
    out = torch.zeros(values.shape, dtype=torch.bool, device=values.device)
    out[values.argsort(descending=True, stable=True)[:count]] = True
    return out


def _images(tokens: TokenMap) -> list[tuple[int, Tensor]]:
    """(sample, slots) of every image."""
    return [
        (row, ((tokens.img_id[row] == image) & tokens.vis[row]).nonzero()[:, 0])
        for row in range(tokens.batch)
        for image in range(tokens.images(row))
    ]
