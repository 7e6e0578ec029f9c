"""SparseVLM: text tokens that the picture speaks to rate the visual tokens; what is pruned is recycled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from vlm_attn.kit import budgets
from vlm_attn.kit.mergers import dpc_knn, merge, survivors
from vlm_attn.kit.scores import text_raters
from vlm_attn.kit.selectors import complement, topk
from vlm_attn.profiles import Profile
from vlm_attn.selection import Keep, images
from vlm_attn.stages import Merged, ModelInfo, PruneView, RowScore, Site, method_dataclass
from vlm_attn.tokens import TokenMap

from ._debias import Debiased
from ._stages import check_lengths, stage_layers


@method_dataclass
class SparseVLM(Debiased):
    """Keeps the visual tokens that relevant text attends to; version 1.5 folds the best of the rest into clusters.

    Raters, once, on the input embeddings: ``m = column mean of softmax_text(E_V E_Q^T)``, raters = {t : m_t > mean m},
    Q = the text after the image. Score at layer l: ``a_i = mean over raters r of mean_h A^(l)[h, r, i]``.
    ``version="1.5"``: of the n pruned tokens the best ``int(0.3 n) + 1`` form ``int(that / 10) + 1`` density-peak
    clusters, each the plain average of its members. ``version="plus"``: no merging; ``A[q, s]`` is divided by
    ``R(q - s)`` (all-ones RoPE, clamped at 0.1), and only the 14 heads with most rater-to-picture mass count.

    Acts at the outputs of the decoder layers ``layers``, prefill only. Text is never dropped.

    Attributes:
        version: ``"1.5"`` (positions renumbered) or ``"plus"`` (version 2.0, positions kept).
        layers: scoring layers, 0-based; tokens leave at their outputs. None = 2, 6, 15 of 32, carried over.
        budget: nominal budget whose published list is used, scaled from 576 to the image's tokens [ours].
        keep: instead of the list: tokens left per image after each stage, before the recycled ones.
        positions: ``"renumber"`` or ``"keep"``; None = as the version does.
        seed: of the clusters' tie-breaking noise.
        calibrate: debiasing of the first stage: any of ``exp_trend``, ``grid_trend`` or ``mean_map``, ``pad_mask``,
            ``rope_free``, ``rope_ones``.
        sigma: strength of the positional trend; None reads it from the checkpoint's profile.
        grid_sigma: the same for ``grid_trend``, of rows and of columns.
        mean: the same for ``mean_map``, place by place.

    Source: arXiv 2410.04417, released versions 1.5 and 2.0; debiasing arXiv 2508.17807.
    Deviations: a recycled token stands at its cluster centre's place, not behind all kept tokens; decoding continues
    from the renumbered length; ties go to the earlier token.
    """

    name = "sparsevlm"
    summary = "prune visual tokens by the attention of relevant text, recycle the best of the rest"
    paper = "arXiv:2410.04417"
    needs = ("trend (only with calibrate=['exp_trend'])",)

    version: Literal["1.5", "plus"] = "1.5"
    layers: Sequence[Annotated[int, Field(ge=0)]] | None = None
    budget: Literal[192, 128, 96, 64] = 192
    keep: Sequence[Keep] | None = None
    positions: Literal["renumber", "keep"] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0

    @classmethod
    def neutral(cls) -> SparseVLM:
        return cls(layers=(0,), keep=(1.0,))

    def resolve(self, model: ModelInfo, profile: Profile) -> SparseVLM:
        layers = stage_layers(self.name, self.layers, budgets.SPARSEVLM_LAYERS, model, offset=1)
        plus = self.version == "plus"
        lists = budgets.SPARSEVLM_PLUS if plus else budgets.SPARSEVLM
        keep = self.keep if self.keep is not None else [count / 576 for count in lists[self.budget]]
        check_lengths(self.name, layers, keep)
        positions = self.positions or ("keep" if plus else "renumber")
        return self.with_values(layers=layers, keep=tuple(keep), positions=positions).with_trend(profile)

    def sites(self) -> tuple[Site, ...]:
        how = {"rope": "ones", "heads": 14} if self.version == "plus" else {}
        scores = [self.first(n, rows="raters", **how) if i == 0 else RowScore(n, rows="raters", **how)  # type: ignore[arg-type]
                  for i, n in enumerate(self.layers or ())]  # fmt: skip
        return tuple(Site(s.layer + 1, s, hidden=self.version == "1.5") for s in scores)

    def rows(self, name: str, tokens: TokenMap, embeds: Tensor) -> Tensor:
        out = torch.zeros_like(tokens.vis)
        for row in range(tokens.batch):
            text = tokens.sees_image[row].nonzero()[:, 0]
            if text.numel():
                out[row, text] = text_raters(embeds[row, text], embeds[row, tokens.vis[row]])
        return out

    def keep_mask(self, view: PruneView) -> Merged:
        scores, shown = self.debiased(view), self.shown(view)
        stage = [s.layer for s in self.sites()].index(view.site.layer)
        out = torch.zeros_like(view.tokens.vis)
        hidden = None if view.hidden is None else view.hidden.clone()
        for row, slots, total in images(view.tokens):
            slots = slots if shown is None else slots[shown[row, slots]]
            k = min(budgets.budget((self.keep or ())[stage], total), slots.numel())
            chosen = topk(scores[row, slots], k)
            out[row, slots[chosen]] = True
            taken, clusters = budgets.recycled(slots.numel() - k)
            if hidden is not None and taken:
                rest = slots[complement(chosen, slots.numel())]
                rest = rest[topk(scores[row, rest], taken)]
                parent = dpc_knn(hidden[row, rest], clusters, seed=self.seed)
                hidden[row, rest] = merge(hidden[row, rest], parent)
                out[row, rest[survivors(parent)]] = True
        return Merged(out, hidden)
