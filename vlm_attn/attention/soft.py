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
    if sigma == 0 or not bool((images >= 0).any()):
        return out, 0
    if call.lse is not None and call.plain:
        return _whole_images(call, call.lse, out, images, pairs, sigma, mode)
    rows = (images >= 0).any(0).nonzero()[:, 0]
    order = torch.arange(call.keys, device=out.device)
    result: Tensor | None = None
    edited = 0
    for part in rows.split(ROWS):
        hidden = ~call.visible(part).expand(len(out), -1, -1, -1)[:, 0]
        wanted = pairs(images[:, part], images) & hidden & (order[None] > part[:, None])
        active, columns = wanted.any(-1), wanted.any(0).any(0).nonzero()[:, 0]
        if columns.numel() == 0:
            continue
        before = out[:, part].transpose(1, 2).float()
        extra = _masked(_bare(call, part, columns), wanted[:, None, :, columns], call.value[:, :, columns])
        after = _merged(before, call.logits(part).logsumexp(-1), extra, sigma, mode)
        result = out.clone() if result is None else result
        new = torch.where(active[:, None, :, None], after, before).transpose(1, 2)
        result[:, part] = new.to(out.dtype)
        edited += int(active.sum()) * call.query.shape[1]
    return (out if result is None else result), edited


def _whole_images(
    call: Call, lse: Tensor, out: Tensor, images: Tensor, pairs: Pairs, sigma: float, mode: str
) -> tuple[Tensor, int]:
    """:func:`soften` of a plain causal call: rows of one image that gain the same keys run as one fused call."""
    order = torch.arange(call.keys, device=out.device)
    result, edited = out.clone(), 0
    for row in range(len(out)):
        for image in images[row].unique().tolist():
            part = (images[row] == image).nonzero()[:, 0] if image >= 0 else order[:0]
            wanted = pairs(images[row : row + 1, part], images[row : row + 1])[0] & (order > part[:, None])
            active, columns = wanted.any(-1), wanted.any(0).nonzero()[:, 0]
            if columns.numel() == 0:
                continue
            part, wanted = part[active], wanted[active][:, columns]
            query = call.query[row : row + 1].index_select(2, part)
            key, value = (x[row : row + 1].index_select(2, columns) for x in (call.key, call.value))
            if bool(wanted.all()):
                extra = segments.attend(query, key, value, call.scaling)
            else:
                extra = _masked(row_logits(query, key, call.scaling), wanted[None, None], value)
            before = out[row : row + 1].index_select(1, part).transpose(1, 2).float()
            after = _merged(before, lse[row : row + 1].index_select(2, part), extra, sigma, mode)
            result[row, part] = after[0].transpose(0, 1).to(out.dtype)
            edited += part.numel() * call.query.shape[1]
    return result, edited


def _masked(logits: Tensor, wanted: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Output and LSE over the wanted keys alone."""
    logits = logits.masked_fill_(~wanted, float("-inf"))
    lse = logits.logsumexp(-1)
    weights = logits.sub_(torch.where(lse.isinf(), 0.0, lse)[..., None]).exp_()
    return row_outputs(weights, value), lse


def _merged(before: Tensor, lse: Tensor, extra: tuple[Tensor, Tensor], sigma: float, mode: str) -> Tensor:
    """Outputs of rows with the extra part let in."""
    extra_out, extra_lse = extra
    if mode == "weight":
        extra_lse = extra_lse + math.log(sigma)
    after, _ = segments.merge([(before, lse), (extra_out, extra_lse)])
    return after if mode == "weight" else (1 - sigma) * before + sigma * after


def _bare(call: Call, rows: Tensor, columns: Tensor) -> Tensor:
    """Logits ``[B, H, R, C]`` of some rows and keys before the mask: softcap, maps and biases."""
    query, key = call.query.index_select(2, rows), call.key.index_select(2, columns)
    logits = row_logits(query, key, call.scaling, call.softcap)
    for item in call.maps:
        logits = item.apply(logits, rows, columns[None, None].expand(len(logits), 1, -1))
    return logits if call.bias is None else logits + call.bias[:, :, None, columns]
