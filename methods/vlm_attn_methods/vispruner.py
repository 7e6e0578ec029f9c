"""VisPruner: important patches by class-token attention, the rest of the budget to patches that differ."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from vlm_attn.encoder_view import Picture
from vlm_attn.kit.budgets import budget
from vlm_attn.kit.selectors import complement, even_odd_dedup, topk, union
from vlm_attn.selection import Keep
from vlm_attn.stages import PruneView, method_dataclass

from ._encoder import EncoderPrune


@method_dataclass
class VisPruner(EncoderPrune):
    """Keeps the most attended patches, and among the others those that duplicate each other least.

    Formula: of T tokens, ``int(T important)`` by ``a_i`` = head-mean class-token attention of the last but one
    encoder layer. The others stand in descending ``a``; each round splits them into even and odd places and drops the
    (at most 8) even ones whose best cosine with an odd one is highest, until ``T - int(T important)`` are left.

    Acts at the language model's input, prefill only; raster order, text is never dropped.

    Attributes:
        keep: T, tokens kept per image: a count, or a share in (0, 1].
        important: share of the budget that goes by attention, in [0, 1].
        positions: ``"renumber"`` closes the gaps, as released; ``"keep"`` leaves the original positions.

    Source: VisPruner (arXiv 2412.01818, ICCV 2025).
    Deviations: tokens leave after the projector instead of before it; encoders without a class token use the mean
    attention received; ties go to the earlier token.
    """

    name = "vispruner"
    summary = "prune to the most attended patches and the least duplicated others"
    paper = "arXiv:2412.01818"

    keep: Keep = 0.2223
    important: Annotated[float, Field(ge=0, le=1)] = 0.5

    def keep_mask(self, view: PruneView) -> Tensor:
        def choose(picture: Picture, z: Tensor) -> Tensor:
            total = budget(self.keep, len(z))
            attention = picture.attention.mean(0)
            first = topk(attention, int(total * self.important))
            rest = complement(first, len(z))
            others = even_odd_dedup(picture.features[rest], attention[rest], total - first.numel())
            return union(first, rest[others])

        return self.each(view, choose)
