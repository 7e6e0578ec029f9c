"""Mergers and budgets against loops, on 50 random inputs each."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from tests.reference import kit as loops
from tests.reference import kit_select as literal
from tests.reference.kit import draw, fifty
from vlm_attn.kit import budgets, mergers, selectors


def same_rows(got: Tensor, expected: dict[int, list[float]]) -> None:
    for i, row in expected.items():
        assert torch.allclose(got[i].double(), torch.tensor(row, dtype=torch.float64), atol=1e-5, rtol=1e-5)


@fifty
def test_bipartite_and_the_size_weighted_mean(seed: int) -> None:
    n, protected = 12 + seed % 5, seed % 2
    x, keys = draw(seed, n, 5), draw(seed + 1, n, 4)
    sizes = draw(seed + 2, n).abs() + 0.5
    source, target = mergers.alternate(n, protected)
    assert source.tolist() == [i for i in range(0, n, 2) if i >= protected]
    assert target.tolist() == list(range(1, n, 2))
    r = 1 + seed % 9
    parent = mergers.bipartite(keys, source, target, r)
    assert parent.tolist() == literal.join(keys, source.tolist(), target.tolist(), r)
    same_rows(mergers.merge(x, parent, sizes), literal.averaged(x, parent.tolist(), sizes.double().tolist()))
    left = mergers.merged_sizes(parent, sizes)
    assert float(left.sum()) == pytest.approx(float(sizes.sum()), rel=1e-5)
    assert torch.equal(left > 0, mergers.survivors(parent))
    both = mergers.bipartite(torch.stack([draw(9, n, 4), keys]), source, target, r)
    assert torch.equal(both[1], parent)


@fifty
def test_halves_by_score(seed: int) -> None:
    """TokenCarve: unordered index sets, the upper half takes in the most similar of the lower."""
    x, order = draw(seed, 20, 6), loops.ranked(draw(seed + 1, 20).tolist())
    a, b = order[:6], order[6:12]
    parent = mergers.bipartite(x, torch.tensor(b), torch.tensor(a), 4)
    assert parent.tolist() == literal.join(x, b, a, 4)
    same_rows(mergers.merge(x, parent), literal.averaged(x, parent.tolist()))


@fifty
def test_nearest_and_stride_merge(seed: int) -> None:
    x, keys = draw(seed, 2, 17, 5), draw(seed + 1, 2, 17, 4)
    kept = torch.stack([selectors.random(17, 5, seed), selectors.random(17, 5, seed + 1)])
    parent = mergers.nearest(x, kept)
    count = 1 + seed % 20
    contextual = mergers.stride_merge(keys, count)
    targets = list(range(0, 17, max(1, 17 // count)))[:count]
    for image in range(2):
        assert parent[image].tolist() == literal.nearest(x[image], kept[image].tolist())
        assert contextual[image].tolist() == literal.nearest(keys[image], targets)
        got = mergers.merge(x[image], contextual[image], how="add_mean")
        same_rows(got, literal.survivor_plus_mean(x[image], contextual[image].tolist()))
        same_rows(mergers.merge(x, contextual)[image], literal.averaged(x[image], contextual[image].tolist()))


@fifty
def test_density_peaks(seed: int) -> None:
    x, count = draw(seed, 2, 15, 4), 1 + seed % 6
    noise = torch.rand(15, generator=torch.Generator().manual_seed(seed)).tolist()
    parent = mergers.dpc_knn(x, count, seed=seed)
    for image in range(2):
        assert parent[image].tolist() == literal.density_peaks(x[image], count, noise)
    assert (mergers.survivors(parent).sum(-1) == count).all()


@fifty
def test_ramp(seed: int) -> None:
    a, x, r = draw(seed, 13), draw(seed + 1, 13, 3), seed % 12
    parent, weights = mergers.ramp(a, r)
    expected = literal.ramp(a.tolist(), r)
    assert (parent.tolist(), weights.tolist()) == expected
    same_rows(mergers.merge(x, parent, weights), literal.averaged(x, *expected))
    assert int(mergers.survivors(parent).sum()) == 13 - r


@fifty
def test_prumerge(seed: int) -> None:
    x, keys, a = draw(seed, 20, 4), draw(seed + 1, 20, 3), draw(seed + 2, 20).softmax(-1)
    kept, near = selectors.random(20, 6, seed), (4, 32)[seed % 2]
    got = mergers.knn_add(x, keys, a, kept, near)
    expected = literal.knn_add(x, keys, a.double().tolist(), kept.tolist(), near)
    same_rows(got, dict(enumerate(expected)))
    pruned = ~selectors.masked(kept, 20)
    extra = [sum(float(a[j]) * float(x[j, c]) for j in range(20) if pruned[j]) for c in range(4)]
    same_rows(mergers.residual_token(x, a, pruned)[None], {0: extra})


@fifty
def test_basis_takes_the_lowest_places(seed: int) -> None:
    a, basis, k = draw(seed, 18), selectors.random(18, 5, seed), 3 + seed % 14
    got = mergers.overwrite_lowest(a, basis, k).tolist()
    firm = basis.tolist()[:k]
    rest = [i for i in loops.ranked(a.tolist()) if i not in firm][: k - len(firm)]
    assert got == sorted([*firm, *rest])


def test_merging_keeps_dtype_and_untouched_rows() -> None:
    x = draw(0, 6, 3).bfloat16()
    parent = torch.tensor([0, 0, 2, 3, 3, 5])
    out = mergers.merge(x, parent)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out[[2, 5]], x[[2, 5]])
    assert torch.equal(mergers.merge(x, torch.arange(6)), x)
    assert torch.equal(mergers.merge(x, torch.arange(6), how="add_mean"), x)


# ---------------------------------------------------------------------------------------------------------- budgets


@fifty
def test_proportional_shares(seed: int) -> None:
    sizes = (torch.randint(1, 40, (1 + seed % 6,), generator=torch.Generator().manual_seed(seed))).tolist()
    k = len(sizes) + (13 * seed) % sum(sizes)
    out = budgets.proportional(k, sizes)
    assert sum(out) == min(k, sum(sizes))
    for c, size in zip(out, sizes, strict=True):
        assert 1 <= c <= size
        exact = min(k, sum(sizes)) * size / sum(sizes)
        assert c >= min(math.floor(exact), size) - len(sizes)  # taking from nobody more than the minimum costs
    if all(k * size >= sum(sizes) for size in sizes):  # no minimum binds: largest remainders
        share = [min(k, sum(sizes)) * size / sum(sizes) for size in sizes]
        assert all(abs(c - s) < 1 + 1e-9 for c, s in zip(out, share, strict=True))
        floors = [math.floor(x + 1e-9) for x in share]
        extra = sorted(range(len(sizes)), key=lambda i: (floors[i] - share[i], i))[: sum(out) - sum(floors)]
        assert out == [f + (i in extra) for i, f in enumerate(floors)]


def test_more_images_than_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="2 tokens cannot be split over 3 images"):
        budgets.proportional(2, [5, 5, 5])


@pytest.mark.parametrize(("keep", "total"), list(itertools.product([0.098, 0.1112, 0.5, 1.0], [1, 16, 576, 2880])))
def test_shares_that_floor(keep: float, total: int) -> None:
    assert budgets.floor_share(total, keep) == max(1, int(keep * total))


@fifty
def test_recycling_counts(seed: int) -> None:
    n = 7 * seed
    taken, clusters = budgets.recycled(n)
    assert (taken, clusters) == (
        (0, 0) if n == 0 else (min(int(0.3 * n) + 1, n), int(min(int(0.3 * n) + 1, n) / 10) + 1)
    )


@fifty
def test_rank_budget(seed: int) -> None:
    rank = 1 + seed % 5
    block = draw(seed, 7, rank) @ draw(seed + 1, rank, 60)
    assert budgets.rank_budget(block, 60) == min(int(13.5 * rank), 60)
    assert budgets.rank_budget(block, 60, scale=None, rate=0.5) == 60 - int(0.5 * (60 - rank))


@fifty
def test_entropy_drop(seed: int) -> None:
    n, target = 40, 10 + seed % 20
    a = (2 * draw(seed, 2, n)).softmax(-1)
    entropy = max(-sum(p * math.log(p) for p in (row / row.sum()).tolist()) for row in a.double())
    for remaining in (0, 1, 4, 8):
        expected = 0
        if remaining == 0:
            expected = n - target
        elif remaining % 2 == 0:
            expected = round((n - target) / math.sqrt(remaining) * (1 - (entropy / math.log(n)) ** 2))
        assert budgets.entropy_drop(a, n, target, remaining) == expected
    assert budgets.entropy_drop(a, target, target, 0) == 0


@fifty
def test_mass_count(seed: int) -> None:
    a, share = draw(seed, 3, 15).exp(), (0.5, 0.9, 0.99, 1.0)[seed % 4]
    got = budgets.mass_count(a, share).tolist()
    for row in range(3):
        ordered, total, k = sorted(a[row].double().tolist(), reverse=True), float(a[row].double().sum()), 0
        held = 0.0
        while held < share * total - 1e-12 * total:
            held += ordered[k]
            k += 1
        assert got[row] == k


@pytest.mark.parametrize(("layers", "depth"), [((2, 6, 15), 32), ((2, 6, 15), 4), ((8, 16, 24), 4), ((8, 16, 24), 28)])
def test_layers_carried_over(layers: tuple[int, ...], depth: int) -> None:
    out = budgets.scaled_layers(layers, depth)
    assert out[0] >= 1
    assert all(b > a for a, b in itertools.pairwise(out))
    if depth == 32:
        assert out == layers


@pytest.mark.parametrize(("kept", "total", "step"), [(40, 576, 4), (1, 576, 192), (576, 576, 1), (300, 576, 1)])
def test_plus_stride(kept: int, total: int, step: int) -> None:
    assert budgets.plus_stride(kept, total) == step


def test_equal_crops() -> None:
    assert [budgets.equal_crops(r, 2880, 5) for r in (0.0556, 0.1112, 0.2223)] == [32, 64, 128]
