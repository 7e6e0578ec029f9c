"""SoFA: let earlier images see later ones."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from vlm_attn.errors import UnsupportedError
from vlm_attn.stages import ModelInfo, SoftMask, check_layer, method_dataclass


@method_dataclass
class SoFA(SoftMask):
    """Soft inter-image attention: rows of an image attend to later images too, with weight sigma.

    ``A_ij ~ M_ij exp(z_ij)``, ``M = 1`` where the model's own mask allows, ``sigma`` for j > i with j in a later image
    than i [unverified reading: the formula came without code], i.e. ``log sigma`` added to those logits; ``sigma = 0``
    is the causal model, 1 attends both ways between images. ``mode="output"``: ``(1 - sigma) O + sigma O_both``.

    Acts in every ``layer_stride``-th layer, image rows of the prefill; decoding sees everything anyway. Prompts with
    fewer than two images are left alone.

    Attributes:
        sigma: weight of later images (0 = no change); start value 0.5 [unverified], tuned per task in the paper.
        layer_stride: distance of edited layers.
        layer_offset: first edited layer.
        mode: ``"weight"`` or ``"output"``.
        intra_image: also later tokens of the same image.

    Source: CVPR 2025, arXiv 2503.13792 (formula from secondary text; code not available).
    Deviations: starts from the model's own mask, so prefix and image blocks that are visible already stay as they are.
    """

    name = "sofa"
    summary = "let image tokens attend to later images, with a weight"
    paper = "arXiv:2503.13792"

    sigma: Annotated[float, Field(ge=0, le=1)] = 0.5
    layer_stride: Annotated[int, Field(ge=1)] = 2
    layer_offset: Annotated[int, Field(ge=0)] = 0
    mode: Literal["weight", "output"] = "weight"
    intra_image: bool = False

    @classmethod
    def neutral(cls) -> SoFA:
        return cls(sigma=0.0, layer_stride=1)

    def resolve(self, model: ModelInfo, profile: object) -> SoFA:
        check_layer(self.name, "layer_offset", self.layer_offset, model)
        if self.sigma > 0 and model.joined:
            raise UnsupportedError(f"sofa has nothing to open in {model.family} models: {model.joined}; leave it out")
        return self

    def edit_layers(self, model: ModelInfo) -> frozenset[int]:
        return frozenset(range(self.layer_offset, model.layers, self.layer_stride))

    def pairs(self, rows: Tensor, keys: Tensor) -> Tensor:
        row, key = rows[:, :, None], keys[:, None, :]
        later = key >= row if self.intra_image else key > row
        return later & (row >= 0)
