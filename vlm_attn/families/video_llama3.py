"""VideoLLaMA 3: pictures and frames merge by different factors; tokens that repeat the frame before are dropped."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedError
from ..tokens import Layout
from .base import Media
from .qwen_vl import MergedGrid

LEAST_CHANGE = 0.1 / 255
"""Mean change of normalised pixel values below which the processor drops a token."""


class VideoLlama3(MergedGrid):
    """``VideoLlama3``: a video keeps the tokens that changed since the frame before.

    Which ones is a mask among the prompt's arguments that the feature function never sees. It is found again from the
    pixels by the processor's rule, where the prompt has fewer placeholders than the video has tokens.
    """

    def merge(self, media: Media, kind: str) -> Tensor:
        """Patches per token, entry by entry."""
        sides = media.arguments[f"{kind}_merge_sizes"].cpu()
        return torch.stack([torch.ones_like(sides), sides, sides], dim=1)

    def layouts(self, media: Media) -> list[Layout]:
        """One view per frame, without the dropped tokens."""
        whole = super().layouts(media)
        found = self.patches(media)
        if media.prompt is None or found is None or found[0] == "image":
            return whole
        slots = int((media.prompt == self.placeholders["video"]).sum())
        if slots == sum(len(lay) for lay in whole):
            return whole
        masks = self._changed(media, found[1])
        if slots != sum(int(mask.sum()) for mask in masks):
            raise UnsupportedError(
                f"the prompt has {slots} video placeholders, which fits neither all tokens of its videos nor those "
                "that the processor's token compression keeps: process them with use_token_compression=False"
            )
        return [Layout(lay.views, lay.view[m], lay.cell[m], video=True) for lay, m in zip(whole, masks, strict=True)]

    def _changed(self, media: Media, patches: Tensor) -> list[Tensor]:
        """bool ``[tokens]`` per video: the first frame, what changed, and at least one token per frame."""
        (name,) = self.pixel_arguments(media)
        pixels = media.arguments[name].split(patches.prod(-1).tolist())
        sides = media.arguments["video_merge_sizes"].tolist()
        return [_changed(p, int(grid[0]), side) for p, grid, side in zip(pixels, patches, sides, strict=True)]

    def repeat_features(self, output: Any, per_row: list[int], times: int) -> Any:
        """A thinned prompt has fewer slots than features; they are passed on whole."""
        total = sum(len(entry) for entry in output.pooler_output)
        if sum(per_row) == total:
            return super().repeat_features(output, per_row, times)
        if times > 1:
            raise UnsupportedError(
                "beams and several return sequences cannot be used with videos whose tokens were compressed: process "
                "them with use_token_compression=False"
            )
        return output


def _changed(pixels: Tensor, frames: int, side: int) -> Tensor:
    tokens = pixels.reshape(frames, -1, side * side * pixels.shape[-1]).cpu()
    changed = torch.ones(tokens.shape[:2], dtype=torch.bool)
    changed[1:] = (tokens[1:] - tokens[:-1]).abs().mean(-1) > LEAST_CHANGE
    changed[~changed.any(1), 0] = True
    return changed.flatten()
