"""Who is who: the token map against a plain walk over the ids."""

from __future__ import annotations

import pytest
import torch

from tests import models
from tests.reference.llava import visual_runs
from vlm_attn.tokens import Layout, TokenMap, build_token_map

GRID = (models.GRID, models.GRID)


def token_map(batch: models.Batch) -> TokenMap:
    inputs = batch.inputs()
    images = [len(s.pixels) for s in batch.samples]
    return build_token_map(
        inputs["input_ids"] == models.IMAGE_ID,
        inputs["attention_mask"].bool(),
        [[Layout.of_views(GRID)] * n for n in images],
    )


def test_roles_in_a_padded_batch_with_two_images() -> None:
    batch = models.mixed()
    tokens = token_map(batch)
    for row, sample in enumerate(batch.samples):
        pad = tokens.length - len(sample.ids)
        assert int(tokens.valid[row].sum()) == len(sample.ids)
        assert tokens.first[row].nonzero()[:, 0].tolist() == [pad]
        assert torch.equal(tokens.vis[row, pad:], sample.visual)
        for image, run in enumerate(visual_runs(sample.visual)):
            assert (tokens.img_id[row, run + pad] == image).all()
            cells = [[i // models.GRID, i % models.GRID] for i in range(models.N_VISUAL)]
            assert tokens.cell[row, run + pad].tolist() == cells
        positions = sample.visual.nonzero()[:, 0]
        first, last = int(positions[0]), int(positions[-1])
        for slot in range(len(sample.ids)):
            text = not bool(sample.visual[slot])
            at = pad + slot
            assert bool(tokens.sys[row, at]) == (text and slot < first)
            assert bool(tokens.qry[row, at]) == (text and slot > last)
            assert bool(tokens.sees_image[row, at]) == (text and slot > first)
            assert int(tokens.img_id[row, at]) >= 0 or text
        assert not tokens.sees_image[row, :pad].any()


def test_gather_carries_every_role() -> None:
    tokens = token_map(models.mixed())
    idx = torch.stack([torch.arange(3, 30, 3), torch.arange(12, 39, 3)])
    kept = tokens.gather(idx)
    for name in ("valid", "vis", "img_id", "sys", "qry", "first", "index"):
        assert torch.equal(getattr(kept, name), getattr(tokens, name).gather(1, idx))
    assert torch.equal(kept.cell[0], tokens.cell[0, idx[0]])
    ghost = torch.ones_like(idx, dtype=torch.bool)
    ghost[0, 2] = False
    assert not tokens.gather(idx, ghost).vis[0, 2]


def test_beams_repeat_rows() -> None:
    tokens = token_map(models.padded()).repeat(3)
    assert tokens.batch == 6
    assert torch.equal(tokens.vis[0], tokens.vis[2])
    assert not torch.equal(tokens.vis[2], tokens.vis[3])
    assert len(tokens.grids) == 6


def test_too_many_placeholders_are_refused() -> None:
    mask = torch.tensor([[False, True, True, True]])
    with pytest.raises(ValueError, match="3 image placeholders"):
        build_token_map(mask, torch.ones_like(mask), [[Layout.of_views((1, 2))]])
