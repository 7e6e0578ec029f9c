"""CARVE: its maps against dense attention rows, its regions against a flood fill, its invariants on planted maps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import vlm_attn
from tests import models
from tests.reference.contrast import AttentionRows, carve_grid, carve_mask, carve_refine, upsample
from tests.reference.llava import image_features
from vlm_attn_methods.carve import SUFFIX, cut_out, region_mask

QUESTION, GENERAL = "w31 w45 w12", "w77 w80"
LAYERS = (1, 2)
STEPS = 4


@pytest.fixture
def vlm() -> Iterator[Any]:
    wrapped = vlm_attn.wrap(models.llava(4), processor=models.tiny_processor())
    yield wrapped
    wrapped.close()


def rows_of(vlm: Any, image: Image.Image, text: str) -> dict[int, list[torch.Tensor]]:
    """Dense attention rows of a greedy answer: the row of every new token, prompt's last row first."""
    inputs = vlm.inputs([image], text)
    model, ids = vlm.model, inputs["input_ids"][0]
    with vlm.session.suspended():
        new = model.generate(**inputs, max_new_tokens=STEPS, do_sample=False)[0, len(ids) :]
    reference = AttentionRows(model)
    reference.run(ids, image_features(model, inputs["pixel_values"]), new[:-1])
    return reference.rows


def expected_grid(vlm: Any, image: Image.Image, mode: str, suffix: str = "") -> np.ndarray:
    task, general = (rows_of(vlm, image, text + suffix) for text in (QUESTION, GENERAL))
    return carve_grid(task, general, list(LAYERS), (models.GRID, models.GRID), 1e-8, mode)


@pytest.mark.parametrize("mode", ["t_start", "t_end", "T_full"])
def test_contrast_heatmap_is_the_formula(vlm: Any, mode: str) -> None:
    image = models.picture(64, 64)
    got = vlm.heatmap(image, QUESTION, kind="contrast", layers=LAYERS, mode=mode, steps=STEPS, general=GENERAL)
    expected = upsample(expected_grid(vlm, image, mode), 64, 64)
    assert got.shape == (64, 64)
    assert np.abs(got / got.max() - expected / expected.max()).max() <= 1e-4


def test_attention_heatmap_is_the_mean_row(vlm: Any) -> None:
    image = models.picture(64, 64)
    got = vlm.heatmap(image, QUESTION, kind="attention", layers=LAYERS)
    rows = rows_of(vlm, image, QUESTION)
    mean = torch.stack([rows[layer][0] for layer in LAYERS]).mean(dim=0).reshape(models.GRID, models.GRID)
    assert np.allclose(got, upsample(mean.numpy(), 64, 64), atol=1e-5)


def test_heatmaps_ignore_the_attached_method(vlm: Any) -> None:
    image = models.picture(64, 64)
    options = {"layers": LAYERS, "steps": 2}
    plain = vlm.heatmap(image, QUESTION, **options)
    vlm.set_method([vlm_attn.method("fastv", keep=2), "vhr"])
    assert np.array_equal(vlm.heatmap(image, QUESTION, **options), plain)


def test_kept_heatmap_shows_the_kept_cells(vlm: Any) -> None:
    vlm.set_method(vlm_attn.method("fastv", keep=5))
    kept = vlm.heatmap(models.picture(56, 56), QUESTION, kind="kept")
    cells = kept.reshape(models.GRID, models.PATCH, models.GRID, models.PATCH)
    assert set(np.unique(kept)) == {0.0, 1.0}
    assert int((cells[:, 7, :, 7] == 1).sum()) == 5


@pytest.mark.parametrize("pictures", ["both", "refined"])
@pytest.mark.parametrize("mode", ["t_start", "t_end", "T_full"])
def test_refined_picture_is_the_references(vlm: Any, mode: str, pictures: str) -> None:
    image = models.picture(60, 44, seed=3)
    vlm.set_method(
        vlm_attn.method(
            "carve", layers=LAYERS, mode=mode, steps=STEPS, top=0.3, regions=1, general=GENERAL, pictures=pictures,
            skip_correlation=None, stretch=True,
        )
    )  # fmt: skip
    refined, text = vlm.refine(image, QUESTION)
    score = upsample(expected_grid(vlm, image, mode, SUFFIX), *image.size)
    mask = carve_mask(score, 0.3, 1)
    assert mask is not None
    assert text == QUESTION
    assert len(refined) == (2 if pictures == "both" else 1)
    expected = carve_refine(image, mask)
    assert refined[-1].size == expected.size
    assert np.abs(np.asarray(refined[-1], dtype=int) - np.asarray(expected, dtype=int)).mean() < 0.5
    if pictures == "both":
        assert refined[0].size == image.size
    answer = vlm.ask(image, QUESTION, max_new_tokens=2)
    assert answer.stats["images"] == len(refined)
    assert answer.stats["visual_tokens"] == models.N_VISUAL * len(refined)


def test_default_strength_changes_the_picture(vlm: Any) -> None:
    image = models.picture(60, 60, seed=1)
    plain = vlm.ask(image, QUESTION, max_new_tokens=3)
    vlm.set_method(vlm_attn.method("carve", steps=2))
    assert vlm.ask(image, QUESTION, max_new_tokens=3).stats["visual_tokens"] == 2 * models.N_VISUAL
    vlm.set_method(vlm_attn.method("carve", top=1.0))
    same = vlm.ask(image, QUESTION, max_new_tokens=3)
    assert same.tokens == plain.tokens
    assert same.stats["visual_tokens"] == models.N_VISUAL


def test_same_question_twice_keeps_the_picture(vlm: Any) -> None:
    """With G = Q the contrast is 1 everywhere: rounding noise must not be thresholded."""
    image = models.picture(60, 60, seed=1)
    vlm.set_method(vlm_attn.method("carve", general=QUESTION, steps=2, skip_correlation=None))
    refined, _ = vlm.refine(image, QUESTION)
    assert len(refined) == 1
    assert np.array_equal(np.asarray(refined[0]), np.asarray(image))


class Planted:
    """A probe whose question map has one bright cell."""

    layers = 8

    def maps(self, image: Image.Image, text: str, *, layers: Sequence[int], steps: int) -> np.ndarray:
        """Flat for the general instruction, one cell brighter for the question."""
        grid = np.full((steps, len(layers), 6, 6), 1e-3, dtype=np.float32)
        if text.startswith("Q"):
            grid[..., 4, 1] = 9e-3
        return grid

    def to_pixels(self, grid_map: np.ndarray, image: Image.Image, *, stretch: bool = False) -> np.ndarray:
        """Bilinear."""
        return upsample(grid_map, *image.size).astype(np.float32)


def test_planted_patch_is_inside_the_box() -> None:
    pixels = np.full((60, 60, 3), 40, dtype=np.uint8)
    pixels[44:46, 14:16] = (255, 0, 0)  # the middle of cell (4, 1)
    method = vlm_attn.method("carve", layers=(0,), steps=1, skip_correlation=None)
    refined, _ = method.refine([Image.fromarray(pixels)], "Q", Planted())
    crop = np.asarray(refined[-1]).astype(int)
    assert len(refined) == 2
    assert (crop[..., 0] > 150).any()
    assert max(refined[-1].size) >= 60


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6), top=st.sampled_from([0.1, 0.3, 0.6, 1.0]), count=st.integers(1, 4),
    shape=st.tuples(st.integers(1, 24), st.integers(1, 24)),
)  # fmt: skip
def test_regions_are_the_flood_fill(seed: int, top: float, count: int, shape: tuple[int, int]) -> None:
    score = np.random.default_rng(seed).random(shape)
    got, expected = region_mask(score, top, count), carve_mask(score, top, count)
    assert (got is None) == (expected is None)
    if got is not None and expected is not None:
        assert np.array_equal(got, expected)
        if top == 1.0:
            assert got.all()


@pytest.mark.parametrize("value", [1.0, 1e-9])
def test_constant_map_has_no_region(value: float) -> None:
    assert region_mask(np.full((8, 8), value), 0.2, 3) is None


@pytest.mark.parametrize("size", [(40, 30), (1, 50), (300, 7)])
def test_cut_out_of_everything_is_the_picture(size: tuple[int, int]) -> None:
    image = models.picture(*size)
    out = cut_out(image, np.ones((size[1], size[0]), dtype=bool))
    assert np.array_equal(np.asarray(out), np.asarray(image))


def test_cut_out_keeps_aspect_and_blacks_out() -> None:
    image = Image.new("RGB", (100, 50), (200, 200, 200))
    mask = np.zeros((50, 100), dtype=bool)
    mask[10:20, 10:15] = True
    mask[10:15, 15:30] = True
    out = cut_out(image, mask)
    assert out.size == (100, 50) if 100 / 20 >= 50 / 10 else out.size[0] / out.size[1] == 2
    pixels = np.asarray(out)
    assert (pixels[-5:, -20:] < 20).all()
    assert (pixels[:20, :10] > 180).all()
