"""SpAtten: tokens and heads leave in cascade, by what attention has given them so far."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor

from vlm_attn.kit.budgets import cascade
from vlm_attn.kit.scores import head_importance
from vlm_attn.kit.selectors import masked, topk
from vlm_attn.profiles import Profile
from vlm_attn.selection import Keep, select, top_k
from vlm_attn.stages import ModelInfo, PruneView, RowScore, Site, method_dataclass

from ._debias import Debiased, Positional
from ._stages import stage_layers


@method_dataclass
class SpAtten(Debiased):
    """Drops the visual tokens, and silences the heads, that mattered least in all layers before.

    Formula: token importance ``s_i = sum over layers so far, live heads h and rows q of A[h, q, i]``, post-softmax;
    head importance ``= sum over layers so far of sum |head output|``. Before layer l the ``n_l`` most important
    visual tokens of each image and the ``H_l`` most important heads stay; what left stays away.

    Acts at the input of the decoder layers ``layers``, prefill only: in equal steps the number of tokens falls to
    ``keep`` at the last of them, the number of heads likewise to ``keep_heads`` [ours: the paper tunes ratios per
    task]. Original positions are kept, text is never dropped.

    Attributes:
        layers: layers whose input is cut, 0-based, at least 1; None = every layer from 2 on.
        keep: tokens left per image in the end: a count, or a share in (0, 1].
        keep_heads: share of the query heads that is left in the end, in (0, 1].
        calibrate: debiasing of the importance: any of ``exp_trend``, ``grid_trend`` or ``mean_map``, ``pad_mask``; at
            every cut, since all of them rank by one running sum [ours]. Rotary variants are not offered: rows before
            the picture have no softmax over visual keys alone.
        sigma: strength of the positional trend; None reads it from the checkpoint's profile.
        grid_sigma: the same for ``grid_trend``, of rows and of columns.
        mean: the same for ``mean_map``, place by place.

    Source: arXiv 2012.09852 (HPCA 2021); debiasing arXiv 2508.17807.
    Deviations: text tokens are never dropped; a silenced head is still computed and its output zeroed, and it stays
    silent in decoding; local pruning of values and progressive quantisation, which need the hardware, are left out;
    scores are post-softmax, as in the paper, the released port's are not. Every row of every layer is read in exact
    arithmetic, so that choosing costs about as much as the attention it reads.
    """

    name = "spatten"
    summary = "prune visual tokens and heads in cascade by cumulative importance"
    paper = "arXiv:2012.09852"
    needs = ("trend (only with calibrate=['exp_trend'])",)
    cuts_heads = True

    layers: Sequence[Annotated[int, Field(ge=1)]] | None = None
    keep: Keep = 0.3334
    keep_heads: Annotated[float, Field(gt=0, le=1)] = 0.75
    calibrate: Sequence[Positional] = ()

    @classmethod
    def neutral(cls) -> SpAtten:
        return cls(layers=(1,), keep=1.0, keep_heads=1.0)

    def resolve(self, model: ModelInfo, profile: Profile) -> SpAtten:
        every = tuple(range(min(2, model.layers - 1), model.layers))
        layers = stage_layers(self.name, self.layers or every, (), model)
        return self.with_values(layers=layers).with_trend(profile)

    def sites(self) -> tuple[Site, ...]:
        last = max(self.layers or (1,))
        return tuple(Site(n, RowScore(n - 1, rows="all", over="sum", per_head=True)) for n in range(1, last + 1))

    def scored(self) -> Site:
        return next(site for site in self.sites() if site.layer in (self.layers or ()))

    @property
    def trend_id(self) -> str:
        return f"all_rows@0..{self.scored().layer - 1}-sum"

    def ranking(self, view: PruneView) -> Tensor:
        notes, tokens, scores = view.memory, view.tokens, super().ranking(view)
        weights = scores if view.heads is None else scores * view.heads[..., None]
        total = notes.get("importance")
        if total is None:
            total = weights.new_zeros(tokens.batch, int(tokens.index.max()) + 1)
        # Counted in places of the prompt, so that it survives every cut.
        total = notes["importance"] = total.scatter_add(1, tokens.index, weights.sum(1) * tokens.valid)
        return total.gather(1, tokens.index)

    def keep_mask(self, view: PruneView) -> Tensor:
        scores, layer = self.without_trend(view, self.ranking(view)), view.site.layer
        if layer not in (self.layers or ()):
            return view.tokens.vis
        return select(view.tokens, lambda n: self.left(self.keep, n, layer), top_k(scores), self.shown(view))

    def left(self, keep: Keep, total: int, layer: int) -> int:
        """What is left of ``total`` in a layer."""
        layers = self.layers or ()
        return cascade(keep, total, sum(n <= layer for n in layers), len(layers))

    def live_heads(self, layer: int, outputs: Tensor, rows: Tensor, memory: dict[str, Any]) -> Tensor:
        here = head_importance(outputs.transpose(1, 2) * rows[:, None, :, None])
        total = memory["heads"] = memory.get("heads", 0) + here
        heads = outputs.shape[2]
        return masked(topk(total, self.left(self.keep_heads, heads, layer + 1)), heads)
