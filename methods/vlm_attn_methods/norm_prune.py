"""Control for pruning: the longest visual features stay."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from vlm_attn.kit.scores import norm
from vlm_attn.kit.selectors import topk
from vlm_attn.selection import Keep, select
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
        keep: tokens kept per image: a count, or a share in (0, 1].
    """

    name = "norm_prune"
    summary = "control: keep the visual tokens with the longest features"

    layer: Annotated[int, Field(ge=0)] = 0
    keep: Keep = 0.5

    def sites(self) -> tuple[Site, ...]:
        return (Site(self.layer, hidden=True),)

    def keep_mask(self, view: PruneView) -> Tensor:
        return select(view.tokens, self.keep, lambda row, slots, k: topk(lengths(view.features[row, slots]), k))


def lengths(features: Tensor) -> Tensor:
    """Lengths in steps of 1e-4 of their mean: what a norm layer made equally long ties, whatever the rounding."""
    scores = norm(features)
    return (scores / scores.mean() * 1e4).round()
