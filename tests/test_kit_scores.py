"""Scores and calibrators against loops, on 50 random inputs each."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.reference import kit as loops
from tests.reference.kit import draw, fifty
from tests.reference.kit_select import bounds
from vlm_attn.kit import calibrators, scores


def close(got: Tensor, expected: object, tolerance: float = 2e-5) -> None:
    wanted = torch.tensor(expected, dtype=torch.float64)
    scale = max(1.0, float(wanted.abs().max()))
    assert got.shape == wanted.shape
    assert float((got.double() - wanted).abs().max()) <= tolerance * scale


def weights_of(seed: int, heads: int, rows: int, n: int) -> Tensor:
    """Weights on n visual keys; text keys hold the rest of each row, so that heads differ in their mass."""
    return (3 * draw(seed, heads, rows, n + 4)).softmax(-1)[..., :n]


@fifty
def test_attention_rows(seed: int) -> None:
    heads, kv, n, d = 4, (1, 2, 4)[seed % 3], 9 + seed % 5, 6
    query, key = draw(seed, heads, d), draw(seed + 100, kv, n, d)
    close(scores.attention_row(query, key, 0.4), loops.attention_row(query, key, 0.4))
    close(scores.cls_attention(query, key, 0.4), loops.cls_attention(query, key, 0.4))


@pytest.mark.parametrize("over", ["mean", "sum"])
@fifty
def test_head_rows(seed: int, over: str) -> None:
    heads, count, n = 5, 6, 11
    weights = weights_of(seed, heads, count, n)
    rows = draw(seed + 1, count) > 0
    rows[seed % count] = True
    used = rows.nonzero()[:, 0].tolist()
    close(scores.head_rows(weights, over=over), loops.head_rows(weights, list(range(count)), over))  # type: ignore[arg-type]
    close(scores.head_rows(weights, rows, over), loops.head_rows(weights, used, over))  # type: ignore[arg-type]
    got = scores.head_rows(weights, rows, over, heads=2)  # type: ignore[arg-type]
    close(got, loops.head_rows(weights, used, over, heads=2))


def test_the_last_row_alone_is_fastvs_score() -> None:
    weights = weights_of(3, 4, 7, 9)
    assert torch.allclose(scores.head_rows(weights[:, -1:]), weights[:, -1].mean(0))


@pytest.mark.parametrize("causal", [False, True])
@fifty
def test_received_attention(seed: int, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    query, key = draw(seed, 3, 8, 5), draw(seed + 1, 3, 8, 5)
    expected = loops.received(query, key, 0.5, causal)
    close(scores.received_attention(query, key, 0.5, causal=causal), expected)
    monkeypatch.setattr(scores, "CHUNK_ELEMENTS", 60)  # several chunks of rows
    close(scores.received_attention(query, key, 0.5, causal=causal), expected)
    summed = scores.received_attention(query, key, 0.5, "sum", causal)
    close(summed, [e * 3 * 8 for e in expected])


@fifty
def test_raters(seed: int) -> None:
    text, visual = draw(seed, 6, 4), draw(seed + 1, 9, 4)
    assert scores.text_raters(text, visual).tolist() == loops.raters(text, visual)


@fifty
def test_value_flow(seed: int) -> None:
    attention, cls_value, value = weights_of(seed, 1, 3, 7)[0], draw(seed + 1, 3, 4), draw(seed + 2, 3, 7, 4)
    flow = scores.value_flow(attention, cls_value, value)
    close(flow, loops.value_flow(attention, cls_value, value))
    assert torch.equal(scores.running(None, flow), flow)
    close(scores.running(flow, 2 * flow), (1.5 * flow).tolist())


@fifty
def test_svd_energy_from_the_gram_matrix(seed: int) -> None:
    x = draw(seed, 10, (4, 10, 25)[seed % 3])
    close(scores.svd_energy(x), loops.svd_energy(x), 1e-5)


@fifty
def test_borda(seed: int) -> None:
    a, b = draw(seed, 12).round(decimals=0), draw(seed + 1, 12)  # the first has ties
    close(scores.borda(a, b), loops.borda(a.tolist(), b.tolist()))


@fifty
def test_feature_scores(seed: int) -> None:
    x, other = draw(seed, 12, 6), draw(seed + 1, 3, 6)
    basis = [1, 5, 7]
    close(scores.approx_error(x, torch.tensor(basis)), loops.approx_error(x, basis), 1e-4)
    close(scores.max_similarity(x, torch.tensor(basis)), loops.duplication(x, basis))
    close(scores.clip_relevance(x, other), loops.clip_relevance(x, other))
    close(scores.norm(x), [loops.length(row) for row in loops.rows_of(x)])
    close(scores.group_mean(x[:, 0], 4), [sum(x[4 * i : 4 * i + 4, 0].tolist()) / 4 for i in range(3)])


@pytest.mark.parametrize("scope", ["run", "image"])
@fifty
def test_holistic(seed: int, scope: str) -> None:
    a, x = draw(seed, 14).softmax(-1), draw(seed + 1, 14, 5)
    expected = loops.holistic(a.tolist(), x, bounds(14, 4), scope == "image")
    close(scores.holistic(a, x, 4, scope), expected)  # type: ignore[arg-type]


@fifty
def test_sensitivity(seed: int) -> None:
    matrix, bias, x = draw(seed, 5, 6), draw(seed + 1, 5), draw(seed + 2, 8, 6)

    def project(z: Tensor) -> Tensor:
        return torch.tanh(z @ matrix.T + bias)

    bank = scores.directions(4, 6, seed)
    assert torch.allclose(bank.norm(dim=-1), torch.ones(4))
    finite = scores.zo_sensitivity(project, x, 4, 0.01, seed)
    close(finite, loops.sensitivity(matrix, bias, x, bank, 0.01), 1e-3)
    exact = scores.jvp_sensitivity(project, x, 4, seed)
    close(exact, loops.derivative(matrix, bias, x, bank))
    close(finite, exact.tolist(), 1e-3)
    end = draw(seed + 3, 3, 5)
    for sensitivity in (scores.zo_sensitivity, scores.jvp_sensitivity):
        whole = sensitivity(lambda z: project(z) @ end.T + 1, x, m=4, seed=seed)
        close(sensitivity(project, x, m=4, seed=seed, behind=lambda z: z @ end.T), whole.tolist(), 1e-3)


def test_directions_follow_the_seed_alone() -> None:
    torch.manual_seed(5)
    first = scores.directions(3, 4, seed=1)
    torch.manual_seed(6)
    assert torch.equal(first, scores.directions(3, 4, seed=1))
    assert not torch.equal(first, scores.directions(3, 4, seed=2))


def test_low_rank_is_the_best_of_its_rank() -> None:
    weight = draw(0, 6, 9)
    left, right = scores.low_rank(weight, 3)
    error = float((weight - left @ right).norm())
    tail = torch.linalg.svdvals(weight)[3:]
    assert error == pytest.approx(float(tail.norm()), rel=1e-5)
    assert torch.allclose(torch.matmul(*scores.low_rank(weight, 6)), weight, atol=1e-5)


def test_head_importance_adds_magnitudes() -> None:
    outputs = draw(0, 2, 3, 4, 5)
    close(scores.head_importance(outputs), [[float(outputs[b, h].abs().sum()) for h in range(3)] for b in range(2)])


# ------------------------------------------------------------------------------------------------------ calibrators


@fifty
def test_trend(seed: int) -> None:
    n, sigma = (1, 2, 16, 575, 576)[seed % 5], 0.1 * (seed - 10)
    a = draw(seed, n).abs()
    x = calibrators.raster_position(n)
    expected = [v * w for v, w in zip(a.tolist(), loops.trend(n, sigma), strict=True)]
    close(calibrators.exp_trend(a, x, sigma), expected)
    if n > 2:
        assert calibrators.trend_sigma(x, torch.exp(sigma * x.double())) == pytest.approx(sigma, abs=1e-5)


def test_one_position_gives_no_trend() -> None:
    with pytest.raises(ValueError, match="two different positions"):
        calibrators.trend_sigma(torch.zeros(4), torch.ones(4))


@fifty
def test_minmax_is_per_image(seed: int) -> None:
    a = draw(seed, 3, 9)
    a[1] = 4.0 + 1e-6 * a[1]  # constant up to rounding
    close(calibrators.minmax(a), [loops.minmax(row) for row in a.double().tolist()])
    assert (calibrators.minmax(a)[1] == 1).all()


@fifty
def test_rope_gain(seed: int) -> None:
    dim, base = (8, 64, 128)[seed % 3], (1e4, 1e6)[seed % 2]
    frequencies = calibrators.inverse_frequencies(dim, base)
    distance = torch.arange(0, 4000, 97) + seed
    got = calibrators.rope_gain(distance, frequencies)
    close(got, [loops.gain(float(d), base, dim) for d in distance], 1e-9)
    weights = draw(seed, distance.numel()).softmax(-1)
    divided = [w / max(loops.gain(float(d), base, dim), 0.1) for w, d in zip(weights.tolist(), distance, strict=True)]
    close(calibrators.rope_ones(weights, distance, frequencies), divided)
    corrected = [math.log(3 * (2 - loops.gain(float(d), base, dim))) for d in distance]
    close(calibrators.position_correction(-distance, frequencies, 3.0), corrected)


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (1920, 1080), (3000, 1000), (500, 500), (333, 517)])
def test_unpadded_cells(size: tuple[int, int]) -> None:
    assert calibrators.unpadded_cells(size, 24).tolist() == loops.unpadded(*size, 24)


def test_grid_trend_is_the_product_of_two() -> None:
    cells = torch.cartesian_prod(torch.arange(3), torch.arange(5))
    w = calibrators.grid_trend_weights(calibrators.grid_position(cells, torch.tensor([3, 5])), 1.2, 0.4)
    expected = [math.exp(-1.2 * r / 2) * math.exp(-0.4 * c / 4) for r in range(3) for c in range(5)]
    close(w, expected)


def test_mean_map_tilt_and_suppression() -> None:
    a, ref = draw(0, 6).abs(), draw(1, 6).abs()
    close(calibrators.mean_map(a, ref), [x / (y + 1e-7) for x, y in zip(a.tolist(), ref.tolist(), strict=True)])
    close(calibrators.tilt(a, 0.5), [math.exp(0.5 * x) for x in a.tolist()])
    assert (calibrators.tilt(a, 0.0) == 1).all()
    with pytest.raises(ValueError, match="theta=1"):
        calibrators.tilt(a, 1.0)
    visible = torch.tensor([1, 0, 1, 1, 0, 1], dtype=torch.bool)
    assert torch.equal(calibrators.suppress(a, visible) > 0, visible)
