"""FasterVLM: keep the patches that the encoder's class token attends to."""

from __future__ import annotations

from torch import Tensor

from vlm_attn.kit.budgets import budget
from vlm_attn.kit.selectors import topk
from vlm_attn.selection import Keep
from vlm_attn.stages import PruneView, method_dataclass

from ._encoder import EncoderPrune


@method_dataclass
class FasterVLM(EncoderPrune):
    """Keeps the visual tokens with most attention from the vision encoder's class token; text plays no part.

    Formula: ``a_i = mean_h softmax(q_CLS k^T / sqrt(d))[i]`` in the layer whose output is the feature (the last but
    one); per image the top ``round(keep * N)``, in raster order.

    Acts at the language model's input, prefill only; one row of one encoder layer is computed. Text is never dropped.

    Attributes:
        keep: tokens kept per image: a count, or a share in (0, 1].
        positions: ``"renumber"`` closes the gaps, as released; ``"keep"`` leaves the original positions.

    Source: FasterVLM (arXiv 2412.01818).
    Deviations: tokens leave after the projector, which treats each by itself, instead of before it; encoders without
    a class token use the mean attention received [unverified]; ties go to the earlier token.
    """

    name = "fastervlm"
    summary = "prune visual tokens by the encoder's class-token attention"
    paper = "arXiv:2412.01818"

    keep: Keep = 0.2223

    def keep_mask(self, view: PruneView) -> Tensor:
        return self.each(view, lambda p, z: topk(p.attention.mean(0), budget(self.keep, len(z))))
