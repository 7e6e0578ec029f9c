"""DivPrune: keep the subset of visual tokens whose members are farthest apart."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from vlm_attn.kit.selectors import maxmin
from vlm_attn.selection import Keep, Per, select
from vlm_attn.stages import PruneView, Site, method_dataclass

from ._one_site import OneSite


@method_dataclass
class DivPrune(OneSite):
    """Keeps a max-min diverse subset of the projected visual tokens; needs neither text nor attention.

    Formula: ``D_ij = 1 - cos(z_i, z_j)`` on projector outputs; first ``argmax_i min_{j != i} D_ij``, then repeatedly
    ``argmax_i min_{j kept} D_ij`` until ``round(keep * N)`` tokens of the image are kept, in raster order.

    Acts at the language model's input (``layer=0``), prefill only; text is never dropped.

    Attributes:
        layer: decoder layer before which tokens leave, 0-based; 0 as published, later layers compare hidden states.
        keep: tokens kept per image: a count, or a share in (0, 1].
        per: ``"image"``, or ``"view"``: the budget is split over tiles or frames by their size [ours].
        positions: ``"renumber"`` closes the gaps, as released; ``"keep"`` leaves the original positions (the only
            choice on M-RoPE models).

    Source: arXiv 2503.02175.
    Deviations: ties go to the earlier token; on models that scale their embeddings the scaled ones are compared,
    which changes no cosine.
    """

    name = "divprune"
    summary = "keep the most diverse visual tokens"
    paper = "arXiv:2503.02175"

    layer: Annotated[int, Field(ge=0)] = 0
    keep: Keep = 0.098
    per: Per = "image"
    positions: Literal["renumber", "keep"] = "renumber"

    def sites(self) -> tuple[Site, ...]:
        return (Site(self.layer, hidden=True),)

    def keep_mask(self, view: PruneView) -> Tensor:
        def choose(row: int, slots: Tensor, k: int) -> Tensor:
            return maxmin(view.features[row, slots], k)

        return select(view.tokens, self.keep, choose, per=self.per)
