"""What ranks and what is chosen: trend, padding, budgets, and the noise schedule's published values."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import vlm_attn
from tests import models
from tests.reference.contrast import add_noise, contrast, noise_schedule
from tests.reference.pruning import FastV, budget, pad_visible
from tests.reference.pruning import exp_trend as trend_of
from tests.runs import greedy
from tests.test_tokens import token_map
from tests.test_truth import check_facts, dense_rows
from vlm_attn import selection
from vlm_attn_methods.vcd import signal_share

ORACLES = {0: 1.000, 100: 0.9983, 200: 0.9939, 300: 0.981, 400: 0.9449, 500: 0.863, 600: 0.7342, 700: 0.5927,
           800: 0.467, 900: 0.3649, 999: 0.285}  # fmt: skip


def kept_by(scores: torch.Tensor, tokens: selection.TokenMap, keep: float) -> list[list[int]]:
    """Kept ranks per image of the first row."""
    mask = selection.select(tokens, keep, selection.top_k(scores))
    return [mask[0, slots].nonzero()[:, 0].tolist() for row, slots, _ in selection.images(tokens) if row == 0]


def test_uniform_attention_keeps_the_lowest_indices() -> None:
    tokens = token_map(models.two_images())
    flat = torch.full(tokens.vis.shape, 0.01)
    for sigma in (0.1, 1.0, 2.5):
        debiased = selection.exp_trend(tokens, flat, sigma)
        assert kept_by(debiased, tokens, 5) == [list(range(5))] * 2
    assert torch.equal(selection.exp_trend(tokens, flat, 0.0), flat)


def test_trend_is_per_image_and_ends_at_its_exponent() -> None:
    """Published: sigma 1.2955 over 576 tokens ends at 0.2738."""
    assert float(trend_of(576, 1.2955)[-1]) == pytest.approx(0.2738, abs=5e-5)
    tokens = token_map(models.mixed())
    out = selection.exp_trend(tokens, torch.ones(tokens.vis.shape), 1.2955)
    for row, slots, total in selection.images(tokens):
        assert torch.allclose(out[row, slots], trend_of(total, 1.2955), atol=1e-6)
        assert float(out[row, slots[-1]]) == pytest.approx(0.2738, abs=5e-5)
    assert (out[~tokens.vis] == 1).all()


def test_trend_of_survivors_uses_their_first_position() -> None:
    """After an earlier stage, x is still the place on the picture, not the rank among survivors."""
    tokens = token_map(models.single())
    visual = tokens.vis[0].nonzero()[:, 0]
    left = tokens.gather(visual[[0, 7, 15]][None])
    out = selection.exp_trend(left, torch.ones(1, 3), 2.0)
    assert torch.allclose(out[0], torch.tensor([1.0, math.exp(-2 * 7 / 15), math.exp(-2.0)]))


def test_constant_factor_changes_no_choice() -> None:
    tokens = token_map(models.two_images())
    scores = torch.rand(tokens.vis.shape)
    assert kept_by(scores, tokens, 0.3) == kept_by(37.0 * scores, tokens, 0.3)


@pytest.mark.parametrize(
    ("keep", "total"), list(itertools.product([1, 7, 576, 1000, 0.001, 0.1, 0.5, 1.0], [1, 16, 576]))
)
def test_budget(keep: float, total: int) -> None:
    assert selection.budget(keep, total) == budget(keep, total)
    assert 1 <= selection.budget(keep, total) <= total


def test_earlier_token_wins_a_tie() -> None:
    tokens = token_map(models.single())
    assert kept_by(torch.zeros(tokens.vis.shape), tokens, 4) == [[0, 1, 2, 3]]


def test_padding_is_never_chosen() -> None:
    """Two pictures per prompt, one of them so flat that fewer cells show it than the budget asks for."""
    model, batch, processor = models.llava(4), models.two_images(), models.tiny_processor()
    processor.image_processor.do_pad = True
    sizes = [(56, 56), (200, 80)]
    flags = [pad_visible(*size, models.IMAGE_SIZE, models.GRID, 0.5) for size in sizes]
    assert 0 < int(flags[1].sum()) < 10
    method = vlm_attn.method("fastv", keep=10, calibrate=["pad_mask", "exp_trend"], sigma=1.1)
    with vlm_attn.attach(model, method, processor) as session:
        session.image_sizes = [sizes]
        tokens, logits, _ = greedy(model, batch.inputs())
        last = session.last
    expected, references = dense_rows(
        model, batch, tokens, lambda _: FastV(model, 2, 10, sigma=1.1, visible=[f.clone() for f in flags])
    )
    assert float((logits - expected).abs().max() / expected.abs().max()) <= 1e-4
    check_facts("fastv", references, last)
    kept = last.kept_visual(2)[0]
    assert len(kept) == 10 + int(flags[1].sum())


def test_crop_processor_hides_nothing() -> None:
    model, processor = models.llava(4), models.tiny_processor()
    with vlm_attn.attach(model, vlm_attn.method("fastv", keep=7, calibrate=["pad_mask"]), processor) as session:
        greedy(model, models.single().inputs(), 1)
        masked = session.last.kept(2)[0]
    with vlm_attn.attach(model, vlm_attn.method("fastv", keep=7)) as session:
        greedy(model, models.single().inputs(), 1)
        assert torch.equal(session.last.kept(2)[0], masked)


def test_ask_knows_the_picture_sizes() -> None:
    processor = models.tiny_processor()
    processor.image_processor.do_pad = True
    method = vlm_attn.method("fastv", keep=16, calibrate=["pad_mask"])
    with vlm_attn.wrap(models.llava(4), method, processor=processor) as vlm:
        stats = vlm.ask(models.picture(200, 80), "w5 w9", max_new_tokens=2).stats
    visible = pad_visible(200, 80, models.IMAGE_SIZE, models.GRID, 0.5)
    assert stats["kept_tokens"]["last"] == int(visible.sum())
    cells = [[i // models.GRID, i % models.GRID] for i in visible.nonzero()[:, 0].tolist()]
    assert [list(cell) for cell in stats["kept_cells"][0]] == cells


# ------------------------------------------------------------------------------------------------------------- VCD


@pytest.mark.parametrize("step", ORACLES)
def test_noise_schedule(step: int) -> None:
    assert float(noise_schedule()[step]) == pytest.approx(ORACLES[step], abs=6e-5 if step != 300 else 6e-4)
    assert signal_share(step) == pytest.approx(float(noise_schedule()[step]), abs=1e-6)


def test_noise_schedule_falls() -> None:
    shares = [signal_share(step) for step in range(0, 1000, 37)]
    assert all(a > b for a, b in itertools.pairwise(shares))


def test_noise_keeps_the_dtype_and_every_picture_alike() -> None:
    pixels = torch.randn(2, 3, 28, 28)
    pixels[1] = pixels[0]
    out = torch.stack([vlm_attn.method("vcd").alter_pixels(picture) for picture in pixels])
    assert torch.equal(out[0], out[1])
    assert vlm_attn.method("vcd").alter_pixels(pixels.bfloat16()).dtype == torch.bfloat16
    other = torch.stack([vlm_attn.method("vcd", seed=1).alter_pixels(picture) for picture in pixels])
    assert (other - out).abs().max() > 0.1
    zero = add_noise(pixels, torch.zeros_like(pixels), 500)
    assert float((out - zero).std()) == pytest.approx(math.sqrt(1 - 0.863**2), abs=0.02)


def test_contrast_of_equal_branches_is_the_distribution_on_the_plausible() -> None:
    logits = 3 * torch.randn(2, 50)
    out = vlm_attn.method("vcd", alpha=1.7).combine(logits, logits)
    kept = out.isfinite()
    assert torch.allclose(out[kept], logits[kept], atol=1e-5)
    probabilities = logits.softmax(-1)
    assert torch.equal(kept, probabilities >= 0.1 * probabilities.amax(-1, keepdim=True))
    assert 0 < int(kept.sum()) < kept.numel()


def test_beta_one_is_greedy_and_no_beta_forbids_nothing() -> None:
    logits, branch = torch.randn(3, 40), torch.randn(3, 40)
    out = vlm_attn.method("vcd", beta=1.0).combine(logits, branch)
    assert torch.equal(out.argmax(-1), logits.argmax(-1))
    assert (out.isfinite().sum(-1) == 1).all()
    assert vlm_attn.method("vcd", beta=None).combine(logits, branch).isfinite().all()


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.1), (0.3, 0.5)])
def test_combination(alpha: float, beta: float) -> None:
    logits, branch = torch.randn(2, 30), torch.randn(2, 30)
    out = vlm_attn.method("vcd", alpha=alpha, beta=beta).combine(logits, branch)
    for row in range(2):
        assert torch.allclose(out[row], contrast(logits[row], branch[row], alpha, beta), atol=1e-5)
