"""Published and derived figures that the pruning kit must reproduce, each under its own name."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from tests.reference import kit as loops
from tests.reference import kit_select as literal
from tests.reference.kit import draw, fifty
from vlm_attn.flops import prefill_flops
from vlm_attn.geometry import ImageGeometry
from vlm_attn.kit import budgets, calibrators, mergers, scores, selectors

N, DEPTH, TEXT = 576, 32, 60
LLAVA = {"hidden": 4096, "inner": 11008}


def flops_ratio(visual: list[int]) -> float:
    return prefill_flops([TEXT + v for v in visual], **LLAVA) / prefill_flops([TEXT + N] * DEPTH, **LLAVA)


# ------------------------------------------------------------------------------------------------ budgets and FLOPs


def test_oracle_9_flops_fastv_half_at_layer_2() -> None:
    assert flops_ratio(budgets.per_layer(N, DEPTH, [(2, 288)])) == pytest.approx(0.570, abs=6e-4)


def test_oracle_9_flops_pyramiddrop_halving() -> None:
    schedule = [(layer, budgets.floor_share(N, share)) for layer, share in budgets.PYRAMIDDROP]
    visual = budgets.per_layer(N, DEPTH, schedule)
    assert budgets.equivalent_tokens(visual) == 270
    assert flops_ratio(visual) == pytest.approx(0.515, abs=6e-4)


@pytest.mark.parametrize(("kept", "ratio"), [(192, 0.390), (128, 0.290), (64, 0.191)])
def test_oracle_9_flops_before_the_language_model(kept: int, ratio: float) -> None:
    assert flops_ratio([kept] * DEPTH) == pytest.approx(ratio, abs=6e-4)


def test_oracle_section_0_fastv_128_is_156() -> None:
    assert budgets.equivalent_tokens(budgets.per_layer(N, DEPTH, [(2, 128)])) == 156


@pytest.mark.parametrize(("average", "kept"), [(192, 166), (128, 98), (64, 30)])
def test_oracle_section_0_fastv_must_keep(average: int, kept: int) -> None:
    assert budgets.equivalent_tokens(budgets.per_layer(N, DEPTH, [(2, kept)])) == pytest.approx(average, abs=0.5)


def test_oracle_section_0_pyramiddrop_short_is_128() -> None:
    schedule = [(layer, budgets.floor_share(N, r)) for layer, r in ((2, 0.32), (10, 0.16), (20, 0.08))]
    assert budgets.equivalent_tokens(budgets.per_layer(N, DEPTH, schedule)) == 128


def test_oracle_section_0_himap_is_125() -> None:
    assert budgets.equivalent_tokens(budgets.per_layer(N, DEPTH, [(2, 115), (8, 90)])) == pytest.approx(125, abs=0.1)


@pytest.mark.parametrize(("nominal", "equivalent"), [(192, 192.0), (128, 128.6), (64, 64.8)])
def test_oracle_section_0_sparsevlm_with_recycled_ones(nominal: int, equivalent: float) -> None:
    """A layer is charged its output length, merged tokens included."""
    schedule, before = [], N
    for layer, kept in zip(budgets.SPARSEVLM_LAYERS, budgets.SPARSEVLM[nominal], strict=True):
        before = kept + budgets.recycled(before - kept)[1]
        schedule.append((layer, before))
    assert budgets.equivalent_tokens(budgets.per_layer(N, DEPTH, schedule)) == pytest.approx(equivalent, abs=0.05)


@pytest.mark.parametrize(("keep", "kept"), [(0.1112, 64), (0.2223, 128), (0.3334, 192)])
def test_oracle_section_2_zoo_ratios(keep: float, kept: int) -> None:
    assert budgets.floor_share(N, keep) == kept


# ------------------------------------------------------------------------------------------------- positional trend


def test_oracle_section_1_3_himap_pope_weight_ends_at_0_2738() -> None:
    sigma = calibrators.RELEASED_SIGMA["himap"][calibrators.BENCHMARKS.index("POPE")]
    weights = calibrators.trend_weights(calibrators.raster_position(N), sigma)
    assert float(weights[0]) == 1
    assert float(weights[575]) == pytest.approx(0.2738, abs=5e-5)


@pytest.mark.parametrize(("index", "w"), [(0, 1.0), (288, 0.7866), (575, 0.3582)])
def test_oracle_section_1_3_fastv_released_cubic(index: int, w: float) -> None:
    """The middle figure is that of the released vector's place 288, the first one past x = 0.5."""
    x = calibrators.raster_position(N)
    assert float(calibrators.fastv_released(x)[index]) == pytest.approx(w, abs=5e-5)


def test_oracle_section_1_3_fastv_endpoint_exponent_is_1_03() -> None:
    assert -math.log(float(calibrators.fastv_released(torch.tensor(1.0)))) == pytest.approx(1.03, abs=5e-3)


@pytest.mark.parametrize(
    ("pruner", "mean"), [("himap", 1.07), ("pyramiddrop", 1.89), ("sparsevlm", 1.94), ("tokencarve", 0.83)]
)
def test_oracle_section_1_3_mean_released_exponent(pruner: str, mean: float) -> None:
    sigmas = calibrators.RELEASED_SIGMA[pruner]
    assert sum(sigmas) / len(sigmas) == pytest.approx(mean, abs=6e-3)


def test_oracle_3_uniform_attention_keeps_the_lowest_indices() -> None:
    flat, x = torch.full((N,), 1 / N), calibrators.raster_position(N)
    for sigma in (0.1, 1.0, 1.9):
        assert selectors.topk(calibrators.exp_trend(flat, x, sigma), 64).tolist() == list(range(64))
    assert torch.equal(calibrators.exp_trend(flat, x, 0.0), flat)


@fifty
def test_oracle_3_a_constant_factor_changes_nothing(seed: int) -> None:
    a, x = draw(seed, N).exp(), calibrators.raster_position(N)
    kept = selectors.topk(calibrators.exp_trend(a, x, 1.3), 64)
    assert torch.equal(kept, selectors.topk(calibrators.exp_trend(a * 8.0, x, 1.3), 64))


@fifty
def test_oracle_section_1_4_self_check_after_debiasing(seed: int) -> None:
    """The exponent refitted on calibrated scores lies within 0.1 of zero."""
    x = calibrators.raster_position(N)
    biased = torch.exp(1.7 * x + 0.3 * draw(seed, N))
    sigma = calibrators.trend_sigma(x, biased)
    assert sigma > 1.5
    assert abs(calibrators.trend_sigma(x, calibrators.exp_trend(biased, x, sigma))) < 0.1


# ---------------------------------------------------------------------------------------------------------- padding

PADDED = {
    (640, 480): (432, 432, 432),
    (640, 426): (336, 384, 384),
    (1920, 1080): (288, 336, 336),
    (3000, 1000): (192, 192, 192),
    (500, 500): (576, 576, 576),
}


def padded_canvas(width: int, height: int) -> ImageGeometry:
    side, longest = 336, max(width, height)
    scale = side / longest
    offset = ((longest - width) / 2 * scale, (longest - height) / 2 * scale)
    return ImageGeometry((width, height), (side, side), (24, 24), (scale, scale), offset)


@pytest.mark.parametrize("size", PADDED)
@pytest.mark.parametrize(("column", "tolerance"), [(0, 0.01), (1, 0.3), (2, 0.5)])
def test_oracle_4_section_1_5_visible_tokens(size: tuple[int, int], column: int, tolerance: float) -> None:
    for width, height in (size, size[::-1]):
        visible = padded_canvas(width, height).visible(tolerance)
        assert int(visible.sum()) == PADDED[size][column]


@pytest.mark.parametrize("size", PADDED)
def test_oracle_4_capped_choice_never_takes_padding(size: tuple[int, int]) -> None:
    visible = padded_canvas(*size).visible(0.5).reshape(-1)
    a = draw(1, N).exp() * ~visible + 1e-6 * draw(2, N).abs()  # padding has nearly all the attention
    idx, valid = selectors.topk_visible(calibrators.suppress(a, visible), visible, 500)
    assert int(valid.sum()) == min(500, int(visible.sum()))
    assert visible[idx[valid]].all()


# ----------------------------------------------------------------------------------------------------------- rotary


@pytest.mark.parametrize(("distance", "gain"), [(0, 1.0), (600, 0.21), (2000, 0.03)])
def test_oracle_section_1_8_all_ones_rope(distance: int, gain: float) -> None:
    frequencies = calibrators.inverse_frequencies(128, 1e4)
    assert float(calibrators.rope_gain(torch.tensor(distance), frequencies)) == pytest.approx(gain, abs=5e-3)


def test_oracle_section_1_8_all_ones_rope_changes_sign_below_3000() -> None:
    distance = torch.arange(3001)
    short = calibrators.rope_gain(distance, calibrators.inverse_frequencies(128, 1e4))
    assert float(short.min()) < 0
    assert float(calibrators.rope_gain(distance, calibrators.inverse_frequencies(128, 1e6)).min()) > 0.24
    divided = calibrators.rope_ones(torch.ones(3001), distance, calibrators.inverse_frequencies(128, 1e4))
    assert float(divided.max()) == pytest.approx(10)
    assert float(divided.min()) >= 1


# -------------------------------------------------------------------------------------------------------- selection


@fifty
def test_oracle_5_maxmin_takes_duplicates_last(seed: int) -> None:
    distinct = draw(seed, 8, 6)
    x = torch.cat([distinct, distinct[[0, 3, 3]]])
    order = torch.randperm(11, generator=torch.Generator().manual_seed(seed))
    kinds = torch.tensor([*range(8), 0, 3, 3])[order]
    for kept in (selectors.maxmin(x[order], 8), selectors.maxmin(x[order], 8, draw(seed + 1, 11).exp())):
        assert sorted(kinds[kept].tolist()) == list(range(8))


def test_oracle_5_dpp_takes_all_orthogonal_tokens_alike() -> None:
    x = torch.linalg.qr(draw(0, 12, 12)).Q
    order, gains = selectors.dpp_gains(x, torch.full((12,), 0.7), 12)
    assert sorted(order.tolist()) == list(range(12))
    assert torch.allclose(gains, torch.full((12,), 0.49), atol=1e-5)


@fifty
def test_oracle_5_dpp_gains_nothing_from_duplicates(seed: int) -> None:
    x = torch.cat([draw(seed, 5, 32)] * 2)
    _, gains = selectors.dpp_gains(x, torch.ones(10), 10)
    assert (gains[:5] > 0.1).all()
    assert (gains[5:] == 0).all()


@fifty
def test_oracle_dpp_starts_with_the_earliest_of_equals(seed: int) -> None:
    order, gains = selectors.dpp_gains(draw(seed, 9, 7), torch.ones(9), 3)
    assert int(order[0]) == 0
    assert float(gains[0]) == 1


@fifty
def test_oracle_6_zoo_with_a_linear_projector_is_farthest_point_from_0(seed: int) -> None:
    matrix, x = draw(seed, 7, 9), draw(seed + 1, 20, 9)
    s = scores.zo_sensitivity(lambda z: z @ matrix.T, x, m=8, seed=seed)
    assert float(s.max() - s.min()) < 1e-3 * float(s.mean())  # the same for all tokens up to rounding
    exact = scores.jvp_sensitivity(lambda z: z @ matrix.T, x, m=8, seed=seed)
    assert float(exact.max() - exact.min()) < 1e-5 * float(exact.mean())
    flat = calibrators.minmax(exact)
    assert (flat == 1).all()
    kept = selectors.maxmin(x @ matrix.T, 6, flat).tolist()
    assert kept == literal.maxmin(x @ matrix.T, 6, start=0)


@fifty
def test_oracle_section_3_12_holov_diversity_is_inert_as_released(seed: int) -> None:
    """Run weights with and without the variance term agree to 1e-7, so the kept sets do."""
    a, x = draw(seed, N).softmax(-1), draw(seed + 1, N, 16)
    t = scores.holistic(a, x, 16)
    spans = selectors.run_bounds(N, 16)

    def weights(score: torch.Tensor) -> torch.Tensor:
        means = torch.stack([score[s:e].mean() for s, e in spans])
        return means / means.sum()

    assert torch.allclose(weights(t), weights(a), atol=1e-7)
    assert selectors.runs(a, t, 64, 16).tolist() == selectors.runs(a, a, 64, 16).tolist()
    assert not torch.allclose(weights(scores.holistic(a, x, 16, "image")), weights(a), atol=1e-4)


@fifty
def test_oracle_dpp_without_relevance_spreads_like_diversity(seed: int) -> None:
    """Two tight clusters and one lone token: both selectors take one of each first."""
    centres = torch.eye(6)[:3]
    x = torch.cat([F.normalize(centres[[0]] + 0.01 * draw(seed, 4, 6), dim=-1),
                   F.normalize(centres[[1]] + 0.01 * draw(seed + 1, 4, 6), dim=-1), centres[[2]]])  # fmt: skip
    kind = torch.tensor([0] * 4 + [1] * 4 + [2])
    for kept in (selectors.dpp(x, torch.ones(9), 3), selectors.maxmin(x, 3)):
        assert sorted(kind[kept].tolist()) == [0, 1, 2]


def test_oracle_visionzip_contextual_tokens_double() -> None:
    """Target plus mean of its own: twice the length when the assigned ones equal it."""
    x = torch.ones(6, 4)
    parent = mergers.stride_merge(x, 1)
    assert torch.allclose(mergers.merge(x, parent, how="add_mean")[0], 2 * x[0])
    assert torch.allclose(mergers.merge(x, parent)[0], x[0])


def test_oracle_clip_relevance_is_negated() -> None:
    image = torch.eye(3)
    assert scores.clip_relevance(image, image[:1]).tolist() == pytest.approx([-1, 0, 0])
    assert loops.clip_relevance(image, image[:1]) == pytest.approx([-1, 0, 0])
