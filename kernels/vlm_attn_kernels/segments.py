"""Attention over labelled keys in one pass over the keys: output, LSE per label, gated mix in the epilogue.

Labels fall into three classes: donors and receivers of the mix, and the rest. Every class has an accumulator of its
own, which remembers the maximum it was last scaled to, so that a tile whose keys all fall into one class costs one
matrix product and one rescaling, as in plain attention. Rows are (position, head of the group) pairs: a tile of keys
is loaded once for all heads that read it. Few rows (decoding, text after the picture): the keys are cut into spans
that run in parallel and a small kernel merges them.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlm_attn.ops import LABELS, segment_attention_reference

from .launch import (
    INTERPRETED,
    INTERPRETED_TILE,
    LOG2E,
    LOWEST,
    MAX_HEAD_DIM,
    OPTIONS,
    Footprint,
    common,
    config,
    span_of,
    splits,
    strides,
    tuned,
)
from .mass import dot

# Keys per word of the map of labels present; divides every BLOCK_N.
WORD = tl.constexpr(32)
ALL = tl.constexpr(15)
TILE_CONFIGS = [
    *(config(m, 64, 8, s) for m in (64, 128) for s in (2, 3)),
    *(config(m, n, 4, s) for m in (32, 64) for n, s in ((32, 3), (64, 2), (64, 3))),
    config(32, 32, 8, 2),
    *(config(16, 32, 4, s) for s in (1, 2)),
]
SPLIT_CONFIGS = [
    *(config(0, n, w, s) for n, s in ((32, 3), (64, 2), (64, 3), (128, 2)) for w in (4, 8)),
    *(config(0, 32, 4, s) for s in (1, 2)),
]
for _one in SPLIT_CONFIGS:
    del _one.kwargs["BLOCK_M"]  # follows from the number of rows


def _classes(meta: Mapping[str, Any]) -> int:
    return 1 + (meta["DONORS"] > 0) + (meta["RECEIVERS"] > 0)


FOOTPRINT = Footprint("BLOCK_M", "BLOCK_N", 2, _classes)


@triton.jit
def either(a, b):
    """Bitwise or."""
    return a | b


@triton.jit
def label_words_kernel(labels_ptr, words_ptr, labels_b, labels_n, words_b, labelled, COUNT: tl.constexpr):
    """One bit per label present in every word of keys; keys without a label have label 0."""
    word = tl.program_id(1) * COUNT + tl.arange(0, COUNT)
    n = word[:, None] * WORD + tl.arange(0, WORD)[None, :]
    labels = tl.load(labels_ptr + tl.program_id(0) * labels_b + n * labels_n, mask=n < labelled, other=0).to(tl.int32)
    bits = tl.reduce(1 << tl.minimum(labels, 4), 1, either) & ALL
    tl.store(words_ptr + tl.program_id(0) * words_b + word, bits, mask=word < words_b)


@triton.jit
def belongs(labels, MASK: tl.constexpr):
    """Whether labels 0..4 (4 hides a key) are in a bit mask."""
    return ((1 << labels) & MASK) != 0


@triton.jit
def joint(l0, l1, l2, l3, MASK: tl.constexpr):
    """Sum over the labels in a bit mask."""
    total = tl.zeros_like(l0)
    if MASK & 1:
        total += l0
    if MASK & 2:
        total += l1
    if MASK & 4:
        total += l2
    if MASK & 8:
        total += l3
    return total


@triton.jit
def fold(acc, scaled_to, top, weights, chosen, v, WIDEN: tl.constexpr):
    """Adds the chosen keys of a tile to an accumulator and brings it to the maximum ``top``."""
    picked = tl.where(chosen[None, :], weights, 0.0)
    if not WIDEN:
        picked = picked.to(v.dtype)
    return acc * tl.exp2(scaled_to - top)[:, None] + dot(picked, v, WIDEN)


@triton.jit
def accumulate(
    q, position, k_at, v_at, labels_at, words_at, k_n, k_d, v_n, v_d, labels_n, start, end, labelled, scale,
    CAUSAL: tl.constexpr, DONORS: tl.constexpr, RECEIVERS: tl.constexpr, WORDS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, WIDEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Online softmax of a tile of rows over the keys from ``start`` to ``end``.

    Returns:
        The maximum (base 2), the sums of the four labels, and the outputs of rest, donors and receivers, all scaled
        to that maximum.
    """
    REST: tl.constexpr = ALL & ~(DONORS | RECEIVERS)
    wide, lane = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    top = tl.full([BLOCK_M], LOWEST, tl.float32)
    l0, l1 = tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M], tl.float32)
    l2, l3 = tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M], tl.float32)
    rest, rest_top = tl.zeros([BLOCK_M, BLOCK_D], tl.float32), top
    given, given_top = tl.zeros([BLOCK_M, BLOCK_D], tl.float32), top
    taken, taken_top = tl.zeros([BLOCK_M, BLOCK_D], tl.float32), top
    for first in tl.range(start, end, BLOCK_N, num_stages=STAGES):
        n = first + lane
        inside = n < end
        row = n.to(tl.int64)
        k = tl.load(
            k_at + row[None, :] * k_n + wide[:, None] * k_d, inside[None, :] & (wide < HEAD_DIM)[:, None], other=0.0
        )
        v = tl.load(
            v_at + row[:, None] * v_n + wide[None, :] * v_d, inside[:, None] & (wide < HEAD_DIM)[None, :], other=0.0
        )
        labels = tl.load(labels_at + n * labels_n, mask=inside & (n < labelled), other=0).to(tl.int32)
        labels = tl.where(inside, tl.minimum(labels, 4), 4)
        present = ALL
        if WORDS:
            present = tl.load(words_at + first // WORD)
            for i in tl.static_range(1, BLOCK_N // WORD):
                present |= tl.load(words_at + first // WORD + i)
        seen = (labels < 4)[None, :]
        if CAUSAL:
            seen = seen & (n[None, :] <= position[:, None])
        z = tl.where(seen, dot(q, k, WIDEN) * scale, float("-inf"))
        highest = tl.maximum(top, tl.max(z, 1))
        weights = tl.exp2(z - highest[:, None])
        shrink = tl.exp2(top - highest)
        top = highest
        l0, l1, l2, l3 = l0 * shrink, l1 * shrink, l2 * shrink, l3 * shrink
        if present & 1:
            l0 += tl.sum(tl.where((labels == 0)[None, :], weights, 0.0), 1)
        if present & 2:
            l1 += tl.sum(tl.where((labels == 1)[None, :], weights, 0.0), 1)
        if present & 4:
            l2 += tl.sum(tl.where((labels == 2)[None, :], weights, 0.0), 1)
        if present & 8:
            l3 += tl.sum(tl.where((labels == 3)[None, :], weights, 0.0), 1)
        if present & REST:
            rest = fold(rest, rest_top, top, weights, belongs(labels, REST), v, WIDEN)
            rest_top = top
        if present & DONORS:
            given = fold(given, given_top, top, weights, belongs(labels, DONORS), v, WIDEN)
            given_top = top
        if present & RECEIVERS:
            taken = fold(taken, taken_top, top, weights, belongs(labels, RECEIVERS), v, WIDEN)
            taken_top = top
    rest *= tl.exp2(rest_top - top)[:, None]
    given *= tl.exp2(given_top - top)[:, None]
    taken *= tl.exp2(taken_top - top)[:, None]
    return top, l0, l1, l2, l3, rest, given, taken


@triton.jit
def finish(
    top, l0, l1, l2, l3, rest, given, taken, out_at, lse_at, segments_at, active_at, inside, out_d,
    moved, gate_min, share_min,
    DONORS: tl.constexpr, RECEIVERS: tl.constexpr, GATE: tl.constexpr, ACTIVE: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Applies the mix and stores output, LSE and the LSE of every label."""
    total = l0 + l1 + l2 + l3
    out = rest + given + taken
    if DONORS:
        tested = joint(l0, l1, l2, l3, GATE)
        opened = tested >= gate_min * total
        if ACTIVE:
            opened = opened & (tl.load(active_at, mask=inside, other=0) != 0)
        change = given
        if RECEIVERS:
            received = joint(l0, l1, l2, l3, RECEIVERS)
            opened = opened & (received > 0) & (received >= share_min * tested)
            gain = joint(l0, l1, l2, l3, DONORS) / tl.where(received > 0, received, 1.0)
            change = given - gain[:, None] * taken
        out -= tl.where(opened, moved, 0.0)[:, None] * change
    out = out / tl.where(total > 0, total, 1.0)[:, None]
    wide = tl.arange(0, BLOCK_D)
    tl.store(
        out_at[:, None] + wide[None, :] * out_d, out.to(out_at.dtype.element_ty),
        mask=inside[:, None] & (wide < HEAD_DIM)[None, :],
    )  # fmt: skip
    tl.store(lse_at, (top + tl.log2(total)) / LOG2E, mask=inside)
    tl.store(segments_at, (top + tl.log2(l0)) / LOG2E, mask=inside)
    tl.store(segments_at + 1, (top + tl.log2(l1)) / LOG2E, mask=inside)
    tl.store(segments_at + 2, (top + tl.log2(l2)) / LOG2E, mask=inside)
    tl.store(segments_at + 3, (top + tl.log2(l3)) / LOG2E, mask=inside)


@triton.jit
def segment_kernel(
    query_ptr, key_ptr, value_ptr, labels_ptr, words_ptr, active_ptr, out_ptr, lse_ptr, segments_ptr, partial_ptr,
    q_b, q_h, q_m, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, labels_b, labels_h, labels_n, words_b, words_h,
    active_b, active_h, active_m, out_b, out_h, out_m, out_d,
    units, stack, group, queries, keys, labelled, span, scaling, moved, gate_min, share_min, size_class,
    CAUSAL: tl.constexpr, DONORS: tl.constexpr, RECEIVERS: tl.constexpr, GATE: tl.constexpr, ACTIVE: tl.constexpr,
    SPLIT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One tile of (position, head of the unit) pairs; a unit is ``stack`` heads that share keys and labels.

    Whole (not SPLIT): all keys, finished output. SPLIT: one span of keys, stored for :func:`merge_kernel`.
    """
    batch, unit = tl.program_id(1) // units, tl.program_id(1) % units
    tile = tl.program_id(0)
    if CAUSAL and not SPLIT:  # the longest rows first
        tile = tl.num_programs(0) - 1 - tile
    pair = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row, head = pair // stack, unit * stack + pair % stack
    inside = row < queries
    position = keys - queries + row
    wide = tl.arange(0, BLOCK_D)
    q_at = query_ptr + batch.to(tl.int64) * q_b + head.to(tl.int64) * q_h + row.to(tl.int64) * q_m
    q = tl.load(q_at[:, None] + wide[None, :] * q_d, inside[:, None] & (wide < HEAD_DIM)[None, :], other=0.0)
    start = tl.program_id(2) * span
    end = tl.minimum(keys, start + span)
    if CAUSAL:
        end = tl.minimum(end, tl.max(tl.where(inside, position, -1), 0) + 1)
    first_head = unit * stack
    kv_head = (first_head // group).to(tl.int64)
    top, l0, l1, l2, l3, rest, given, taken = accumulate(
        q, position,
        key_ptr + batch.to(tl.int64) * k_b + kv_head * k_h,
        value_ptr + batch.to(tl.int64) * v_b + kv_head * v_h,
        labels_ptr + batch * labels_b + first_head * labels_h,
        labels_ptr if SPLIT else words_ptr + batch * words_b + first_head * words_h,
        k_n, k_d, v_n, v_d, labels_n, start, end, labelled, scaling * LOG2E,
        CAUSAL, DONORS, RECEIVERS, not SPLIT, HEAD_DIM, BLOCK_D, WIDEN, BLOCK_M, BLOCK_N, STAGES,
    )  # fmt: skip
    heads = units * stack
    flat = (batch * heads + head) * queries + row
    if SPLIT:
        samples = tl.num_programs(1) // units
        WIDTH: tl.constexpr = 8 + BLOCK_D * (1 + (DONORS > 0) + (RECEIVERS > 0))
        at = partial_ptr + (tl.program_id(2).to(tl.int64) * samples * heads * queries + flat) * WIDTH
        tl.store(at, top, mask=inside)
        tl.store(at + 1, l0, mask=inside)
        tl.store(at + 2, l1, mask=inside)
        tl.store(at + 3, l2, mask=inside)
        tl.store(at + 4, l3, mask=inside)
        tl.store(at[:, None] + 8 + wide[None, :], rest, mask=inside[:, None])
        if DONORS:
            tl.store(at[:, None] + 8 + BLOCK_D + wide[None, :], given, mask=inside[:, None])
        if RECEIVERS:
            tl.store(at[:, None] + 8 + 2 * BLOCK_D + wide[None, :], taken, mask=inside[:, None])
    else:
        finish(
            top, l0, l1, l2, l3, rest, given, taken,
            out_ptr + batch.to(tl.int64) * out_b + head.to(tl.int64) * out_h + row.to(tl.int64) * out_m,
            lse_ptr + flat, segments_ptr + flat.to(tl.int64) * 4,
            active_ptr + batch * active_b + head * active_h + row * active_m if ACTIVE else lse_ptr,
            inside, out_d, moved, gate_min, share_min, DONORS, RECEIVERS, GATE, ACTIVE, HEAD_DIM, BLOCK_D,
        )  # fmt: skip


@triton.jit
def merge_kernel(
    partial_ptr, active_ptr, out_ptr, lse_ptr, segments_ptr,
    active_b, active_h, active_m, out_b, out_h, out_m, out_d, rows, heads, queries, parts, moved, gate_min, share_min,
    DONORS: tl.constexpr, RECEIVERS: tl.constexpr, GATE: tl.constexpr, ACTIVE: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Joins the spans of a tile of rows (sample, head, position in one index) and finishes the output."""
    WIDTH: tl.constexpr = 8 + BLOCK_D * (1 + (DONORS > 0) + (RECEIVERS > 0))
    flat = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = flat < rows
    wide = tl.arange(0, BLOCK_D)
    top = tl.full([BLOCK_M], LOWEST, tl.float32)
    l0, l1 = tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M], tl.float32)
    l2, l3 = tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M], tl.float32)
    rest = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    given = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    taken = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    at = partial_ptr + flat.to(tl.int64) * WIDTH
    for _ in range(parts):
        other = tl.load(at, mask=inside, other=0.0)
        highest = tl.maximum(top, other)
        shrink, scale = tl.exp2(top - highest), tl.exp2(other - highest)
        top = highest
        l0 = l0 * shrink + tl.load(at + 1, mask=inside, other=0.0) * scale
        l1 = l1 * shrink + tl.load(at + 2, mask=inside, other=0.0) * scale
        l2 = l2 * shrink + tl.load(at + 3, mask=inside, other=0.0) * scale
        l3 = l3 * shrink + tl.load(at + 4, mask=inside, other=0.0) * scale
        here = at[:, None] + 8 + wide[None, :]
        rest = rest * shrink[:, None] + tl.load(here, mask=inside[:, None], other=0.0) * scale[:, None]
        if DONORS:
            part_given = tl.load(here + BLOCK_D, mask=inside[:, None], other=0.0)
            given = given * shrink[:, None] + part_given * scale[:, None]
        if RECEIVERS:
            part_taken = tl.load(here + 2 * BLOCK_D, mask=inside[:, None], other=0.0)
            taken = taken * shrink[:, None] + part_taken * scale[:, None]
        at += rows * WIDTH
    batch, head, row = flat // (heads * queries), flat // queries % heads, flat % queries
    finish(
        top, l0, l1, l2, l3, rest, given, taken,
        out_ptr + batch.to(tl.int64) * out_b + head.to(tl.int64) * out_h + row.to(tl.int64) * out_m,
        lse_ptr + flat, segments_ptr + flat.to(tl.int64) * 4,
        active_ptr + batch * active_b + head * active_h + row * active_m if ACTIVE else lse_ptr,
        inside, out_d, moved, gate_min, share_min, DONORS, RECEIVERS, GATE, ACTIVE, HEAD_DIM, BLOCK_D,
    )  # fmt: skip


@functools.cache
def _tuned(split: bool) -> Any:
    configs = SPLIT_CONFIGS if split else TILE_CONFIGS
    return tuned(segment_kernel, configs, ["size_class", "stack", "HEAD_DIM", "DONORS", "RECEIVERS"], FOOTPRINT)


def _label_words(labels: Tensor, keys: int) -> Tensor:
    """int32 ``[B, 1 or H, words]``: the labels present in every ``WORD`` keys, up to a multiple of 128 keys."""
    b, h, labelled = labels.shape
    flat = labels.reshape(b * h, labelled)
    words = torch.empty((b * h, triton.cdiv(keys, 128) * 128 // WORD.value), dtype=torch.int32, device=labels.device)
    label_words_kernel[(b * h, triton.cdiv(words.shape[1], 64))](
        flat, words, *flat.stride(), words.shape[1], labelled, COUNT=64, **OPTIONS
    )
    return words.view(b, h, -1)


def segment_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    labels: Tensor,
    scaling: float,
    active: Tensor | None,
    causal: bool,
    donors: int,
    receivers: int,
    gate: int,
    keep: float,
    gate_min: float,
    share_min: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Kernels behind :func:`vlm_attn.ops.segment_attention`; head dimensions above 256 take the reference."""
    if query.shape[-1] > MAX_HEAD_DIM:
        return segment_attention_reference(
            query, key, value, labels, scaling, active, causal, donors, receivers, gate, keep, gate_min, share_min
        )
    (b, h, q, _), (kv, n) = query.shape, key.shape[1:3]
    stack = h // kv if labels.ndim == 2 else 1
    units = h // stack
    labels = labels if labels.ndim == 3 else labels[:, None]
    # The interpreter cuts bfloat16 off instead of rounding: it stores fp32, which torch then rounds.
    out = torch.empty_like(query, dtype=torch.float32 if INTERPRETED else query.dtype)
    lse = query.new_empty((b, h, q), dtype=torch.float32)
    segment_lse = query.new_empty((b, h, q, LABELS), dtype=torch.float32)
    parts = splits(b * units * triton.cdiv(q * stack, 64), n, query.device)
    mix = {"DONORS": donors, "RECEIVERS": receivers, "GATE": gate, "ACTIVE": active is not None}
    shared = common(query)
    tiles = {} if query.is_cuda else dict(INTERPRETED_TILE)
    words = partial = None
    if parts > 1:
        tiles["BLOCK_M"] = min(64, max(16, triton.next_power_of_2(q * stack)))
        width = 8 + shared["BLOCK_D"] * (1 + (donors > 0) + (receivers > 0))
        partial = query.new_empty((parts, b * h * q, width), dtype=torch.float32)
    else:
        words = _label_words(labels, n)

    def grid(meta: dict[str, int]) -> tuple[int, int, int]:
        return triton.cdiv(q * stack, meta["BLOCK_M"]), b * units, parts

    (_tuned(parts > 1) if query.is_cuda else segment_kernel)[grid](
        query, key, value, labels, words, active, out, lse, segment_lse, partial,
        *query.stride(), *key.stride(), *value.stride(), *_by_head(labels), *_by_head(words)[:2], *strides(active, 3),
        *out.stride(), units, stack, h // kv, q, n, labels.shape[-1], span_of(n, parts), scaling,
        1 - keep, gate_min, share_min, triton.next_power_of_2(n),
        CAUSAL=causal, SPLIT=parts > 1, **mix, **shared, **tiles,
    )  # fmt: skip
    if partial is not None:
        rows = b * h * q
        shared.pop("WIDEN")
        merge_kernel[(triton.cdiv(rows, 4 if query.is_cuda else 16),)](
            partial, active, out, lse, segment_lse, *strides(active, 3), *out.stride(), rows, h, q, parts,
            1 - keep, gate_min, share_min, **mix, **shared, BLOCK_M=4 if query.is_cuda else 16,
        )  # fmt: skip
    return out.to(query.dtype), lse, segment_lse


def _by_head(labels: Tensor | None) -> tuple[int, int, int]:
    """Strides of ``[B, 1 or H, n]``: the one row of shared labels serves every head."""
    if labels is None:
        return 0, 0, 0
    return labels.stride(0), labels.stride(1) if labels.shape[1] > 1 else 0, labels.stride(2)
