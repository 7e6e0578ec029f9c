"""ERNIE 4.5 VL: words and pictures pass through experts of their own, named by a sequence of token types."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .base import Media
from .qwen_vl import MergedGrid

if TYPE_CHECKING:
    from ..request import PruneStage

TYPES = "moe_mm_token_type_ids"


class ErnieVL(MergedGrid):
    """``Ernie4_5_VLMoe``: the types run along the sequence and shrink with it; frames are joined in pairs."""

    sequence_arguments = (*MergedGrid.sequence_arguments, TYPES)

    def merge(self, media: Media, kind: str) -> Tensor:
        """Frames of a video are merged too."""
        vision = self.model.config.vision_config
        frames = vision.temporal_merge_size if kind == "video" else 1
        return torch.tensor([frames, vision.spatial_merge_size, vision.spatial_merge_size])

    def prune_inputs(self, stage: PruneStage, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Types of the tokens that stayed."""
        types = kwargs.get(TYPES)
        return kwargs if types is None else {**kwargs, TYPES: types.gather(1, stage.idx.to(types.device))}
