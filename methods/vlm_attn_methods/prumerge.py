"""PruMerge: as many patches as stand out, each enriched by its neighbours."""

from __future__ import annotations

import torch
from torch import Tensor

from vlm_attn.encoder_view import Picture
from vlm_attn.kit.budgets import budget, plus_stride
from vlm_attn.kit.mergers import knn_add, residual_token
from vlm_attn.kit.selectors import iqr_outliers, masked, stride, topk, union
from vlm_attn.selection import Keep
from vlm_attn.stages import Merged, PruneView, method_dataclass

from ._encoder import EncoderPrune


@method_dataclass
class PruMerge(EncoderPrune):
    """Keeps the patches whose class-token attention is an outlier, adds their neighbours to them, and one rest token.

    Formula: ``a = softmax(q_CLS k^T / sqrt(width))`` in the last encoder layer, all heads as one. Kept: ``a > Q3 +
    1.5 (Q3 - Q1)``; with ``plus`` also every ``int(N / kept / 3)``-th token. ``x_i += sum a_j x_j`` over the 32 other
    tokens with the most similar keys; one extra token ``sum over pruned a_j x_j``.

    Acts on the encoder's features, before the projector; the number of tokens follows the picture, text is never
    dropped.

    Attributes:
        plus: add uniform tokens (PruMerge+).
        at_least: lower bound on the kept tokens, filled by attention: a count, or a share; 1.0 keeps everything.
        positions: ``"renumber"`` closes the gaps, as released; ``"keep"`` leaves the original positions.

    Source: arXiv 2403.15388.
    Deviations: the output is in raster order, upstream's is in score order; the extra token stands at the last pruned
    token's place; a token is not its own neighbour; without outliers the most attended token stays; encoders without
    a class token use the mean attention received.
    """

    name = "prumerge"
    summary = "keep outlier patches by class-token attention, merge neighbours into them"
    paper = "arXiv:2403.15388"
    encoder_layer = -1

    plus: bool = False
    at_least: Keep = 1

    @classmethod
    def neutral(cls) -> PruMerge:
        return cls(at_least=1.0)

    def keep_mask(self, view: PruneView) -> Merged:
        def choose(picture: Picture) -> tuple[Tensor, Tensor]:
            x, a = picture.features, picture.wide
            n = len(x)
            kept = iqr_outliers(a).nonzero()[:, 0]
            if self.plus:
                kept = union(kept, stride(n, plus_stride(kept.numel(), n), x.device))
            kept = union(kept, topk(a, budget(self.at_least, n)))
            pruned = ~masked(kept, n)
            if not bool(pruned.any()):
                return kept, x
            merged = x.clone()
            merged[kept] = knn_add(x, picture.keys.transpose(0, 1).flatten(1), a, kept)
            host = pruned.nonzero()[-1:, 0]
            merged[host] = residual_token(x, a, pruned)
            return torch.cat([kept, host]).sort().values, merged

        return Merged(*self.replaced(view, choose))
