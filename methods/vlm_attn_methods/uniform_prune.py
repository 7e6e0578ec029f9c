"""Control for pruning: an even stride over the visual tokens."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from vlm_attn.selection import Keep, Per, select
from vlm_attn.stages import PruneView, method_dataclass

from ._one_site import OneSite


@method_dataclass
class UniformPrune(OneSite):
    """Keeps every (N/k)-th visual token in raster order: indices ``floor((j + 1/2) N / k)``.

    Acts before decoder layer ``layer`` (0 = at the language model's input), prefill only; original positions kept.

    Attributes:
        layer: decoder layer before which tokens leave, 0-based.
        keep: tokens kept per image: a count, or a share in (0, 1].
        per: ``"image"``, or ``"view"``: the budget is split over tiles or frames by their size [ours].
    """

    name = "uniform_prune"
    summary = "control: keep an even stride of visual tokens"

    layer: Annotated[int, Field(ge=0)] = 2
    keep: Keep = 0.5
    per: Per = "image"

    def keep_mask(self, view: PruneView) -> Tensor:
        def choose(row: int, slots: Tensor, k: int) -> Tensor:
            return torch.tensor([(2 * j + 1) * slots.numel() // (2 * k) for j in range(k)], device=slots.device)

        return select(view.tokens, self.keep, choose, per=self.per)
