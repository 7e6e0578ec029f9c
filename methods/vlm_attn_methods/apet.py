"""ApET: keep the tokens that a few others cannot reconstruct."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from vlm_attn.encoder_view import Picture
from vlm_attn.kit.budgets import budget
from vlm_attn.kit.mergers import merge, nearest, overwrite_lowest
from vlm_attn.kit.scores import approx_error
from vlm_attn.kit.selectors import farthest_points
from vlm_attn.selection import Keep
from vlm_attn.stages import Merged, PruneView, method_dataclass

from ._encoder import EncoderPrune


@method_dataclass
class ApET(EncoderPrune):
    """Keeps the tokens with the largest error of approximation from a small basis, and the basis; merges the rest.

    Formula: basis B = ``basis`` tokens by farthest-point sampling of the encoder's features (random start);
    ``c = (B B^T + 1e-5 I)^-1 B x``; score ``|x - B^T c|``. The top T stay, the lowest of them replaced by the basis;
    every pruned token merges into the most similar kept one (mean).

    Acts on the encoder's features, before the projector; needs no attention. Text is never dropped.

    Attributes:
        keep: T, tokens kept per image: a count, or a share in (0, 1].
        basis: number of basis tokens, at most T of them are used.
        seed: of the random start.
        positions: ``"renumber"`` closes the gaps, as released; ``"keep"`` leaves the original positions.

    Source: arXiv 2602.19870.
    Deviations: the optional second cut in the language model is left out; a basis token that already is among the top
    takes no second place; the start is seeded; ties go to the earlier token.
    """

    name = "apet"
    summary = "keep tokens that a small basis cannot reconstruct, merge the rest"
    paper = "arXiv:2602.19870"

    keep: Keep = 0.1112
    basis: Annotated[int, Field(ge=1)] = 10
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0

    def keep_mask(self, view: PruneView) -> Merged:
        def choose(picture: Picture) -> tuple[Tensor, Tensor]:
            x = picture.features
            total = budget(self.keep, len(x))
            start = int(torch.randint(len(x), (1,), generator=torch.Generator().manual_seed(self.seed)))
            basis = farthest_points(x, min(self.basis, total), start)
            kept = overwrite_lowest(approx_error(x, basis), basis, total)
            return kept, merge(x, nearest(x, kept))

        return Merged(*self.replaced(view, choose))
