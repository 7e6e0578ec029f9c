"""Visual token <-> grid cell <-> processed pixel <-> original pixel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class ImageGeometry:
    """How one original picture reached the grid: resized, then cropped or padded, then cut into cells.

    Attributes:
        size: original (width, height) in pixels.
        processed: (width, height) that the vision tower saw.
        grid: (rows, columns) of the visual grid.
        scale: (x, y) processed pixels per original pixel.
        offset: (x, y) of the original's corner on the processed canvas (negative when cropped).
    """

    size: tuple[int, int]
    processed: tuple[int, int]
    grid: tuple[int, int]
    scale: tuple[float, float]
    offset: tuple[float, float]

    def cell_box(self, row: int, column: int) -> tuple[float, float, float, float]:
        """(x0, y0, x1, y1) of a cell in original pixels; may reach past the picture where it is padded."""
        width, height = self.processed[0] / self.grid[1], self.processed[1] / self.grid[0]
        xs = [(c * width - self.offset[0]) / self.scale[0] for c in (column, column + 1)]
        ys = [(r * height - self.offset[1]) / self.scale[1] for r in (row, row + 1)]
        return xs[0], ys[0], xs[1], ys[1]

    def to_pixels(self, grid_map: np.ndarray, *, stretch: bool = False) -> np.ndarray:
        """Upsamples a grid map to original pixels (bilinear, half-pixel centres).

        Args:
            grid_map: float ``[rows, columns]``.
            stretch: lay the grid over the whole picture, ignoring crop and padding, as some papers do.

        Returns:
            float32 ``(H, W)``; pixels that the tower never saw get 0.
        """
        if grid_map.shape != self.grid:
            raise ValueError(f"the map is {grid_map.shape}, the grid {self.grid}")
        width, height = self.size
        source = torch.from_numpy(np.ascontiguousarray(grid_map, dtype=np.float32))[None, None]
        if stretch:
            out = torch.nn.functional.interpolate(source, (height, width), mode="bilinear", align_corners=False)
            return out[0, 0].numpy()
        xs = (torch.arange(width) + 0.5) * self.scale[0] + self.offset[0]
        ys = (torch.arange(height) + 0.5) * self.scale[1] + self.offset[1]
        gx, gy = xs / self.processed[0] * 2 - 1, ys / self.processed[1] * 2 - 1
        points = torch.stack(torch.meshgrid(gy, gx, indexing="ij")[::-1], dim=-1)[None].float()
        out = torch.nn.functional.grid_sample(
            source, points, mode="bilinear", padding_mode="border", align_corners=False
        )[0, 0]
        seen = (gy.abs() <= 1)[:, None] & (gx.abs() <= 1)[None]
        return (out * seen).numpy()

    def visible(self, tolerance: float = 0.5) -> Tensor:
        """bool ``[rows, columns]``: cells whose padded share of the area is at most ``tolerance``."""
        rows, columns = self.grid

        def overlap(cells: int, length: int, start: float, end: float) -> Tensor:
            step = length / cells
            edges = torch.arange(cells + 1, dtype=torch.float64) * step
            inside = edges[1:].clamp(max=end) - edges[:-1].clamp(min=start)
            return inside.clamp(min=0) / step

        x0, y0 = self.offset
        x1, y1 = x0 + self.size[0] * self.scale[0], y0 + self.size[1] * self.scale[1]
        share = overlap(rows, self.processed[1], y0, y1)[:, None] * overlap(columns, self.processed[0], x0, x1)[None]
        return 1 - share <= tolerance + 1e-9


def _side(size: Any, *names: str) -> int | None:
    if size is None:
        return None
    for name in names:
        value = size.get(name) if isinstance(size, dict) else getattr(size, name, None)
        if value is not None:
            return int(value)
    return None


def tile_of(
    size: tuple[int, int],
    grid: tuple[int, int],
    tiles: tuple[int, int] = (1, 1),
    at: tuple[int, int] = (0, 0),
) -> ImageGeometry:
    """One tile of a picture that was stretched over ``tiles`` of equal size (by default the whole picture).

    Lengths on the canvas are counted in cells, which leaves boxes on the original as they are.

    Args:
        size: original (width, height).
        grid: (rows, columns) of the tile's cells.
        tiles: (rows, columns) of tiles.
        at: (row, column) of this tile.
    """
    rows, columns = grid
    scale = (tiles[1] * columns / size[0], tiles[0] * rows / size[1])
    return ImageGeometry(size, (columns, rows), grid, scale, (-float(at[1] * columns), -float(at[0] * rows)))


def fixed_canvas(image_processor: Any, size: tuple[int, int], grid: tuple[int, int]) -> ImageGeometry:
    """Geometry of processors with one fixed canvas: pad to square, shortest-edge resize + centre crop, or stretch.

    Args:
        image_processor: a transformers image processor (its ``do_pad``, ``size``, ``crop_size`` are read).
        size: original (width, height).
        grid: visual grid (rows, columns).
    """
    width, height = size
    resize = getattr(image_processor, "size", None)
    crop = getattr(image_processor, "crop_size", None) if getattr(image_processor, "do_center_crop", False) else None
    canvas_h = _side(crop, "height") or _side(resize, "height", "shortest_edge") or height
    canvas_w = _side(crop, "width") or _side(resize, "width", "shortest_edge") or width
    if getattr(image_processor, "do_pad", False):
        side = max(width, height)
        # The image is centred on a square; an odd margin puts the smaller half first, as integer division does.
        left, top = (side - width) // 2, (side - height) // 2
        sx, sy = canvas_w / side, canvas_h / side
        return ImageGeometry(size, (canvas_w, canvas_h), grid, (sx, sy), (left * sx, top * sy))
    shortest = _side(resize, "shortest_edge")
    if shortest is not None:
        short, long = min(width, height), max(width, height)
        new_long = int(shortest * long / short)
        new_w, new_h = (shortest, new_long) if width <= height else (new_long, shortest)
        offset = (0.0, 0.0)
        if crop is not None:
            offset = (-float((new_w - canvas_w) // 2), -float((new_h - canvas_h) // 2))
        return ImageGeometry(size, (canvas_w, canvas_h), grid, (new_w / width, new_h / height), offset)
    return ImageGeometry(size, (canvas_w, canvas_h), grid, (canvas_w / width, canvas_h / height), (0.0, 0.0))
