"""PyramidDrop: drop visual tokens in several stages, each scored by the layer that comes next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from vlm_attn.kit.budgets import floor_share
from vlm_attn.profiles import Profile
from vlm_attn.selection import select, top_k
from vlm_attn.stages import ModelInfo, PruneView, RowScore, Site, method_dataclass

from ._debias import Debiased
from ._stages import check_lengths, stage_layers


@method_dataclass
class PyramidDrop(Debiased):
    """Keeps a shrinking share of the visual tokens, ranked by the last prompt token's attention in the next layer.

    Formula: before layer l of stage j, ``a_i = mean_h softmax(q_last K^T)_i`` with that layer's own input norm,
    projections and rotary embedding; per image the top ``int(keep_j * N)`` stay, N being the image's first count.

    Acts at the input of the decoder layers ``layers``, prefill only: layer l is run dry up to its attention to read
    one row. Text is never dropped.

    Attributes:
        layers: layers whose input is cut, 0-based; None = 8, 16, 24 of 32, carried over to the model's depth.
        keep: share of each image's tokens left after each stage.
        positions: ``"renumber"`` closes the gaps after every stage, as released; ``"keep"`` leaves the original
            positions (the only choice on M-RoPE models).
        calibrate: debiasing of the first stage: any of ``exp_trend``, ``grid_trend`` or ``mean_map``, ``pad_mask``,
            ``rope_free``, ``rope_ones``.
        sigma: strength of the positional trend; None reads it from the checkpoint's profile.
        grid_sigma: the same for ``grid_trend``, of rows and of columns.
        mean: the same for ``mean_map``, place by place.

    Source: arXiv 2410.17247; debiasing arXiv 2508.17807.
    Deviations: ties go to the earlier token; left padding is supported; the released padding mask drops every cell
    that padding touches, here more than half of the cell must be padding.
    """

    name = "pyramiddrop"
    summary = "prune visual tokens in stages by the next layer's last-token attention"
    paper = "arXiv:2410.17247"
    needs = ("trend (only with calibrate=['exp_trend'])",)

    layers: Sequence[Annotated[int, Field(ge=1)]] | None = None
    keep: Sequence[Annotated[float, Field(gt=0, le=1)]] = (0.5, 0.25, 0.125)
    positions: Literal["renumber", "keep"] = "renumber"

    @classmethod
    def neutral(cls) -> PyramidDrop:
        return cls(layers=(1,), keep=(1.0,))

    def resolve(self, model: ModelInfo, profile: Profile) -> PyramidDrop:
        layers = stage_layers(self.name, self.layers, (8, 16, 24), model)
        check_lengths(self.name, layers, self.keep)
        return self.with_values(layers=layers).with_trend(profile)

    def sites(self) -> tuple[Site, ...]:
        layers = self.layers or ()
        scores = [self.first(layer) if i == 0 else RowScore(layer) for i, layer in enumerate(layers)]
        return tuple(Site(layer, score) for layer, score in zip(layers, scores, strict=True))

    def keep_mask(self, view: PruneView) -> Tensor:
        share = self.keep[list(self.layers or ()).index(view.site.layer)]
        return select(
            view.tokens, lambda total: floor_share(total, share), top_k(self.debiased(view)), self.shown(view)
        )
