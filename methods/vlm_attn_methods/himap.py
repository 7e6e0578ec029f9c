"""HiMAP: prune by attention from text first, among the visual tokens later."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field
from torch import Tensor

from vlm_attn.profiles import Profile
from vlm_attn.selection import Keep, select, top_k
from vlm_attn.stages import ModelInfo, PruneView, RowScore, Site, method_dataclass

from ._debias import Debiased
from ._stages import check_lengths, stage_layers


@method_dataclass
class HiMAP(Debiased):
    """Keeps the visual tokens that text reads early, then those that the remaining visual tokens read.

    Formula: before layer K1, ``a_i = sum over text rows t after the image of mean_h A^(K1-1)[h, t, i]``; before layer
    K2, ``a_i = sum over remaining visual rows v of mean_h A^(K2-1)[h, v, i]``; per image the top of each stays.

    Acts at the input of the decoder layers ``layers``, prefill only; original positions are kept, text is never
    dropped.

    Attributes:
        layers: (K1, K2), 0-based, at least 1; None = 2, 8 of 32, carried over to the model's depth.
        keep: tokens left per image after each stage: a count, or a share of its first count (288 and 72 of 576).
        calibrate: debiasing of the first stage: any of ``exp_trend``, ``grid_trend`` or ``mean_map``, ``pad_mask``,
            ``rope_free``, ``rope_ones``.
        sigma: strength of the positional trend; None reads it from the checkpoint's profile.
        grid_sigma: the same for ``grid_trend``, of rows and of columns.
        mean: the same for ``mean_map``, place by place.

    Source: arXiv 2503.13108, released code; debiasing arXiv 2508.17807.
    Deviations: works with the cache, which the released code does not; ties go to the earlier token. The second
    stage's causal sums favour early tokens, as they do there.
    """

    name = "himap"
    summary = "prune visual tokens by text attention early, by attention among themselves later"
    paper = "arXiv:2503.13108"
    needs = ("trend (only with calibrate=['exp_trend'])",)

    layers: Sequence[Annotated[int, Field(ge=1)]] | None = None
    keep: Sequence[Keep] = (0.5, 0.125)

    @classmethod
    def neutral(cls) -> HiMAP:
        return cls(layers=(1, 2), keep=(1.0, 1.0))

    def resolve(self, model: ModelInfo, profile: Profile) -> HiMAP:
        layers = stage_layers(self.name, self.layers, (2, 8), model)
        check_lengths(self.name, layers, self.keep)
        if len(layers) != 2:
            raise ValueError(f"{self.name}: layers={list(layers)} must name two layers, (K1, K2)")
        return self.with_values(layers=layers).with_trend(profile)

    def sites(self) -> tuple[Site, ...]:
        if not self.layers:
            return ()
        k1, k2 = self.layers
        return (
            Site(k1, self.first(k1 - 1, rows="text", over="sum")),
            Site(k2, RowScore(k2 - 1, rows="visual", over="sum")),
        )

    def keep_mask(self, view: PruneView) -> Tensor:
        budget = self.keep[list(self.layers or ()).index(view.site.layer)]
        return select(view.tokens, budget, top_k(self.debiased(view)), self.shown(view))
