"""What every selector and merger must do on any input."""

from __future__ import annotations

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.reference.kit import draw
from vlm_attn.kit import budgets, calibrators, mergers, scores, selectors

EXAMPLES = settings(max_examples=60, deadline=None)
sizes = st.integers(2, 24)
seeds = st.integers(0, 2**20)

SELECTORS = {
    "topk": lambda x, s, k: selectors.topk(s, k),
    "maxmin": lambda x, s, k: selectors.maxmin(x, k),
    "score_maxmin": lambda x, s, k: selectors.maxmin(x, k, s),
    "dpp": lambda x, s, k: selectors.dpp(x, s, k),
    "even_odd": lambda x, s, k: selectors.even_odd_dedup(x, s, k),
    "topk_visible": lambda x, s, k: selectors.topk_visible(s, torch.ones_like(s, dtype=torch.bool), k)[0],
    "basis": lambda x, s, k: mergers.overwrite_lowest(s, selectors.topk(-s, min(3, k)), k),
}
ORDERED = {
    "runs": lambda x, s, k: selectors.runs(s, s, k, 3),
    "farthest": lambda x, s, k: selectors.farthest_points(x, k),
    "uniform": lambda x, s, k: selectors.uniform(len(s), k),
    "random": lambda x, s, k: selectors.random(len(s), k, 1),
    "group": lambda x, s, k: selectors.per_group(
        torch.zeros(len(s), dtype=torch.long), [k], lambda slots, c: selectors.topk(s[slots], c)
    ),
}


def inputs(n: int, seed: int) -> tuple[Tensor, Tensor]:
    return draw(seed, n, 32), draw(seed + 1, n).exp()


@given(n=sizes, seed=seeds, share=st.floats(0.05, 1.0))
@EXAMPLES
def test_budgets_are_exact_indices_ascending_and_unique(n: int, seed: int, share: float) -> None:
    x, s = inputs(n, seed)
    k = budgets.budget(share, n)
    for name, choose in {**SELECTORS, **ORDERED}.items():
        kept = choose(x, s, k).tolist()
        assert len(kept) == k, name
        assert kept == sorted(set(kept)), name
        assert kept[0] >= 0, name
        assert kept[-1] < n, name


@given(n=sizes, seed=seeds, share=st.floats(0.05, 1.0))
@EXAMPLES
def test_permuted_tokens_permute_the_choice(n: int, seed: int, share: float) -> None:
    x, s = inputs(n, seed)
    z = torch.nn.functional.normalize(x, dim=-1)
    isolation = (1 - (z @ z.T).fill_diagonal_(-1).amax(-1)).sort(descending=True).values
    assume(float(isolation[0] - isolation[1]) > 1e-5)  # two mutual nearest neighbours tie: the earlier one starts
    k = budgets.budget(share, n)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    for name, choose in SELECTORS.items():
        assert sorted(order[choose(x[order], s[order], k)].tolist()) == choose(x, s, k).tolist(), name


@given(n=sizes, seed=seeds, share=st.floats(0.05, 1.0))
@EXAMPLES
def test_scores_follow_a_permutation(n: int, seed: int, share: float) -> None:
    x, s = inputs(n, seed)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    pivots = torch.arange(min(3, n))
    inverse = order.argsort()
    pairs = {
        "norm": (scores.norm(x[order]), scores.norm(x)[order]),
        "svd": (scores.svd_energy(x[order]), scores.svd_energy(x)[order]),
        "error": (scores.approx_error(x[order], inverse[pivots]), scores.approx_error(x, pivots)[order]),
        "borda": (scores.borda(s[order], x[order, 0]), scores.borda(s, x[:, 0])[order]),
        "minmax": (calibrators.minmax(s[order]), calibrators.minmax(s)[order]),
    }
    for name, (got, expected) in pairs.items():
        assert torch.allclose(got, expected, atol=1e-4, rtol=1e-4), name


@given(n=sizes, seed=seeds, count=st.integers(1, 24))
@EXAMPLES
def test_a_batch_is_its_images(n: int, seed: int, count: int) -> None:
    x, s = draw(seed, 3, n, 32), draw(seed + 1, 3, n).exp()
    k = min(count, n)
    kept = selectors.topk(s, k)
    batched = {
        "maxmin": (selectors.maxmin(x, k, s), lambda i: selectors.maxmin(x[i], k, s[i])),
        "diverse": (selectors.maxmin(x, k), lambda i: selectors.maxmin(x[i], k)),
        "dpp": (selectors.dpp(x, s, k), lambda i: selectors.dpp(x[i], s[i], k)),
        "nearest": (mergers.nearest(x, kept), lambda i: mergers.nearest(x[i], kept[i])),
        "cluster": (mergers.dpc_knn(x, k), lambda i: mergers.dpc_knn(x[i], k)),
        "ramp": (mergers.ramp(s, k)[0], lambda i: mergers.ramp(s[i], k)[0]),
    }
    for name, (together, alone) in batched.items():
        assert torch.equal(together, torch.stack([alone(i) for i in range(3)])), name


@given(n=sizes, seed=seeds)
@EXAMPLES
def test_protected_tokens_stay(n: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    groups = torch.randint(-1, 2, (n,), generator=generator)
    s = draw(seed, n)
    counts = [1, 2]
    kept = selectors.per_group(groups, counts, lambda slots, k: selectors.topk(s[slots], k))
    assert set((groups < 0).nonzero()[:, 0].tolist()) <= set(kept.tolist())
    for group, count in enumerate(counts):
        mine = int((groups == group).sum())
        assert int((groups[kept] == group).sum()) == min(count, mine)
    assert kept.tolist() == sorted(set(kept.tolist()))


@given(n=sizes, seed=seeds, r=st.integers(0, 24))
@EXAMPLES
def test_merging_neither_loses_nor_invents(n: int, seed: int, r: int) -> None:
    """Survivors stand for all tokens; the mean weighted by what they stand for is the mean of all."""
    x, s = inputs(n, seed)
    kept = selectors.topk(s, max(1, n - r))
    parents = [
        mergers.bipartite(x, *mergers.alternate(n), r),
        mergers.nearest(x, kept),
        mergers.stride_merge(x, max(1, n - r)),
        mergers.dpc_knn(x, max(1, n - r)),
    ]
    for parent in parents:
        alive = mergers.survivors(parent)
        assert alive[parent].all()  # nobody's parent has left
        size = mergers.merged_sizes(parent)
        assert int(size.sum()) == n
        total = (size[alive, None] * mergers.merge(x, parent)[alive]).sum(0)
        assert torch.allclose(total, x.sum(0), atol=1e-4)


@given(n=sizes, seed=seeds, k=st.integers(1, 24))
@EXAMPLES
def test_score_mass(n: int, seed: int, k: int) -> None:
    s = draw(seed, n).exp()
    for share in (0.3, 0.99, 1.0):
        count = int(budgets.mass_count(s, share))
        held = s.double().sort(descending=True).values
        assert float(held[:count].sum()) >= (share - 1e-9) * float(held.sum())
        assert count == 1 or float(held[: count - 1].sum()) < share * float(held.sum())


@given(n=sizes, seed=seeds)
@EXAMPLES
def test_half_precision_scores_rank_as_their_values(n: int, seed: int) -> None:
    s = draw(seed, n).half()
    assert selectors.topk(s, n // 2).tolist() == selectors.topk(s.double(), n // 2).tolist()
