"""ToMe: merge similar patches inside every layer of the vision encoder."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field

from vlm_attn.kit.budgets import budget
from vlm_attn.kit.mergers import alternate, bipartite, merge, merged_sizes, survivors
from vlm_attn.selection import Keep
from vlm_attn.stages import EncoderStep, Shrunk, method_dataclass

from ._encoder import InEncoder


@method_dataclass
class ToMe(InEncoder):
    """Joins the most similar pairs of patches between attention and MLP of each encoder layer.

    Formula: metric = head-mean keys of the layer, of length 1; the tokens in alternating places form A and B (the
    class token counts as a place and is never merged); each A token's most similar B token; the r best pairs merge by
    the mean weighted with their sizes. Proportional attention: ``log(size)`` is added to a merged token's logits in
    the layers behind.

    Acts inside the vision encoder, up to the layer whose output are the features; its later layers and the language
    model run on what is left. Text is never dropped.

    Attributes:
        r: pairs per layer, as published, at most half of the tokens; None = as many as leave ``keep`` tokens, spread
            evenly over the layers [ours].
        keep: tokens left per image: a count, or a share in (0, 1]; without effect when ``r`` is given. More stay
            where the encoder has too few layers to halve its way down.
        positions: ``"renumber"`` closes the gaps; ``"keep"`` leaves the place of the B token.

    Source: arXiv 2210.09461 (ICLR 2023).
    Deviations: a merged token stands at its B token's place; the projector still sees the vacated places, which the
    prompt drops; ties go to the earlier token. Encoders whose patches are merged into visual tokens afterwards, and
    pictures that are unpadded, are refused: the grid is lost.
    """

    name = "tome"
    summary = "merge similar patches inside the vision encoder"
    paper = "arXiv:2210.09461"
    shrinks = "attention"

    r: Annotated[int, Field(ge=0)] | None = None
    keep: Keep = 0.2223

    def shrink(self, step: EncoderStep) -> Shrunk | None:
        picture, n = step.picture, len(step.sizes)
        r = self.pairs(step.total, n, step.layers - step.layer)
        first = int(picture.class_token)
        even, odd = alternate(n + first, protected=first, device=step.sizes.device)
        if not r or not len(even):
            return None
        parent = bipartite(picture.keys.float().mean(0), even - first, odd - first, r)
        hidden = merge(picture.features, parent, step.sizes)
        return Shrunk(torch.nonzero(survivors(parent))[:, 0], hidden, merged_sizes(parent, step.sizes))

    def pairs(self, total: int, n: int, layers: int) -> int:
        """Pairs to merge now, of ``n`` tokens left, with ``layers`` layers to go."""
        if self.r is not None:
            return self.r
        surplus = max(0, n - budget(self.keep, total))
        return -(-surplus // layers)
