"""Control for pruning: the longest visual features stay."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from vlm_attn.kit.scores import norm
from vlm_attn.kit.selectors import topk
from vlm_attn.selection import Auto, Keep, Per, affordable, select
from vlm_attn.stages import PruneView, Site, method_dataclass

from ._one_site import OneSite


@method_dataclass
class NormPrune(OneSite):
    """Keeps the visual tokens with the largest ``|z_i|``: a score that costs nothing and knows nothing.

    At ``layer=0`` z is the projector's output, whose length is a close stand-in for the projector's sensitivity
    (arXiv 2509.24837 correlates with it at 0.986 in an independent audit).

    Acts before decoder layer ``layer`` (0 = at the language model's input), prefill only; original positions kept.

    Attributes:
        layer: decoder layer before which tokens leave, 0-based.
        keep: tokens kept per image: a count, a share in (0, 1], or ``"auto"``, as few as hold 99 % of the score's mass
            on the image (``"auto:0.95"`` for 95 %), or ``"auto:30ms"``, as many as let the decoder's prefill take
            30 ms by times measured at attach [ours].
        per: ``"image"``, or ``"view"``: the budget is split over tiles or frames by their size [ours].
    """

    name = "norm_prune"
    summary = "control: keep the visual tokens with the longest features"

    layer: Annotated[int, Field(ge=0)] = 0
    keep: Keep | Auto = 0.5
    per: Per = "image"

    def sites(self) -> tuple[Site, ...]:
        return (Site(self.layer, hidden=True),)

    def keep_mask(self, view: PruneView) -> Tensor:
        def choose(row: int, slots: Tensor, k: int) -> Tensor:
            return topk(lengths(view.features[row, slots]), k)

        keep = affordable(view, self.keep)
        return select(view.tokens, keep, choose, scores=norm(view.features), per=self.per)


def lengths(features: Tensor) -> Tensor:
    """Lengths in steps of 1e-4 of their mean: what a norm layer made equally long ties, whatever the rounding."""
    scores = norm(features)
    return (scores / scores.mean() * 1e4).round()
