"""ZOO-Prune: tokens to which the projector is sensitive, spread over the picture's features."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from vlm_attn.kit.budgets import floor_share
from vlm_attn.kit.calibrators import minmax
from vlm_attn.kit.scores import jvp_sensitivity, norm, zo_sensitivity
from vlm_attn.kit.selectors import maxmin
from vlm_attn.projector import Projector
from vlm_attn.selection import images
from vlm_attn.stages import PruneView, method_dataclass

from ._encoder import EncoderPrune


@method_dataclass
class ZooPrune(EncoderPrune):
    """Keeps tokens that move the projector's output most when nudged, and that lie far from those kept before.

    Formula: ``S_i = mean_j |M(x_i + h u_j) - M(x_i - h u_j)| / (2 h)`` over m random unit directions shared by all
    tokens, min-max scaled per image (all ones if constant); first ``argmax S``, then repeatedly
    ``argmax_i S_i min_{j kept} (1 - cos(z_i, z_j))``, z = M(x), until ``int(keep * N)`` tokens are kept.

    Acts between vision encoder and language model; S is computed in fp32, because in half precision the nudge is
    rounded away. Text is never dropped.

    Attributes:
        keep: share of each image's tokens to keep, in (0, 1].
        score: ``"zo"``: finite differences; ``"jvp"``: their exact limit; ``"norm"``: ``|z_i|``, the control that
            costs nothing.
        rank: of the factors that stand in for the projector's linear layers while it is nudged; None = the layers
            themselves, 128 = as released for LLaVA-NeXT.
        m: number of directions (64 as published; 8 gives nearly the same ranking at an eighth of the cost).
        h: step length.
        seed: of the directions.
        positions: ``"renumber"`` closes the gaps, as released; ``"keep"`` leaves the original positions.

    Source: arXiv 2509.24837.
    Deviations: the directions are seeded; S in fp32; ties go to the earlier token.
    """

    name = "zoo_prune"
    summary = "keep tokens the projector is sensitive to, spread in feature space"
    paper = "arXiv:2509.24837"

    keep: Annotated[float, Field(gt=0, le=1)] = 0.1112
    score: Literal["zo", "jvp", "norm"] = "zo"
    m: Annotated[int, Field(ge=1)] = 64
    rank: Annotated[int, Field(ge=1)] | None = None
    h: Annotated[float, Field(gt=0)] = 0.01
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0

    def keep_mask(self, view: PruneView) -> Tensor:
        out = view.tokens.vis.clone().zero_()
        for row, slots, total in images(view.tokens):
            x, z = view.vision.picture(row, int(view.tokens.img_id[row, slots[0]])).features, view.features[row, slots]
            s = norm(z) if self.score == "norm" else self._sensitivity(view.vision.project.of_rank(self.rank), x)
            out[row, slots[maxmin(z, floor_share(total, self.keep), minmax(s))]] = True
        return out

    def _sensitivity(self, projector: Projector, x: Tensor) -> Tensor:
        project, behind = projector.split(x[:1])
        if self.score == "jvp":
            return jvp_sensitivity(project, x, self.m, self.seed, behind)
        return zo_sensitivity(project, x, self.m, self.h, self.seed, behind)
