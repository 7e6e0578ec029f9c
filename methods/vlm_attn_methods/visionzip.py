"""VisionZip: a few dominant patches, and contextual tokens that gather the others."""

from __future__ import annotations

import torch
from torch import Tensor

from vlm_attn.encoder_view import Picture
from vlm_attn.kit.budgets import budget
from vlm_attn.kit.mergers import merge, stride_merge, survivors
from vlm_attn.kit.selectors import complement, topk
from vlm_attn.selection import Keep
from vlm_attn.stages import Merged, PruneView, method_dataclass

from ._encoder import EncoderPrune


@method_dataclass
class VisionZip(EncoderPrune):
    """Keeps the patches that the class token attends to most, and folds all others into a few contextual tokens.

    Formula: dominant = top D of ``sum_h A[CLS, i]`` in the last but one encoder layer. Of the n others, C targets at
    stride ``max(1, n // C)``; every other token joins the target with the most similar head-mean key; contextual =
    target + mean of those that joined (``true_mean``: the mean of all of them).

    Acts on the encoder's features, before the projector; text is never dropped.

    Attributes:
        keep: D + C, tokens left per image: a count, or a share in (0, 1].
        contextual: C: a count, or a share of the image's tokens; None = 10 of every 64 that are left.
        true_mean: average instead of the released sum, which about doubles the length.
        positions: ``"renumber"`` closes the gaps, as released; ``"keep"`` leaves the original positions.

    Source: arXiv 2412.04467.
    Deviations: the class token, which the released D counts, is not inserted (the prompt has no place for it): one
    more patch stays instead; contextual tokens stand at their target's place, not behind the dominant ones; encoders
    without a class token use the mean attention received; ties go to the earlier token.
    """

    name = "visionzip"
    summary = "keep dominant patches, gather the others in contextual tokens"
    paper = "arXiv:2412.04467"

    keep: Keep = 0.1112
    contextual: Keep | None = None
    true_mean: bool = False

    def keep_mask(self, view: PruneView) -> Merged:
        def choose(picture: Picture) -> tuple[Tensor, Tensor]:
            x = picture.features
            total = budget(self.keep, len(x))
            count = round(total * 10 / 64) if self.contextual is None else budget(self.contextual, len(x))
            count = min(count, total - 1) if total < len(x) else 0
            dominant = topk(picture.attention.sum(0), total - count)
            if not count:
                return dominant, x
            rest = complement(dominant, len(x))
            parent = stride_merge(picture.keys.float().mean(0)[rest], count)
            merged = x.clone()
            merged[rest] = merge(x[rest], parent, how="mean" if self.true_mean else "add_mean")
            return torch.cat([dominant, rest[survivors(parent)]]).sort().values, merged

        return Merged(*self.replaced(view, choose))
