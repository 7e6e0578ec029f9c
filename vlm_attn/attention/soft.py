"""Keys behind a row that the mask hides, let in with a weight (plan P3): a second softmax part merged by its LSE."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from . import segments
from .call import Call
from .rows import row_logits, row_outputs

# Rows at a time: few enough that rows without softened pairs are skipped, many enough to fill a matrix product.
ROWS = 128
Pairs = Callable[[Tensor, Tensor], Tensor]


def soften(call: Call, out: Tensor, images: Tensor, pairs: Pairs, sigma: float, mode: str) -> tuple[Tensor, int]:
    """Merges the hidden pairs into the rows that have any.

    With (O, L) over the visible keys and (O_f, L_f) over the softened ones: ``weight`` gives the LSE merge of (O, L)
    and (O_f, L_f + log sigma), ``output`` gives ``(1 - sigma) O + sigma merge((O, L), (O_f, L_f))``.

    Args:
        images: int64 ``[B, N]`` image of each slot, -1 for text and padding.
        pairs: ``(row images [B, R], key images [B, N]) -> bool [B, R, N]``.

    Returns:
        The output and the number of (sample, head, row) triples that were edited.
    """
    rows = (images >= 0).any(0).nonzero()[:, 0]
    if rows.numel() == 0 or sigma == 0:
        return out, 0
    batch, heads = call.query.shape[:2]
    order = torch.arange(call.keys, device=out.device)
    lse = segments.attend(call.query, call.key, call.value, call.scaling, causal=True)[1] if call.plain else None
    result: Tensor | None = None
    edited = 0
    for part in rows.split(ROWS):
        hidden = ~call.visible(part).expand(batch, -1, -1, -1)[:, 0]
        wanted = pairs(images[:, part], images) & hidden & (order[None] > part[:, None])
        active, columns = wanted.any(-1), wanted.any(0).any(0).nonzero()[:, 0]
        if columns.numel() == 0:
            continue
        logits = _bare(call, part, columns).masked_fill(~wanted[:, None, :, columns], float("-inf"))
        extra_lse = logits.logsumexp(-1)
        weights = (logits - torch.where(extra_lse.isinf(), 0.0, extra_lse)[..., None]).exp()
        extra_out = row_outputs(weights, call.value[:, :, columns])
        seen_lse = call.logits(part).logsumexp(-1) if lse is None else lse.index_select(2, part)
        before = out[:, part].transpose(1, 2).float()
        if mode == "weight":
            extra_lse = extra_lse + math.log(sigma)
        after, _ = segments.merge([(before, seen_lse), (extra_out, extra_lse)])
        if mode == "output":
            after = (1 - sigma) * before + sigma * after
        result = out.clone() if result is None else result
        new = torch.where(active[:, None, :, None], after, before).transpose(1, 2)
        result[:, part] = new.to(out.dtype)
        edited += int(active.sum()) * heads
    return (out if result is None else result), edited


def _bare(call: Call, rows: Tensor, columns: Tensor) -> Tensor:
    """Logits ``[B, H, R, C]`` of some rows and keys before the mask: softcap, maps and biases."""
    query, key = call.query.index_select(2, rows), call.key.index_select(2, columns)
    logits = row_logits(query, key, call.scaling, call.softcap)
    for item in call.maps:
        logits = item.apply(logits, rows, columns[None, None].expand(len(logits), 1, -1))
    return logits if call.bias is None else logits + call.bias[:, :, None, columns]
