"""FLOPs of a prefill, in multiply-adds, from the number of tokens that every decoder layer processes."""

from __future__ import annotations

from collections.abc import Sequence


def layer_flops(tokens: int, hidden: int, inner: int, kv_share: float = 1.0, causal: bool = False) -> float:
    """Multiply-adds of one decoder layer: projections, attention, gated MLP.

    `F(n) = (2 + 2 s) n d^2 + 2 n^2 d + 3 n d m` with `s` the key/value heads' share of the query heads; half of the
    quadratic term when only the causal half is computed.
    """
    pairs = tokens * (tokens + 1) / 2 if causal else float(tokens) ** 2
    projections = (2 + 2 * kv_share) * tokens * hidden**2
    return projections + 2 * pairs * hidden + 3 * tokens * hidden * inner


def prefill_flops(
    per_layer: Sequence[int], hidden: int, inner: int, kv_share: float = 1.0, causal: bool = False
) -> float:
    """Multiply-adds of a prefill whose layer `l` processes `per_layer[l]` tokens."""
    return sum(layer_flops(n, hidden, inner, kv_share, causal) for n in per_layer)
