"""TokenCarve: rank by attention and by what a token adds to the feature matrix; merge the weaker half."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field

from vlm_attn.kit.budgets import budget
from vlm_attn.kit.mergers import bipartite, merge, survivors
from vlm_attn.kit.scores import borda, svd_energy
from vlm_attn.kit.selectors import by_rank
from vlm_attn.profiles import Profile
from vlm_attn.selection import Keep, images
from vlm_attn.stages import Merged, ModelInfo, PruneView, Site, check_layer, method_dataclass

from ._debias import Debiased


@method_dataclass
class TokenCarve(Debiased):
    """Keeps the tokens that attention and information rank high together, and folds the next best into them.

    Formula: ``AV_i`` = last-row attention of layer K - 1; ``SV_i = sum_j |U_ij| s_j`` of the SVD of the visual rows
    that enter layer K; Borda: each ranking gives weights N..1, equal shares. For r tokens to keep: the best 1.5 r in
    order, upper half A, lower half B; each B token's best cosine match in A; the 0.5 r most similar B tokens merge
    into A (mean, the A token included), the rest of B stays.

    Acts at the input of decoder layer K = ``layer``, prefill only; survivors keep their original positions, text is
    never dropped. What leaves there also leaves the caches of the layers before K, so that generated tokens see the
    same kept set in every layer.

    Attributes:
        layer: K, 0-based, at least 1.
        keep: r, tokens left per image: a count, or a share in (0, 1].
        compact: whether those caches are shortened, as released; edits and readouts of generated tokens need False.
        calibrate: debiasing of the attention half: any of ``exp_trend``, ``grid_trend`` or ``mean_map``, ``pad_mask``,
            ``rope_free``, ``rope_ones``.
        sigma: strength of the positional trend; None reads it from the checkpoint's profile.
        grid_sigma: the same for ``grid_trend``, of rows and of columns.
        mean: the same for ``mean_map``, place by place.

    Source: arXiv 2503.10501; debiasing arXiv 2508.17807.
    Deviations: all layers before K are shortened, where the released code names layers 0 and 1; U and s come from the
    eigenvectors of the Gram matrix; ties go to the earlier token.
    """

    name = "tokencarve"
    summary = "prune by attention and information together, merge the weaker half of the best"
    paper = "arXiv:2503.10501"
    needs = ("trend (only with calibrate=['exp_trend'])",)

    layer: Annotated[int, Field(ge=1)] = 2
    keep: Keep = 0.2223
    compact: bool = True

    @classmethod
    def neutral(cls) -> TokenCarve:
        return cls(layer=1, keep=1.0)

    def resolve(self, model: ModelInfo, profile: Profile) -> TokenCarve:
        check_layer(self.name, "layer", self.layer, model, lowest=1)
        return self.with_trend(profile)

    @property
    def compacts(self) -> bool:
        return self.compact

    def sites(self) -> tuple[Site, ...]:
        return (Site(self.layer, self.first(self.layer - 1), hidden=True),)

    def keep_mask(self, view: PruneView) -> Merged:
        scores, shown, hidden = self.debiased(view), self.shown(view), view.features.clone()
        out = torch.zeros_like(view.tokens.vis)
        for row, all_slots, total in images(view.tokens):
            slots = all_slots if shown is None else all_slots[shown[row, all_slots]]
            n, r = slots.numel(), min(budget(self.keep, total), slots.numel())
            pool = min(n, r + r // 2)
            x = hidden[row, slots]
            order = by_rank(borda(scores[row, slots], svd_energy(x)))[:pool]
            upper, lower = order[: pool - pool // 2], order[pool - pool // 2 :]
            parent = bipartite(x, lower, upper, pool - r)
            hidden[row, slots] = merge(x, parent)
            chosen = order[survivors(parent)[order]]
            out[row, slots[chosen]] = True
        return Merged(out, hidden)
