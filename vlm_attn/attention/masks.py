"""Masks in every form a backend uses (None, boolean, additive, FlexAttention blocks), read and rebuilt uniformly."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FLASH = ("flash_attention_2", "flash_attention_3")  # a 2-D mask of valid keys, or none; need a CUDA device
BACKENDS = ("sdpa", "eager", "flex_attention", *FLASH)


def _neg(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).min


def dense(mask: Any, batch: int, queries: int, keys: int, device: torch.device, causal: bool = True) -> Tensor:
    """bool ``[B or 1, H or 1, Q, KV]``, True = attend, of any backend's mask.

    Only small cases should come here (row subsets go through :func:`row_bias`).
    """
    rows = torch.arange(queries, device=device)
    return visible(mask, rows, batch, queries, keys, device, causal)


def visible(
    mask: Any, rows: Tensor, batch: int, queries: int, keys: int, device: torch.device, causal: bool = True
) -> Tensor:
    """bool ``[B or 1, H or 1, R, KV]``: which keys the query rows ``rows [R]`` may attend to."""
    if mask is None:
        if queries == 1 or not causal:
            return torch.ones(1, 1, rows.numel(), keys, dtype=torch.bool, device=device)
        if queries != keys:
            raise ValueError(
                f"no mask was given for {queries} queries over {keys} keys: static caches and chunked prefill are not "
                "supported, use the default dynamic cache"
            )
        return (torch.arange(keys, device=device)[None] <= rows[:, None])[None, None]
    if isinstance(mask, Tensor) and mask.dim() == 2:
        columns = mask[:, None, None, :keys].bool()
        if not causal:
            return columns.expand(-1, -1, rows.numel(), -1)
        order = torch.arange(keys, device=device)[None] <= rows[:, None] + keys - queries
        return columns & order[None, None]
    if isinstance(mask, Tensor):
        part = mask[..., :keys].index_select(2, rows.to(mask.device))
        return part if part.dtype == torch.bool else part > _neg(part.dtype) / 2
    mod = getattr(mask, "mask_mod", None)
    if mod is None:
        raise ValueError(f"attention masks of type {type(mask).__name__} are not supported")
    b = torch.arange(batch, device=device)[:, None, None, None]
    h = torch.zeros(1, 1, 1, 1, dtype=torch.long, device=device)
    q = rows[None, None, :, None]
    kv = torch.arange(keys, device=device)[None, None, None]
    return mod(b, h, q, kv).expand(batch, 1, rows.numel(), keys)


def row_bias(
    mask: Any, rows: Tensor | None, batch: int, queries: int, keys: int, device: torch.device, causal: bool = True
) -> Tensor | None:
    """fp32 additive mask ``[B or 1, H or 1, R, KV]`` of the query rows (None = all); None when they see every key."""
    if isinstance(mask, Tensor) and mask.dtype != torch.bool:
        part = mask[..., :keys]
        return (part if rows is None else part.index_select(2, rows.to(mask.device))).float()
    if mask is None and queries == 1:
        return None
    rows = torch.arange(queries, device=device) if rows is None else rows
    seen = visible(mask, rows, batch, queries, keys, device, causal)
    return torch.zeros(seen.shape, device=device).masked_fill_(~seen, _neg(torch.float32))


def to_backend(seen: Tensor, backend: str, dtype: torch.dtype) -> Tensor:
    """A boolean mask in the form the backend takes: boolean for sdpa, additive for eager and FlexAttention."""
    if backend == "sdpa":
        return seen
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, _neg(dtype))


def gather(mask: Any, idx: Tensor, valid: Tensor, backend: str, dtype: torch.dtype, causal: bool) -> Tensor | None:
    """The prefill mask after keeping slots ``idx [B, n]`` on both axes; invalid slots see only themselves.

    An absent mask stays absent when it can: kept slots are in ascending order, so causality survives.
    """
    b, n = idx.shape
    device = idx.device
    if backend in FLASH:
        kept = valid if mask is None else mask.bool().gather(1, idx) & valid
        return None if bool(kept.all()) else kept
    if mask is None and backend != "flex_attention":
        if bool(valid.all()):
            return None
        order = torch.arange(n, device=device)
        seen = (order[None] <= order[:, None])[None, None] if causal else torch.ones(1, 1, n, n, device=device).bool()
    else:
        length = mask.shape[-1] if isinstance(mask, Tensor) else int(mask.seq_lengths[1])
        full = dense(mask, b, length, length, device, causal).expand(b, -1, -1, -1)
        heads = full.shape[1]
        seen = full.gather(2, idx[:, None, :, None].expand(b, heads, n, length))
        seen = seen.gather(3, idx[:, None, None, :].expand(b, heads, n, n))
    itself = torch.eye(n, dtype=torch.bool, device=device)
    return to_backend(seen & valid[:, None, None, :] | itself, backend, dtype)


def decode(valid: Tensor, queries: int, past: int, backend: str, dtype: torch.dtype) -> Tensor | None:
    """Mask of ``queries`` new rows over ``past`` cached slots (``valid [B, n]`` covers the first n of them) and
    themselves, causal among the new ones. None where everything is visible.
    """
    b, n = valid.shape
    if (queries == 1 or backend in FLASH) and bool(valid.all()):
        return None
    device = valid.device
    if backend in FLASH:
        return torch.cat([valid, valid.new_ones(b, past + queries - n)], dim=1)
    order = torch.arange(past + queries, device=device)
    causal = order[None] <= torch.arange(queries, device=device)[:, None] + past
    columns = torch.cat([valid, valid.new_ones(b, past + queries - n)], dim=1)
    return to_backend(causal[None, None] & columns[:, None, None, :], backend, dtype)
