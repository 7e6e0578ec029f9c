"""GLM-4.1V and its kin: video frames stand in the prompt under the placeholder of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from ..tokens import TokenMap
from .base import Media
from .qwen_vl import MergedGrid


class Glm4v(MergedGrid):
    """``Glm4v``, ``Glm46V``, ``Glm4vMoe``, ``GlmOcr``. The models accept pictures or videos in a batch, not both."""

    def token_map(self, input_ids: Tensor, attention_mask: Tensor | None, media: Sequence[Media]) -> TokenMap:
        """Frames are looked for at the image placeholder."""
        return super().token_map(input_ids, attention_mask, [replace(m, kind="image") for m in media])
