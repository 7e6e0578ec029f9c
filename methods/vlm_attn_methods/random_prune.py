"""Control for pruning: a seeded random set of visual tokens."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from vlm_attn.selection import Keep, Per, select
from vlm_attn.stages import PruneView, method_dataclass

from ._one_site import OneSite


@method_dataclass
class RandomPrune(OneSite):
    """Keeps a uniformly random subset of each image's visual tokens: what every scored pruner must beat.

    Acts before decoder layer ``layer`` (0 = at the language model's input), prefill only; original positions kept.
    The set depends on the seed, the image's number in its prompt and its token count, never on the batch.

    Attributes:
        layer: decoder layer before which tokens leave, 0-based.
        keep: tokens kept per image: a count, or a share in (0, 1].
        per: ``"image"``, or ``"view"``: the budget is split over tiles or frames by their size [ours].
        seed: seed of the choice.
    """

    name = "random_prune"
    summary = "control: keep a random set of visual tokens"

    layer: Annotated[int, Field(ge=0)] = 2
    keep: Keep = 0.5
    per: Per = "image"
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0

    def keep_mask(self, view: PruneView) -> Tensor:
        def choose(row: int, slots: Tensor, k: int) -> Tensor:
            image = int(view.tokens.img_id[row, slots[0]])
            part = int(view.tokens.frame[row, slots[0]]) if self.per == "view" else 0
            generator = torch.Generator().manual_seed(self.seed * 1009 + image + 1_000_003 * part)
            return torch.randperm(slots.numel(), generator=generator)[:k].to(slots.device)

        return select(view.tokens, self.keep, choose, per=self.per)
