"""LLaVA-1.5 and models of the same plan: one square grid of visual tokens per image, row-major, causal decoder."""

from __future__ import annotations

from torch import Tensor

from ..errors import AttachError
from .base import Family, Grid


class Llava(Family):
    """``LlavaForConditionalGeneration``: a fixed-size encoder, one run of visual tokens per image."""

    name = "llava"
    model_types = ("llava",)

    def _side(self) -> int:
        vision = self.model.config.vision_config
        size, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
        if not isinstance(size, int) or not isinstance(patch, int):
            raise AttachError(f"{self._who()}: its vision tower has no fixed square grid (image_size / patch_size)")
        return size // patch

    def tokens_per_image(self, input_ids: Tensor) -> int | None:
        """Patches of the tower, plus the class token when the feature strategy keeps it."""
        return self._side() ** 2 + (self.model.config.vision_feature_select_strategy == "full")

    def image_grid(self, length: int, features: object) -> Grid:
        """The square patch grid; none when the class token is among the visual tokens."""
        side = self._side()
        return (side, side) if length == side * side else None
