"""FEATHER: rank by attention without rotary positions, and keep a uniform grid beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from vlm_attn.kit.budgets import floor_share
from vlm_attn.kit.selectors import grid_stride, topk, union
from vlm_attn.profiles import Profile
from vlm_attn.selection import images
from vlm_attn.stages import ModelInfo, PruneView, RowScore, Site, method_dataclass

from ._debias import Debiased, Positional
from ._stages import check_lengths, stage_layers


@method_dataclass
class Feather(Debiased):
    """Keeps the tokens that the last prompt token finds without rotary positions, united with a coarse uniform grid.

    Formula: before layer K, ``a_i = mean_h softmax over visual keys (q_last . k_i)``, query and keys of layer K - 1
    from its normed input **without** RoPE, fp32. First stage: top ``int(keep_1 N)`` united with every cell whose row
    and column are multiples of ``stride`` (the union may exceed the budget). Later stages: top
    ``int(keep_j n_current)``.

    Acts at the input of the decoder layers ``layers``, prefill only; original positions are kept, text is never
    dropped.

    Attributes:
        layers: layers whose input is cut, 0-based, at least 1; None = 8, 16 of 32, carried over to the model's depth.
        keep: share of the image's tokens (first stage), then of those left.
        stride: of the uniform grid, in both directions.
        calibrate: debiasing of the first stage: any of ``exp_trend``, ``grid_trend`` or ``mean_map``, ``pad_mask``
            (which the grid obeys too); the score is free of rotary positions as it is.
        sigma: strength of the positional trend; None reads it from the checkpoint's profile.
        grid_sigma: the same for ``grid_trend``, of rows and of columns.
        mean: the same for ``mean_map``, place by place.

    Source: arXiv 2412.13180 (ICCV 2025), released code; debiasing arXiv 2508.17807.
    Deviations: tokens without a cell (row ends, separators, query tokens) are in no grid; on tiles and frames each
    view has a grid of its own; ties go to the earlier token.
    """

    name = "feather"
    summary = "prune visual tokens by position-free attention, a uniform grid kept beside"
    paper = "arXiv:2412.13180"
    needs = ("trend (only with calibrate=['exp_trend'])",)

    layers: Sequence[Annotated[int, Field(ge=1)]] | None = None
    keep: Sequence[Annotated[float, Field(gt=0, le=1)]] = (0.3, 0.09)
    stride: Annotated[int, Field(ge=1)] = 3
    calibrate: Sequence[Positional] = ()

    @classmethod
    def neutral(cls) -> Feather:
        return cls(layers=(1,), keep=(1.0,))

    def resolve(self, model: ModelInfo, profile: Profile) -> Feather:
        layers = stage_layers(self.name, self.layers, (8, 16), model)
        check_lengths(self.name, layers, self.keep)
        return self.with_values(layers=layers).with_trend(profile)

    def sites(self) -> tuple[Site, ...]:
        return tuple(Site(layer, RowScore(layer - 1, rope="free")) for layer in self.layers or ())

    def keep_mask(self, view: PruneView) -> Tensor:
        tokens, stage = view.tokens, list(self.layers or ()).index(view.site.layer)
        scores, shown, out = self.debiased(view), self.shown(view), torch.zeros_like(tokens.vis)
        for row, all_slots, total in images(tokens):
            slots = all_slots if shown is None else all_slots[shown[row, all_slots]]
            k = floor_share(total if stage == 0 else all_slots.numel(), self.keep[stage])
            chosen = topk(scores[row, slots], k)
            if stage == 0:
                chosen = union(chosen, grid_stride(tokens.cell[row, slots], self.stride))
            out[row, slots[chosen]] = True
        return out
