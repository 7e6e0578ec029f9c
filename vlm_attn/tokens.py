"""TokenMap: who is who in every row of the sequence. Nothing else in the package computes an image position."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

Grid = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Layout:
    """How the visual tokens of one picture or video lie, in placeholder order.

    A view is a grid of tokens that shows one stretch of the picture: the whole picture, the canvas of its tiles, a
    single tile, or one frame of a video.

    Attributes:
        views: (rows, columns) of each view; empty where the tokens have no grid (query tokens).
        view: int64 ``[n]``, view of each token, -1 for tokens that show no pixels (row ends, separators).
        cell: int64 ``[n, 2]``, (row, column) inside the view, -1 for the same tokens.
        video: whether this is a video.
    """

    views: tuple[Grid, ...]
    view: Tensor
    cell: Tensor
    video: bool = False

    def __len__(self) -> int:
        return int(self.view.numel())

    @classmethod
    def of_views(cls, *views: Grid, video: bool = False) -> Layout:
        """Views one after the other, each row by row."""
        view = [torch.full((r * c,), i, dtype=torch.long) for i, (r, c) in enumerate(views)]
        cell = [torch.cartesian_prod(torch.arange(r), torch.arange(c)).reshape(-1, 2) for r, c in views]
        return cls(views, torch.cat(view), torch.cat(cell), video)

    @classmethod
    def without_grid(cls, length: int) -> Layout:
        """Tokens that stand for no place in the picture: query tokens, row ends, separators."""
        return cls((), torch.full((length,), -1), torch.full((length, 2), -1))

    def joined(self, other: Layout) -> Layout:
        """This layout followed by another one of the same picture."""
        shifted = torch.where(other.view >= 0, other.view + len(self.views), -1)
        return Layout(
            self.views + other.views, torch.cat([self.view, shifted]), torch.cat([self.cell, other.cell]), self.video
        )


@dataclass(frozen=True)
class TokenMap:
    """Roles of the ``N`` sequence slots of ``B`` samples; every tensor is ``[B, N]`` unless noted.

    Attributes:
        valid: bool, the slot holds a real token (not padding).
        vis: bool, the slot holds a visual token.
        img_id: int64, index of the image inside its sample, -1 for text.
        order: int64, rank of the visual token within its image in the prompt (survives pruning), -1 for text.
        frame: int64, view of the visual token (tile, video frame; 0 for plain images), -1 for text and separators.
        cell: int64 ``[B, N, 2]``, (row, column) of the visual token in its view, -1 without a grid.
        sys: bool, text before the first visual token.
        qry: bool, text after the last visual token of the prompt.
        first: bool, one-hot of the first valid token.
        index: int64, position of the slot in the padded prompt (survives pruning); new tokens count on.
        layouts: per sample, per image (or video): how its visual tokens lie.
    """

    valid: Tensor
    vis: Tensor
    img_id: Tensor
    order: Tensor
    frame: Tensor
    cell: Tensor
    sys: Tensor
    qry: Tensor
    first: Tensor
    index: Tensor
    layouts: tuple[tuple[Layout, ...], ...]

    @property
    def batch(self) -> int:
        """Number of samples."""
        return self.valid.shape[0]

    @property
    def length(self) -> int:
        """Number of slots per sample, padding included."""
        return self.valid.shape[1]

    @property
    def grids(self) -> tuple[tuple[Grid | None, ...], ...]:
        """Per sample, per image: (rows, columns) where the image is one view, else None."""
        return tuple(tuple(lay.views[0] if len(lay.views) == 1 else None for lay in row) for row in self.layouts)

    @property
    def sees_image(self) -> Tensor:
        """bool ``[B, N]``: valid text tokens that have at least one visual token before them."""
        return self.valid & ~self.vis & (self.vis.cumsum(1) > 0)

    def images(self, row: int) -> int:
        """Number of images in one sample."""
        return len(self.layouts[row])

    def _map(self, fn: Callable[[Tensor], Tensor]) -> TokenMap:
        changed: dict[str, Any] = {f.name: fn(getattr(self, f.name)) for f in fields(self) if f.name != "layouts"}
        return replace(self, **changed)

    def gather(self, idx: Tensor, valid: Tensor | None = None) -> TokenMap:
        """The map after keeping slots ``idx`` [B, n] (per sample, ascending); ``valid`` overrides validity."""

        def take(x: Tensor) -> Tensor:
            i = idx if x.dim() == 2 else idx[..., None].expand(*idx.shape, x.shape[-1])
            return x.gather(1, i)

        out = self._map(take)
        if valid is None:
            return out
        return replace(out, valid=valid, vis=out.vis & valid, sys=out.sys & valid, qry=out.qry & valid)

    def repeat(self, times: int) -> TokenMap:
        """Each sample ``times`` times, copies adjacent, as beam search and several return sequences lay them."""
        if times == 1:
            return self
        layouts = tuple(row for row in self.layouts for _ in range(times))
        return replace(self._map(lambda x: x.repeat_interleave(times, dim=0)), layouts=layouts)

    def to(self, device: torch.device) -> TokenMap:
        """The map on another device."""
        return self._map(lambda x: x.to(device))


def build_token_map(vis: Tensor, valid: Tensor, layouts: Sequence[Sequence[Layout]]) -> TokenMap:
    """Builds the map from the placeholder mask of the expanded prompt.

    Args:
        vis: bool ``[B, N]``, True at every visual placeholder.
        valid: bool ``[B, N]``, False at padding.
        layouts: per sample, per image in placeholder order.

    Raises:
        ValueError: the placeholders of a sample do not match the visual tokens of its images.
    """
    b, n = vis.shape
    device = vis.device
    vis = vis & valid
    img_id, order, frame = (torch.full((b, n), -1, dtype=torch.long, device=device) for _ in range(3))
    cell = torch.full((b, n, 2), -1, dtype=torch.long, device=device)
    for row in range(b):
        slots = vis[row].nonzero()[:, 0]
        expected = sum(len(lay) for lay in layouts[row])
        if slots.numel() != expected:
            raise ValueError(
                f"sample {row} has {slots.numel()} image placeholders but its images give {expected} visual "
                "tokens: build the inputs with the processor that belongs to the model, one image per placeholder"
            )
        start = 0
        for image, lay in enumerate(layouts[row]):
            span = slots[start : start + len(lay)]
            start += len(lay)
            img_id[row, span] = image
            order[row, span] = torch.arange(len(lay), device=device)
            frame[row, span] = lay.view.to(device) if lay.views else 0
            cell[row, span] = lay.cell.to(device)
    text = valid & ~vis
    seen = vis.cumsum(1)
    return TokenMap(
        valid=valid,
        vis=vis,
        img_id=img_id,
        order=order,
        frame=frame,
        cell=cell,
        sys=text & vis.any(1, keepdim=True) & (seen == 0),
        qry=text & (seen == vis.sum(1, keepdim=True)),
        first=valid & (valid.cumsum(1) == 1),
        index=torch.arange(n, device=device).expand(b, n).contiguous(),
        layouts=tuple(tuple(row) for row in layouts),
    )
