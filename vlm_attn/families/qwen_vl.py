"""Pictures in their own shape: a grid of patches merged in blocks, named by the ``..._grid_thw`` arguments.

The tower sees the picture stretched to whole blocks, so a token is a block of the grid, row by row; a video is one
such grid per (merged) frame. Position ids are three-dimensional in most of these families, which concerns nobody
here: decoder layers receive finished rotary tables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..geometry import ImageGeometry, tile_of
from ..tokens import Layout
from .base import Family, Media, Shadow

if TYPE_CHECKING:
    from ..request import PruneStage, Request


class MergedGrid(Family):
    """``Qwen2VL``, ``Qwen2_5_VL``, ``PaddleOCRVL`` and all that speak of ``image_grid_thw``."""

    structure = (
        "vision_start_token_id", "vision_end_token_id", "image_start_token_id", "image_end_token_id",
        "video_start_token_id", "video_end_token_id",
    )  # fmt: skip

    def patches(self, media: Media) -> tuple[str, Tensor] | None:
        """Kind, and int64 ``[n, 3]`` patches (frames, rows, columns) of each entry; None for finished features."""
        for kind in ("image", "video"):
            grid = media.arguments.get(f"{kind}_grid_thw")
            if grid is not None:
                return kind, grid
        return None

    def merge(self, media: Media, kind: str) -> Any:
        """Patches per token along (frames, rows, columns); a tensor that broadcasts to ``[n, 3]``."""
        side = int(self.model.config.vision_config.spatial_merge_size)
        return torch.tensor([1, side, side])

    def layouts(self, media: Media) -> list[Layout]:
        """One view per frame; finished features do not say how they lie."""
        found = self.patches(media)
        if found is None:
            return super().layouts(media)
        kind, patches = found
        tokens = patches.cpu() // self.merge(media, kind)
        return [
            Layout.of_views(*[(rows, columns)] * frames, video=kind == "video")
            for frames, rows, columns in tokens.tolist()
        ]

    def pictures(self, media: Media, pixels: Tensor) -> list[Tensor]:
        """The patches of each picture."""
        found = self.patches(media)
        return super().pictures(media, pixels) if found is None else list(pixels.split(found[1].prod(-1).tolist()))

    def geometry(self, image_processor: Any, size: tuple[int, int], layout: Layout) -> list[ImageGeometry]:
        """Every frame is stretched over its grid."""
        return [tile_of(size, grid) for grid in layout.views]


class FlatPositions(MergedGrid):
    """``Exaone4_5``: 1-D positions that the model counts itself, padding included."""

    def prompt_arguments(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The positions that the model would count."""
        ids = kwargs["input_ids"]
        return {**kwargs, "position_ids": torch.arange(ids.shape[1], device=ids.device)[None]}


class DeepStack(MergedGrid):
    """``Qwen3VL``, ``Qwen3VLMoe``: the first decoder layers add features of inner tower layers at the visual tokens.

    Reference: DeepStack (arXiv 2406.04334). When tokens have left, only the features of those that stayed are added.
    """

    def shadows(self, running: Callable[[], Request | None]) -> Iterable[Shadow]:
        """The addition behind each of the first layers."""

        def add(original: Callable[..., Tensor], hidden: Tensor, mask: Tensor, features: Tensor) -> Tensor:
            request = running()
            if request is None or hidden.shape[1] == mask.shape[1]:
                return original(hidden, mask, features)
            return original(hidden, *stayed(request.stages[-1], mask, features))

        return ((self.lm, "_deepstack_process", add),)

    def prune_inputs(self, stage: PruneStage, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Mask and features of the visual tokens that stayed."""
        mask, features = kwargs.get("visual_pos_masks"), kwargs.get("deepstack_visual_embeds")
        if mask is None or features is None:
            return kwargs
        left = [stayed(stage, mask, depth) for depth in features]
        return {**kwargs, "visual_pos_masks": left[0][0], "deepstack_visual_embeds": [depth for _, depth in left]}


def stayed(stage: PruneStage, mask: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """Mask ``[B, n]`` and features of the visual tokens among the kept slots.

    Args:
        stage: what was kept.
        mask: bool ``[B, N]``, the visual tokens of the prompt.
        features: ``[M, D]``, one per visual token, row by row.
    """
    idx, valid = stage.idx.to(mask.device), stage.valid.to(mask.device)
    slots = torch.zeros_like(mask).scatter(1, idx, valid)
    return mask.gather(1, idx) & valid, features[slots[mask].to(features.device)]


class LinearLayers(MergedGrid):
    """``Qwen3_5``: layers of gated linear attention, a recurrence, between layers with attention."""

    hybrid = True
    refused: ClassVar[Mapping[str, str]] = {
        "prune": "its linear-attention layers keep one running state instead of keys, where leaving a token out is "
        "not the same as hiding it; use an edit or a contrastive method"
    }
