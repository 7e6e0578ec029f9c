"""Exact attention rows on demand: the weights of a few query rows, fp32, without ever holding a full matrix."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Upper bound on the weights held at a time (elements); rows beyond it are worked off in chunks. On the CPU a chunk
# stays near the cache: larger ones wait for memory, and for its pages, in every pass over them.
CHUNK_ELEMENTS = 1 << 21
ACCELERATOR_CHUNKS = 8
# Where heads can be worked off apart, a block on the CPU stays inside one core's cache, and in memory that is there
# already; with fewer rows than these the product of a block would read its keys more often than it is worth.
BLOCK_ELEMENTS, BLOCK_ROWS = 1 << 18, 16


def row_logits(query: Tensor, key: Tensor, scaling: float, softcap: float | None = None) -> Tensor:
    """fp32 logits ``[B, H, R, N]`` of rotated queries ``[B, H, R, d]`` on cached keys ``[B, Hkv, N, d]``."""
    b, h, r, d = query.shape
    kv = key.shape[1]
    grouped, keys = query.float().reshape(b * kv, h // kv * r, d), key.float().flatten(0, 1).transpose(1, 2)
    ignored = grouped.new_empty(1, 1, 1)
    logits = torch.baddbmm(ignored, grouped, keys, beta=0, alpha=scaling).view(b, h, r, key.shape[2])
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def row_weights(
    query: Tensor,
    key: Tensor,
    scaling: float,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """fp32 post-softmax weights ``[B, H, R, N]``; ``mask`` and ``bias`` are additive and broadcastable."""
    logits = row_logits(query, key, scaling, softcap)
    if bias is not None:
        logits = logits + bias
    if mask is not None:
        logits = logits + mask
    return logits.softmax(-1)


def row_outputs(weights: Tensor, value: Tensor) -> Tensor:
    """fp32 head outputs ``[B, H, R, d]`` of weights ``[B, H, R, N]`` on values ``[B, Hkv, N, d]``."""
    b, h, r, n = weights.shape
    kv = value.shape[1]
    return torch.bmm(weights.reshape(b * kv, h // kv * r, n), value.float().flatten(0, 1)).view(
        b, h, r, value.shape[-1]
    )


def chunks(rows: Tensor, batch: int, heads: int, keys: int) -> Iterator[Tensor]:
    """Splits ``rows [R]`` so that one chunk's weights stay below the bound of their device."""
    limit = CHUNK_ELEMENTS * (1 if rows.device.type == "cpu" else ACCELERATOR_CHUNKS)
    size = max(1, limit // max(1, batch * heads * keys))
    yield from rows.split(size)


def blocks(rows: int, heads: int, unit: int, device: torch.device) -> Iterator[tuple[slice, slice]]:
    """Splits ``rows`` and key/value ``heads`` into blocks: one head after the other before rows are split.

    Args:
        unit: weights of one row in one of the heads.
    """
    cpu = device.type == "cpu"
    limit = BLOCK_ELEMENTS if cpu else CHUNK_ELEMENTS * ACCELERATOR_CHUNKS
    size = max(min(BLOCK_ROWS, CHUNK_ELEMENTS // max(1, unit)), limit // max(1, unit), 1)
    together = max(1, size // max(1, rows))
    for head in range(0, heads, together):
        for first in range(0, rows, size):
            yield slice(head, min(head + together, heads)), slice(first, min(first + size, rows))
