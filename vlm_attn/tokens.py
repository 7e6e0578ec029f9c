"""TokenMap: who is who in every row of the sequence. Nothing else in the package computes an image position."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenMap:
    """Roles of the ``N`` sequence slots of ``B`` samples; every tensor is ``[B, N]`` unless noted.

    Attributes:
        valid: bool, the slot holds a real token (not padding).
        vis: bool, the slot holds a visual token.
        img_id: int64, index of the image inside its sample, -1 for text.
        frame: int64, frame (video) or tile index of the visual token, 0 for plain images, -1 for text.
        cell: int64 ``[B, N, 2]``, (row, column) of the visual token on its grid, -1 without a grid.
        sys: bool, text before the first visual token.
        qry: bool, text after the last visual token of the prompt.
        first: bool, one-hot of the first valid token.
        index: int64, position of the slot in the padded prompt (survives pruning); new tokens count on.
        grids: per sample, per image: (rows, columns) of the visual grid, or None where there is none.
    """

    valid: Tensor
    vis: Tensor
    img_id: Tensor
    frame: Tensor
    cell: Tensor
    sys: Tensor
    qry: Tensor
    first: Tensor
    index: Tensor
    grids: tuple[tuple[tuple[int, int] | None, ...], ...]

    @property
    def batch(self) -> int:
        """Number of samples."""
        return self.valid.shape[0]

    @property
    def length(self) -> int:
        """Number of slots per sample, padding included."""
        return self.valid.shape[1]

    @property
    def sees_image(self) -> Tensor:
        """bool ``[B, N]``: valid text tokens that have at least one visual token before them."""
        return self.valid & ~self.vis & (self.vis.cumsum(1) > 0)

    def images(self, row: int) -> int:
        """Number of images in one sample."""
        return len(self.grids[row])

    def _map(self, fn: Callable[[Tensor], Tensor]) -> TokenMap:
        changed: dict[str, Any] = {f.name: fn(getattr(self, f.name)) for f in fields(self) if f.name != "grids"}
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

    def extend(self, new: int) -> TokenMap:
        """The map after ``new`` generated tokens: valid text that is neither system nor question."""
        if new == 0:
            return self
        b, device = self.batch, self.valid.device

        def pad(x: Tensor, value: bool | int) -> Tensor:
            return torch.cat([x, x.new_full((b, new, *x.shape[2:]), value)], dim=1)

        last = self.index[:, -1:] + torch.arange(1, new + 1, device=device)
        return replace(
            self,
            valid=pad(self.valid, True),
            vis=pad(self.vis, False),
            img_id=pad(self.img_id, -1),
            frame=pad(self.frame, -1),
            cell=pad(self.cell, -1),
            sys=pad(self.sys, False),
            qry=pad(self.qry, False),
            first=pad(self.first, False),
            index=torch.cat([self.index, last], dim=1),
        )

    def repeat(self, times: int) -> TokenMap:
        """Each sample ``times`` times, copies adjacent, as beam search and several return sequences lay them."""
        if times == 1:
            return self
        grids = tuple(g for g in self.grids for _ in range(times))
        return replace(self._map(lambda x: x.repeat_interleave(times, dim=0)), grids=grids)

    def to(self, device: torch.device) -> TokenMap:
        """The map on another device."""
        return self._map(lambda x: x.to(device))


def build_token_map(
    image_mask: Tensor,
    valid: Tensor,
    grids: tuple[tuple[tuple[int, int] | None, ...], ...],
    lengths: tuple[tuple[int, ...], ...],
) -> TokenMap:
    """Builds the map from the placeholder mask of the expanded prompt.

    Args:
        image_mask: bool ``[B, N]``, True at every image placeholder.
        valid: bool ``[B, N]``, False at padding.
        grids: per sample, per image: visual grid (rows, columns) or None.
        lengths: per sample, per image: number of visual tokens, in placeholder order.

    Raises:
        ValueError: the placeholders of a sample do not match the visual tokens of its images.
    """
    b, n = image_mask.shape
    device = image_mask.device
    vis = image_mask & valid
    img_id = torch.full((b, n), -1, dtype=torch.long, device=device)
    frame = torch.full((b, n), -1, dtype=torch.long, device=device)
    cell = torch.full((b, n, 2), -1, dtype=torch.long, device=device)
    for row in range(b):
        slots = vis[row].nonzero()[:, 0]
        if slots.numel() != sum(lengths[row]):
            raise ValueError(
                f"sample {row} has {slots.numel()} image placeholders but its images give {sum(lengths[row])} visual "
                "tokens: build the inputs with the processor that belongs to the model, one image per placeholder"
            )
        start = 0
        for image, (length, grid) in enumerate(zip(lengths[row], grids[row], strict=True)):
            span = slots[start : start + length]
            start += length
            img_id[row, span] = image
            frame[row, span] = 0
            if grid is not None:
                order = torch.arange(length, device=device)
                cell[row, span] = torch.stack([order // grid[1], order % grid[1]], dim=-1)
    text = valid & ~vis
    seen = vis.cumsum(1)
    has_image = vis.any(1, keepdim=True)
    return TokenMap(
        valid=valid,
        vis=vis,
        img_id=img_id,
        frame=frame,
        cell=cell,
        sys=text & has_image & (seen == 0),
        qry=text & (seen == vis.sum(1, keepdim=True)),
        first=valid & (valid.cumsum(1) == 1),
        index=torch.arange(n, device=device).expand(b, n).contiguous(),
        grids=grids,
    )
