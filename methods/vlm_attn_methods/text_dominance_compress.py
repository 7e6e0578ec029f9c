"""The compression of "When Language Overrules": fewer, more attended visual tokens against text dominance."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from vlm_attn.kit.budgets import floor_share
from vlm_attn.kit.selectors import topk
from vlm_attn.stages import PruneView, method_dataclass

from ._encoder import EncoderPrune


@method_dataclass
class TextDominanceCompress(EncoderPrune):
    """Keeps the patches with most class-token attention, to move the balance of attention from text to the picture.

    Formula: ``s_i = mean_h softmax(q_CLS k^T / sqrt(d))[i]`` in the last or last but one encoder layer; the top
    ``M = int(N (1 - reduction))`` per image stay, in raster order.

    Acts at the language model's input, prefill only. Deleting visual tokens lowers the modality dominance index by
    its definition; that alone is no evidence of better grounding.

    Attributes:
        reduction: share of the visual tokens that leave, in [0, 1).
        encoder: ``"penultimate"`` or ``"last"`` layer of the vision encoder.
        positions: ``"renumber"`` closes the gaps; ``"keep"`` leaves the original positions.

    Source: arXiv 2508.10552.
    Deviations: which of the two layers is not settled there [unverified]; ties go to the earlier token.
    """

    name = "text_dominance_compress"
    summary = "compress the picture to its most attended patches, against text dominance"
    paper = "arXiv:2508.10552"

    reduction: Annotated[float, Field(ge=0, lt=1)] = 0.75
    encoder: Literal["penultimate", "last"] = "penultimate"

    @property
    def encoder_layer(self) -> int:  # type: ignore[override]
        return -2 if self.encoder == "penultimate" else -1

    @classmethod
    def neutral(cls) -> TextDominanceCompress:
        return cls(reduction=0.0)

    def keep_mask(self, view: PruneView) -> Tensor:
        share = 1 - self.reduction
        return self.each(view, lambda p, z: topk(p.attention.mean(0), floor_share(len(z), share + 1e-12)))
