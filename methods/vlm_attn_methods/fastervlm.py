"""FasterVLM: keep the patches that the encoder's class token attends to."""

from __future__ import annotations

import torch
from torch import Tensor

from vlm_attn.selection import Auto, Keep, affordable, images, select, top_k
from vlm_attn.stages import PruneView, method_dataclass

from ._encoder import EncoderPrune


@method_dataclass
class FasterVLM(EncoderPrune):
    """Keeps the visual tokens with most attention from the vision encoder's class token; text plays no part.

    Formula: ``a_i = mean_h softmax(q_CLS k^T / sqrt(d))[i]`` in the layer whose output is the feature (the last but
    one); per image the top ``round(keep * N)``, in raster order.

    Acts at the language model's input, prefill only; one row of one encoder layer is computed. Text is never dropped.

    Attributes:
        keep: tokens kept per image: a count, a share in (0, 1], or ``"auto"``, as few as hold 99 % of the score's mass
            on the image (``"auto:0.95"`` for 95 %), or ``"auto:30ms"``, as many as let the decoder's prefill take
            30 ms by times measured at attach [ours].
        positions: ``"renumber"`` closes the gaps, as released; ``"keep"`` leaves the original positions.

    Source: FasterVLM (arXiv 2412.01818).
    Deviations: tokens leave after the projector, which treats each by itself, instead of before it; encoders without
    a class token use the mean attention received [unverified]; ties go to the earlier token.
    """

    name = "fastervlm"
    summary = "prune visual tokens by the encoder's class-token attention"
    paper = "arXiv:2412.01818"

    keep: Keep | Auto = 0.2223

    def keep_mask(self, view: PruneView) -> Tensor:
        scores = torch.zeros(view.tokens.vis.shape, device=view.tokens.vis.device)
        for row, slots, _ in images(view.tokens):
            image = int(view.tokens.img_id[row, slots[0]])
            scores[row, slots] = view.vision.picture(row, image).attention.mean(0)
        return select(view.tokens, affordable(view, self.keep), top_k(scores), scores=scores)
