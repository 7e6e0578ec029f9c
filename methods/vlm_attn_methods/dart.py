"""DART: keep a few pivot tokens and whatever duplicates them least."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from vlm_attn.kit.scores import max_similarity, norm
from vlm_attn.kit.selectors import complement, topk
from vlm_attn.selection import Keep, select
from vlm_attn.stages import PruneView, Site, method_dataclass

from ._one_site import OneSite


@method_dataclass
class Dart(OneSite):
    """Keeps the visual tokens that are least similar to a few pivots, whatever attention says.

    Formula: on the hidden states x that enter layer ``layer``: pivots P = the ``pivots`` tokens with the largest
    ``|x_i|``; the rest ranked by ``-max_{j in P} cos(x_i, x_j)``; per image P and the best of the rest stay.

    Acts at the input of one decoder layer, prefill only; original positions are kept, text is never dropped.

    Attributes:
        layer: decoder layer before which tokens leave, 0-based.
        keep: tokens kept per image: a count, or a share in (0, 1].
        pivots: number of pivots, themselves kept.

    Source: arXiv 2502.11494, as shipped in TensorRT-Edge-LLM (original ids, prefill only).
    Deviations: how pivots are found is not given there; here the longest hidden states [unverified]; ties go to the
    earlier token.
    """

    name = "dart"
    summary = "prune the visual tokens that duplicate a few pivots most"
    paper = "arXiv:2502.11494"

    layer: Annotated[int, Field(ge=0)] = 2
    keep: Keep = 0.5
    pivots: Annotated[int, Field(ge=1)] = 4

    def sites(self) -> tuple[Site, ...]:
        return (Site(self.layer, hidden=True),)

    def keep_mask(self, view: PruneView) -> Tensor:
        def choose(row: int, slots: Tensor, k: int) -> Tensor:
            x = view.features[row, slots]
            pivots = topk(norm(x), min(self.pivots, k))
            rest = complement(pivots, slots.numel())
            distinct = -max_similarity(x, pivots)[rest]
            return torch.cat([pivots, rest[topk(distinct, k - pivots.numel())]])

        return select(view.tokens, self.keep, choose)
