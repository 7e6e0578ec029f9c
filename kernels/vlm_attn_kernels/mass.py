"""Per-key attention mass: column sums of softmax weights, rows x keys never in memory.

Two kernels. The first computes the LSE of the rows, unless it is given, over spans of keys in parallel. In the second
a program owns a block of keys, which it loads once, and passes over the rows of every head of its group.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlm_attn.ops import key_mass_reference

from .launch import (
    INTERPRETED_TILE,
    LOG2E,
    LOWEST,
    MAX_HEAD_DIM,
    Footprint,
    common,
    config,
    span_of,
    splits,
    strides,
    tuned,
)

LSE_CONFIGS = [
    *(config(m, n, 4, s) for m in (16, 64) for n, s in ((64, 2), (64, 3), (128, 2))),
    config(16, 32, 4, 2),
]
MASS_CONFIGS = [
    config(16, 32, 4, 2),
    *(config(m, n, 4, 2) for m in (16, 32) for n in (64, 128)),
    *(config(m, 64, w, 3) for m, w in ((32, 4), (64, 8))),
    *(config(m, n, 8, 2) for m, n in ((64, 64), (64, 128), (128, 64))),
]
LSE_FOOTPRINT = Footprint("BLOCK_M", "BLOCK_N", 1)
MASS_FOOTPRINT = Footprint("BLOCK_N", "BLOCK_M", 1)


@triton.jit
def dot(a, b, WIDEN: tl.constexpr):
    """fp32 matrix product of two tiles."""
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def chosen_rows(rows_ptr, index, count, queries, ALL_ROWS: tl.constexpr):
    """Row numbers of a tile of the row list, and which of them exist."""
    inside = index < count
    row = index if ALL_ROWS else tl.load(rows_ptr + index, mask=inside, other=0).to(tl.int32)
    inside = inside & (row >= 0) & (row < queries)
    return tl.where(inside, row, 0), inside


@triton.jit
def row_lse_kernel(
    query_ptr, key_ptr, rows_ptr, mask_ptr, lse_ptr,
    q_b, q_h, q_m, q_d, k_b, k_h, k_n, k_d, mask_b, mask_n, lse_s, lse_b, lse_h,
    kv_heads, group, queries, keys, count, span, scaling, size_class,
    CAUSAL: tl.constexpr, ALL_ROWS: tl.constexpr, MASKED: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    WIDEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """LSE (natural) of a tile of (row, head of the group) pairs over one span of keys."""
    batch, kv_head = tl.program_id(0) // kv_heads, tl.program_id(0) % kv_heads
    part = tl.program_id(2)
    pair = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    index, head = pair // group, kv_head * group + pair % group
    row, inside = chosen_rows(rows_ptr, index, count, queries, ALL_ROWS)
    wide, lane = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    q_at = query_ptr + batch.to(tl.int64) * q_b + head.to(tl.int64) * q_h + row.to(tl.int64) * q_m
    q = tl.load(q_at[:, None] + wide[None, :] * q_d, mask=inside[:, None] & (wide < HEAD_DIM)[None, :], other=0.0)
    position = keys - queries + row
    start, end = part * span, tl.minimum(keys, (part + 1) * span)
    if CAUSAL:
        end = tl.minimum(end, tl.max(tl.where(inside, position, -1), 0) + 1)
    top = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    k_at = key_ptr + batch.to(tl.int64) * k_b + kv_head.to(tl.int64) * k_h
    for first in tl.range(start, end, BLOCK_N, num_stages=STAGES):
        n = first + lane
        k = tl.load(
            k_at + n[None, :].to(tl.int64) * k_n + wide[:, None] * k_d,
            mask=(n < end)[None, :] & (wide < HEAD_DIM)[:, None],
            other=0.0,
        )
        seen = (n < end)[None, :]
        if MASKED:
            seen = seen & (tl.load(mask_ptr + batch * mask_b + n * mask_n, mask=n < end, other=0) != 0)[None, :]
        if CAUSAL:
            seen = seen & (n[None, :] <= position[:, None])
        z = tl.where(seen, dot(q, k, WIDEN) * (scaling * LOG2E), float("-inf"))
        highest = tl.maximum(top, tl.max(z, 1))
        total = total * tl.exp2(top - highest) + tl.sum(tl.exp2(z - highest[:, None]), 1)
        top = highest
    lse = tl.where(total > 0, (top + tl.log2(total)) / LOG2E, float("-inf"))
    tl.store(lse_ptr + part * lse_s + batch * lse_b + head * lse_h + index, lse, mask=pair < count * group)


@triton.jit
def key_mass_kernel(
    query_ptr, key_ptr, rows_ptr, gate_ptr, mask_ptr, lse_ptr, mass_ptr,
    q_b, q_h, q_m, q_d, k_b, k_h, k_n, k_d, gate_b, gate_m, mask_b, mask_n, lse_s, lse_b, lse_h, lse_m, out_b, out_h,
    kv_heads, group, queries, keys, count, scaling, size_class,
    CAUSAL: tl.constexpr, ALL_ROWS: tl.constexpr, GATED: tl.constexpr, MASKED: tl.constexpr, GIVEN: tl.constexpr,
    PARTS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, WIDEN: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Mass of one block of keys, for every query head that reads them."""
    batch, kv_head = tl.program_id(1) // kv_heads, tl.program_id(1) % kv_heads
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    wide, lane = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_M)
    visible = n < keys
    if MASKED:
        visible = visible & (tl.load(mask_ptr + batch * mask_b + n * mask_n, mask=visible, other=0) != 0)
    k_at = key_ptr + batch.to(tl.int64) * k_b + kv_head.to(tl.int64) * k_h
    k = tl.load(
        k_at + n[:, None].to(tl.int64) * k_n + wide[None, :] * k_d,
        mask=visible[:, None] & (wide < HEAD_DIM)[None, :],
        other=0.0,
    )
    start = 0
    if CAUSAL and ALL_ROWS:  # earlier rows do not see this block
        start = tl.maximum(tl.program_id(0) * BLOCK_N - (keys - queries), 0) // BLOCK_M * BLOCK_M
    for member in range(group):
        head = kv_head * group + member
        q_at = query_ptr + batch.to(tl.int64) * q_b + head.to(tl.int64) * q_h
        lse_at = lse_ptr + batch * lse_b + head * lse_h
        weights = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for first in tl.range(start, count, BLOCK_M, num_stages=STAGES):
            index = first + lane
            row, inside = chosen_rows(rows_ptr, index, count, queries, ALL_ROWS)
            q = tl.load(
                q_at + row[None, :].to(tl.int64) * q_m + wide[:, None] * q_d,
                mask=inside[None, :] & (wide < HEAD_DIM)[:, None],
                other=0.0,
            )
            at = lse_at + (row if GIVEN else index) * lse_m
            norm = tl.load(at, mask=inside, other=float("-inf")) * LOG2E
            for part in tl.static_range(1, PARTS):
                other = tl.load(at + part * lse_s, mask=inside, other=float("-inf")) * LOG2E
                high = tl.maximum(tl.maximum(norm, other), LOWEST)
                norm = high + tl.log2(tl.exp2(norm - high) + tl.exp2(other - high))
            if GATED:
                inside = inside & (tl.load(gate_ptr + batch * gate_b + index * gate_m, mask=inside, other=0) != 0)
            norm = tl.where(inside & (norm > LOWEST), norm, float("inf"))  # rows that do not count: weight 0
            z = dot(k, q, WIDEN) * (scaling * LOG2E)
            if CAUSAL:
                z = tl.where(n[:, None] <= (keys - queries + row)[None, :], z, float("-inf"))
            weights += tl.exp2(z - norm[None, :])
        mass = tl.where(visible, tl.sum(weights, 1), 0.0)
        tl.store(mass_ptr + batch * out_b + head * out_h + n, mass, mask=n < keys)


@functools.cache
def _tuned_lse() -> Any:
    return tuned(row_lse_kernel, LSE_CONFIGS, ["size_class", "group", "HEAD_DIM"], LSE_FOOTPRINT)


@functools.cache
def _tuned_mass() -> Any:
    return tuned(key_mass_kernel, MASS_CONFIGS, ["size_class", "group", "HEAD_DIM", "ALL_ROWS"], MASS_FOOTPRINT)


def _row_lse(
    query: Tensor, key: Tensor, rows: Tensor | None, count: int, scaling: float, key_mask: Tensor | None, causal: bool
) -> Tensor:
    """fp32 ``[parts, B, H, R]``: LSE of the chosen rows over every span of keys."""
    (b, h, q, _), (kv, n) = query.shape, key.shape[1:3]
    group = h // kv
    parts = splits(b * kv * triton.cdiv(count * group, 64), n, query.device)
    lse = query.new_empty((parts, b, h, count), dtype=torch.float32)

    def grid(meta: dict[str, int]) -> tuple[int, int, int]:
        return b * kv, triton.cdiv(count * group, meta["BLOCK_M"]), parts

    tiles = {} if query.is_cuda else INTERPRETED_TILE
    (_tuned_lse() if query.is_cuda else row_lse_kernel)[grid](
        query, key, rows, key_mask, lse,
        *query.stride(), *key.stride(), *strides(key_mask, 2), *lse.stride()[:3],
        kv, group, q, n, count, span_of(n, parts), scaling, triton.next_power_of_2(n),
        CAUSAL=causal, ALL_ROWS=rows is None, MASKED=key_mask is not None, **common(query), **tiles,
    )  # fmt: skip
    return lse


def key_mass(
    query: Tensor,
    key: Tensor,
    rows: Tensor | None,
    scaling: float,
    lse: Tensor | None,
    key_mask: Tensor | None,
    gate: Tensor | None,
    causal: bool,
    reduce_heads: bool,
) -> Tensor:
    """Kernel behind :func:`vlm_attn.ops.key_mass`; head dimensions above 256 take the reference."""
    if query.shape[-1] > MAX_HEAD_DIM:
        return key_mass_reference(query, key, rows, scaling, lse, key_mask, gate, causal, reduce_heads)
    (b, h, q, _), (kv, n) = query.shape, key.shape[1:3]
    rows = None if rows is None else rows.contiguous()
    count = q if rows is None else rows.numel()
    norms = lse[None] if lse is not None else _row_lse(query, key, rows, count, scaling, key_mask, causal)
    mass = query.new_empty((b, h, n), dtype=torch.float32)

    def grid(meta: dict[str, int]) -> tuple[int, int]:
        return triton.cdiv(n, meta["BLOCK_N"]), b * kv

    tiles = {} if query.is_cuda else INTERPRETED_TILE
    (_tuned_mass() if query.is_cuda else key_mass_kernel)[grid](
        query, key, rows, gate, key_mask, norms, mass,
        *query.stride(), *key.stride(), *strides(gate, 2), *strides(key_mask, 2), *norms.stride(), *mass.stride()[:2],
        kv, h // kv, q, n, count, scaling, triton.next_power_of_2(n),
        CAUSAL=causal, ALL_ROWS=rows is None, GATED=gate is not None, MASKED=key_mask is not None,
        GIVEN=lse is not None, PARTS=norms.shape[0], **common(query), **tiles,
    )  # fmt: skip
    return mass.sum(1) if reduce_heads else mass
