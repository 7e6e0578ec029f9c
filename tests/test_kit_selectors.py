"""Selectors against loops, on 50 random inputs each: the kept sets are equal."""

from __future__ import annotations

import pytest
import torch

from tests.reference import kit as loops
from tests.reference import kit_select as literal
from tests.reference.kit import draw, fifty
from vlm_attn.kit import budgets, selectors


@fifty
def test_topk(seed: int) -> None:
    a = draw(seed, 3, 14).round(decimals=seed % 2)  # half of them with ties
    k = 1 + seed % 16
    assert selectors.topk(a, k).tolist() == [loops.top(row, k) for row in a.tolist()]


def test_the_earlier_token_wins_a_tie_among_many() -> None:
    a = torch.arange(2000).remainder(4).float()
    assert selectors.topk(a, 501).tolist() == loops.top(a.tolist(), 501)


@fifty
def test_topk_of_visible_tokens_is_capped_per_image(seed: int) -> None:
    a, visible, k = draw(seed, 4, 12), draw(seed + 1, 4, 12) > 0.5, 1 + seed % 8
    idx, valid = selectors.topk_visible(a, visible, k)
    assert budgets.cap(k, visible).tolist() == [min(k, int(v.sum())) for v in visible]
    for row in range(4):
        shown = visible[row].nonzero()[:, 0].tolist()
        expected = [shown[i] for i in loops.top(a[row, shown].tolist(), k)]
        assert idx[row, valid[row]].tolist() == expected
        assert len(set(idx[row].tolist())) == idx.shape[1]


@pytest.fixture(params=[selectors.WHOLE, 0], ids=["whole", "rows"])
def held(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cosines made all at once, and row by row."""
    monkeypatch.setattr(selectors, "WHOLE", request.param)


@pytest.mark.usefixtures("held")
@fifty
def test_maxmin(seed: int) -> None:
    x, s, k = draw(seed, 2, 13, 5), draw(seed + 1, 2, 13).abs(), 1 + seed % 14
    for image in range(2):
        assert selectors.maxmin(x, k)[image].tolist() == literal.maxmin(x[image], k)
        got = selectors.maxmin(x, k, s)[image].tolist()
        assert got == literal.maxmin(x[image], k, s[image].tolist())
        assert selectors.maxmin(x, k, start=3)[image].tolist() == literal.maxmin(x[image], k, start=3)
        assert selectors.farthest_points(x, k, 2)[image].tolist() == literal.farthest(x[image], k, 2)


@pytest.mark.usefixtures("held")
@fifty
def test_dpp(seed: int) -> None:
    x, r, k = draw(seed, 2, 11, 16), draw(seed + 1, 2, 11).abs() + 0.1, 1 + seed % 8
    got = selectors.dpp(x, r, k)
    for image in range(2):
        assert got[image].tolist() == literal.dpp(x[image], r[image].tolist(), k)


@fifty
def test_even_odd_dedup(seed: int) -> None:
    x, s = draw(seed, 37, 6), draw(seed + 1, 37)
    for target in (0, 1, 5 + seed % 20, 37, 50):
        assert selectors.even_odd_dedup(x, s, target).tolist() == literal.even_odd(x, s.tolist(), target)


@fifty
def test_iqr_outliers(seed: int) -> None:
    a = draw(seed, 3, 25).exp() if seed % 5 else draw(seed, 3, 25).round()
    got = selectors.iqr_outliers(a)
    for row in range(3):
        assert got[row].nonzero()[:, 0].tolist() == literal.outliers(a[row].double().tolist())


@fifty
def test_runs(seed: int) -> None:
    n, count = 30 + seed % 7, 1 + seed % 6
    a, t = draw(seed, n).softmax(-1), (2 * draw(seed + 1, n)).exp()
    k = 1 + 7 * seed % n
    assert selectors.run_bounds(n, count) == literal.bounds(n, count)
    assert selectors.runs(a, t, k, count).tolist() == literal.runs(a.tolist(), t.double().tolist(), k, count)


def test_a_full_run_hands_its_surplus_on() -> None:
    weights = torch.tensor([100.0, 1.0, 2.0])
    assert selectors.run_counts(weights, [3, 4, 4], 7) == [3, 2, 2]
    assert selectors.run_counts(weights, [3, 4, 4], 11) == [3, 4, 4]
    assert selectors.run_counts(torch.zeros(3), [3, 4, 4], 6) == [2, 2, 2]


@pytest.mark.parametrize(("n", "k"), [(1, 1), (16, 5), (576, 64), (577, 192), (9, 9)])
def test_uniform_and_stride(n: int, k: int) -> None:
    assert selectors.uniform(n, k).tolist() == [int((j + 0.5) * n / k) for j in range(k)]
    assert selectors.stride(n, 3).tolist() == list(range(0, n, 3))
    assert selectors.stride(n, 0).tolist() == list(range(n))


def test_grid_stride_takes_both_directions() -> None:
    cells = torch.cartesian_prod(torch.arange(4), torch.arange(7))
    got = [tuple(c) for c in cells[selectors.grid_stride(cells, 3)].tolist()]
    assert got == [(r, c) for r in (0, 3) for c in (0, 3, 6)]
    left = cells[[0, 5, 9, 24, 27]]  # what an earlier stage left: cells, not ranks, decide
    assert selectors.grid_stride(left, 3).tolist() == [0, 3, 4]


def test_random_follows_its_seed() -> None:
    torch.manual_seed(1)
    first = selectors.random(40, 9, seed=4)
    torch.manual_seed(2)
    assert torch.equal(first, selectors.random(40, 9, seed=4))
    assert not torch.equal(first, selectors.random(40, 9, seed=5))


@fifty
def test_sets(seed: int) -> None:
    a, b = selectors.random(20, 6, seed), selectors.random(20, 7, seed + 1)
    assert selectors.union(a, b).tolist() == sorted({*a.tolist(), *b.tolist()})
    assert selectors.complement(a, 20).tolist() == [i for i in range(20) if i not in a.tolist()]
    both = torch.stack([a, selectors.random(20, 6, seed + 2)])
    assert selectors.complement(both, 20)[1].tolist() == selectors.complement(both[1], 20).tolist()
    assert selectors.masked(both, 20).sum(-1).tolist() == [6, 6]


@fifty
def test_groups_have_budgets_of_their_own(seed: int) -> None:
    """Three crops with newline tokens between: newlines stay, each crop keeps its own best."""
    groups = torch.randint(-1, 3, (40,), generator=torch.Generator().manual_seed(seed))
    a, counts = draw(seed, 40), [4, 1, 30]
    got = selectors.per_group(groups, counts, lambda slots, k: selectors.topk(a[slots], k)).tolist()
    expected = [i for i in range(40) if groups[i] < 0]
    for group, count in enumerate(counts):
        mine = [i for i in range(40) if groups[i] == group]
        expected += [mine[j] for j in loops.top([float(a[i]) for i in mine], count)]
    assert got == sorted(expected)
