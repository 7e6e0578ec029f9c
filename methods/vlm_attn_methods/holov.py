"""HoloV: a budget for every stretch of the picture."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from vlm_attn.encoder_view import Picture
from vlm_attn.kit.budgets import budget
from vlm_attn.kit.scores import holistic
from vlm_attn.kit.selectors import runs
from vlm_attn.selection import Keep
from vlm_attn.stages import PruneView, method_dataclass

from ._encoder import EncoderPrune


@method_dataclass
class HoloV(EncoderPrune):
    """Splits the budget over consecutive runs of tokens by their score, so that no region is emptied.

    Formula: ``t_i = 1e3 a_i + 0.09 var_i``, a = head-mean class-token attention, var = variance of the cosines of the
    projected features within the run, rescaled to the mean of ``|1e3 a|``. Runs get tokens in proportion to their
    mean t (floors, the remainder to the largest); inside a run the top by a.

    ``version="released"`` rescales the variance per run, where it cancels from the weights, so that the result is a
    run-wise budget by mean attention; ``version="intended"`` rescales over the image and ranks by t inside runs too.

    Acts at the language model's input, prefill only; text is never dropped.

    Attributes:
        keep: tokens kept per image: a count, or a share in (0, 1].
        runs: number of runs of consecutive tokens.
        version: ``"released"`` or ``"intended"``.
        positions: ``"renumber"`` closes the gaps, as released; ``"keep"`` leaves the original positions.

    Source: arXiv 2510.02912.
    Deviations: what a run cannot hold goes to the other runs (upstream fills with zero vectors); kept tokens are in
    raster order; encoders without a class token use the mean attention received.
    """

    name = "holov"
    summary = "prune with a budget for every stretch of the picture"
    paper = "arXiv:2510.02912"

    keep: Keep = 0.2223
    runs: Annotated[int, Field(ge=1)] = 16
    version: Literal["released", "intended"] = "released"

    def keep_mask(self, view: PruneView) -> Tensor:
        def choose(picture: Picture, z: Tensor) -> Tensor:
            attention, count = picture.attention.mean(0), min(self.runs, len(z))
            intended = self.version == "intended"
            score = holistic(attention, z, count, "image" if intended else "run")
            return runs(score if intended else attention, score, budget(self.keep, len(z)), count)

        return self.each(view, choose)
