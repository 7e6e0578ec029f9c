"""Padding and grid geometry against the published counts and a brute-force picture."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests import models
from tests.reference.contrast import upsample
from tests.reference.pruning import pad_visible
from vlm_attn.geometry import fixed_canvas

PADDING = SimpleNamespace(
    do_pad=True, do_center_crop=True, size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}
)
CROPPING = SimpleNamespace(
    do_pad=False, do_center_crop=True, size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}
)

# (width, height) -> visible tokens at tolerance 0.01 / 0.3 / 0.5 on a 24 x 24 grid of 336 px
ORACLES = {
    (640, 480): (432, 432, 432),
    (640, 426): (336, 384, 384),
    (1920, 1080): (288, 336, 336),
    (3000, 1000): (192, 192, 192),
    (500, 500): (576, 576, 576),
}


@pytest.mark.parametrize("size", ORACLES)
@pytest.mark.parametrize(("column", "tolerance"), [(0, 0.01), (1, 0.3), (2, 0.5)])
@pytest.mark.parametrize("turned", [False, True])
def test_visible_counts(size: tuple[int, int], column: int, tolerance: float, turned: bool) -> None:
    actual = size[::-1] if turned else size
    canvas = fixed_canvas(PADDING, actual, (24, 24))
    assert int(canvas.visible(tolerance).sum()) == ORACLES[size][column]
    assert int(pad_visible(*actual, 336, 24, tolerance).sum()) == ORACLES[size][column]


def test_visible_cells_are_the_middle_band() -> None:
    flags = fixed_canvas(PADDING, (640, 480), (24, 24)).visible(0.5)
    assert flags[3:21].all()
    assert not flags[:3].any()
    assert not flags[21:].any()


@settings(max_examples=40, deadline=None)
@given(width=st.integers(2, 900), height=st.integers(2, 900), tolerance=st.sampled_from([0.013, 0.31, 0.47]))
def test_visible_is_the_formula(width: int, height: int, tolerance: float) -> None:
    if (width + height) % 2:
        width += 1  # an odd margin cannot be centred on whole pixels; the formula splits it evenly
    flags = fixed_canvas(PADDING, (width, height), (24, 24)).visible(tolerance)
    expected = pad_visible(width, height, 336, 24, tolerance).bool().reshape(24, 24)
    assert torch.equal(flags, expected)


def test_centre_crop_hides_no_cell() -> None:
    assert fixed_canvas(CROPPING, (200, 56), (4, 4)).visible(0.5).all()


@pytest.mark.parametrize("size", [(80, 56), (56, 90), (150, 131)])
@pytest.mark.parametrize("do_pad", [False, True])
def test_cells_lie_where_the_processor_put_them(size: tuple[int, int], do_pad: bool) -> None:
    """Paints one cell's box red in the original and looks for it in the processed picture."""
    processor = models.tiny_processor().image_processor
    processor.do_pad = do_pad
    canvas = fixed_canvas(processor, size, (models.GRID, models.GRID))
    for row, column in ((1, 1), (2, 1), (1, 2)):
        x0, y0, x1, y1 = canvas.cell_box(row, column)
        pixels = np.zeros((size[1], size[0], 3), dtype=np.uint8)
        pixels[max(0, round(y0)) : round(y1), max(0, round(x0)) : round(x1)] = 255
        out = _processed(processor, pixels) - _processed(processor, np.zeros_like(pixels))
        cells = out.reshape(models.GRID, models.PATCH, models.GRID, models.PATCH).mean(axis=(1, 3))
        assert np.unravel_index(cells.argmax(), cells.shape) == (row, column)
        assert cells[row, column] > 0.85
        cells[row, column] = 0
        assert cells.max() < 0.2


def _processed(processor: object, pixels: np.ndarray) -> np.ndarray:
    """Brightness `[S, S]` of what the vision tower gets, 0..1."""
    out = processor(Image.fromarray(pixels), return_tensors="np")["pixel_values"][0]  # type: ignore[operator]
    mean, std = np.array(processor.image_mean), np.array(processor.image_std)  # type: ignore[attr-defined]
    return (out * std[:, None, None] + mean[:, None, None]).mean(axis=0)


def test_stretched_map_is_bilinear() -> None:
    grid = np.random.default_rng(0).random((4, 4)).astype(np.float32)
    canvas = fixed_canvas(CROPPING, (30, 22), (4, 4))
    assert np.allclose(canvas.to_pixels(grid, stretch=True), upsample(grid, 30, 22), atol=1e-6)


def test_square_picture_needs_no_stretching() -> None:
    grid = np.random.default_rng(1).random((4, 4)).astype(np.float32)
    canvas = fixed_canvas(CROPPING, (33, 33), (4, 4))
    assert np.allclose(canvas.to_pixels(grid), upsample(grid, 33, 33), atol=1e-5)


def test_cropped_sides_get_nothing() -> None:
    canvas = fixed_canvas(CROPPING, (100, 50), (4, 4))
    out = canvas.to_pixels(np.ones((4, 4), dtype=np.float32))
    assert out.shape == (50, 100)
    assert np.allclose(out[:, 26:74], 1)
    assert (out[:, :24] == 0).all()
    assert (out[:, 76:] == 0).all()


def test_wrong_map_shape_is_named() -> None:
    with pytest.raises(ValueError, match=r"\(3, 4\)"):
        fixed_canvas(CROPPING, (50, 50), (4, 4)).to_pixels(np.ones((3, 4), dtype=np.float32))
