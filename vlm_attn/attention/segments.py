"""The algebra of key segments: log-sum-exp restricted outputs, merged exactly.

For a partition of the keys into segments ``g``: ``L_g = logsumexp_{j in g} z_j``, ``O_g`` the attention output
restricted to and normalised over ``g``, mass ``M_g = exp(L_g - L)`` and ``O = sum_g M_g O_g``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .rows import row_logits, row_outputs


def attend(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, mask: Tensor | None = None, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """Attention output and its natural-log LSE.

    Runs the fused kernel of torch where one returns the LSE for these inputs, else fp32 rows.

    Args:
        query: ``[B, H, Q, d]``; key, value: ``[B, Hkv, N, d]``.
        mask: additive ``[B or 1, H or 1, Q, N]`` or None.
        causal: lower-triangular visibility (only with ``Q == N`` and no mask).

    Returns:
        output ``[B, H, Q, d]`` and LSE fp32 ``[B, H, Q]``; rows that see no key give 0 and -inf.
    """
    b, h, q, _ = query.shape
    n = key.shape[2]
    if n == 0:
        return query.new_zeros(query.shape), query.new_full((b, h, q), float("-inf"), dtype=torch.float32)
    if mask is None and gives_lse(query):
        return fused(query, key, value, scaling, causal)
    logits = row_logits(query, key, scaling)
    if causal:
        order = torch.arange(n, device=key.device)
        logits = logits.masked_fill(order[None] > order[:, None], float("-inf"))
    if mask is not None:
        logits = logits + mask
        # An additive mask marks hidden keys with the lowest finite number; they carry no mass here.
        logits = logits.masked_fill(mask <= torch.finfo(torch.float32).min / 2, float("-inf"))
    lse = logits.logsumexp(-1)
    weights = (logits - torch.where(lse.isinf(), 0.0, lse)[..., None]).exp()
    return row_outputs(weights, value).to(query.dtype), lse


def gives_lse(query: Tensor) -> bool:
    """Whether a fused kernel of torch returns the LSE for queries of this kind."""
    if query.device.type == "cpu":
        return True
    return query.is_cuda and query.shape[-1] % (4 if query.dtype == torch.float32 else 8) == 0


def fused(query: Tensor, key: Tensor, value: Tensor, scaling: float, causal: bool) -> tuple[Tensor, Tensor]:
    """:func:`attend` by the very kernel that ``scaled_dot_product_attention`` takes, its LSE kept."""
    if query.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, attn_mask=None, scale=scaling
        )
        return out, lse.float()
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (key, value))
    if query.dtype == torch.float32:
        result = torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, None, True, 0.0, causal, scale=scaling
        )
    else:
        result = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, scale=scaling)
    return result[0], result[1][..., : query.shape[2]].float()


def merge(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Joins disjoint segments ``(O_g [B, H, Q, d], L_g [B, H, Q])`` into the output and LSE over their union."""
    lse = torch.stack([part[1] for part in parts]).logsumexp(0)
    base = torch.where(lse.isinf(), 0.0, lse)
    out = sum((part[1] - base).exp()[..., None] * part[0].float() for part in parts)
    return out, lse  # type: ignore[return-value]
