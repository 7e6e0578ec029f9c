"""Column statistics of a layer's own attention, and the all-row edits that follow from them (plan P3).

Row blocks are worked off one after the other: the column sums, the LSE of each row and, in a second sweep over the few
labelled keys alone, the merge. No block larger than ``rows.CHUNK_ELEMENTS`` is held.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .. import ops
from . import kernel, segments
from .call import Call
from .labelled import Labelled
from .rows import chunks, row_logits, row_outputs


def _direct_below(dtype: torch.dtype) -> float:
    """Share of unlabelled mass below which ``O - M_S O_S`` loses too many digits of the output's type."""
    return 0.1 if dtype == torch.float32 else 0.2


def column_means(call: Call, valid: Tensor, heads: Tensor) -> tuple[Tensor, Tensor]:
    """Mean weight that each key receives from the valid rows that see it, and the LSE of every row.

    Args:
        valid: bool ``[B, Q]``, rows that count.
        heads: int64 ``[S]``, the query heads to look at.

    Returns:
        fp32 means ``[B, S, N]`` (0 where no row sees the key) and LSE ``[B, S, Q]``.
    """
    batch, keys = call.query.shape[0], call.keys
    if call.plain and (call.lse is not None or segments.gives_lse(call.query)):
        return _fused_means(call, valid, heads)
    rows = torch.arange(call.queries, device=call.query.device)
    sums = call.query.new_zeros((batch, len(heads), keys), dtype=torch.float32)
    seen = call.query.new_zeros((batch, 1, keys), dtype=torch.float32)
    lse = []
    for part in chunks(rows, batch, len(heads), keys):
        logits = call.logits(part, heads)
        lse.append(logits.logsumexp(-1))
        counted = valid[:, None, part].float()
        sums += (counted[..., None, :] @ (logits - lse[-1][..., None]).exp())[:, :, 0]
        visible = call.visible(part).expand(batch, -1, -1, -1)[:, 0].float()
        seen += counted @ visible
    return torch.where(seen > 0, sums / seen.clamp(min=1), 0.0), torch.cat(lse, dim=-1)


def _fused_means(call: Call, valid: Tensor, heads: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`column_means` of a plain causal call: the LSE from fused attention, the columns from the operator."""
    whole = call.lse
    if whole is None:
        whole = segments.attend(call.query, call.key, call.value, call.scaling, causal=True)[1]
    lse = whole[:, heads].contiguous()
    query, key, _ = call.heads(heads)
    sums = ops.key_mass(query, key, None, call.scaling, lse, gate=valid)
    seen = valid.flip(1).cumsum(1).flip(1)[:, None].float()
    return torch.where(seen > 0, sums / seen.clamp(min=1), 0.0), lse


def edit_labelled(
    call: Call, out: Tensor, item: Labelled, heads: Tensor, lse: Tensor, valid: Tensor
) -> tuple[Tensor, int]:
    """``O' = s_0 O + sum_g (s_g - s_0) M_g O_g`` in all valid rows, the labelled keys gathered per head.

    Args:
        item: edit whose labels ``[B, H, N]`` are 0 for most keys.
        heads: int64 ``[S]``, the edited query heads; lse: ``[B, S, Q]`` of all keys in these heads.
        valid: bool ``[B, Q]``, the rows that are edited.

    Returns:
        The output and the number of (sample, head, row) triples that were edited.
    """
    if kernel.suits(item, call):
        return kernel.edit_rows(call, item, valid, out)
    labels = item.labels[:, heads]
    size = int((labels > 0).sum(-1).max())
    if size == 0:
        return out, 0
    index = torch.argsort((labels == 0).to(torch.uint8), dim=-1, stable=True)[..., :size]
    label = labels.gather(-1, index).long()
    query, key, value = call.heads(heads)
    every = len(heads) == out.shape[2]
    wide = index[..., None].expand(-1, -1, -1, key.shape[-1])
    key, value = key.gather(2, wide), value.gather(2, wide).float()
    counts = item.counts[:, heads] if item.counts.dim() == 3 else item.counts
    result, edited = out.clone(), 0
    direct: list[Tensor] = []
    start = 0
    for part in chunks(torch.arange(call.queries, device=out.device), out.shape[0], len(heads), size):
        logits = row_logits(query.index_select(2, part), key, call.scaling, call.softcap)
        for mapped in call.maps:
            logits = mapped.apply(logits, part, index)
        if call.bias is not None:
            bias = call.bias.expand(-1, out.shape[2], -1)[:, heads]
            logits = logits + bias.gather(2, index)[:, :, None, :]
        visible = _visible(call, part, index)
        # In place, here and below: a chunk is the largest thing that this edit holds.
        block = logits.sub_(lse[:, :, start : start + part.numel(), None]).exp_()
        # Rows of padding see nothing: their LSE is the mask's own number, and they must stay finite.
        block.masked_fill_(~(visible & valid[:, None, part, None]), 0.0)
        start += part.numel()
        member = torch.nn.functional.one_hot(label, item.edit.segments).float()
        member[..., 0] = 0.0  # fillers where a head has fewer labelled keys than another
        masses = block @ member
        masses[..., 0] = (1 - masses[..., 1:].sum(-1)).clamp(min=0)
        scales = torch.where(valid[:, None, part, None], item.edit.scales(masses, counts), 1.0)
        edited += int(item.changes(scales, masses).sum())
        # Where nearly all mass is labelled, the rest is a difference of equals: such rows are computed directly.
        unsafe = (masses[..., 0] < _direct_below(out.dtype)) & valid[:, None, part]
        direct.append(part[unsafe.any(0).any(0)])
        base = scales[..., :1]
        per_key = (scales - base) @ member.transpose(-1, -2)
        before = (out[:, part] if every else out[:, part][:, :, heads]).transpose(1, 2).float()
        after = (base * before + block.mul_(per_key) @ value).transpose(1, 2).to(out.dtype)
        if every:
            result[:, part] = after
        else:
            result[:, part[:, None], heads[None]] = after
    for part in chunks(torch.cat(direct), out.shape[0], len(heads), call.keys):
        if not part.numel():
            continue
        chosen = replace(item, labels=labels, members=item.members[:, heads], counts=counts, heads=None)
        weights = chosen.apply(call.weights(part, heads), valid[:, None, part, None])
        after = row_outputs(weights, call.heads(heads)[2])
        result[:, part[:, None], heads[None]] = after.transpose(1, 2).to(out.dtype)
    return result, edited


def _visible(call: Call, rows: Tensor, index: Tensor) -> Tensor:
    """bool ``[B, S, R, K]``: which of the gathered keys ``index [B, S, K]`` the query rows ``rows [R]`` see."""
    if call.plain:
        return index[:, :, None, :] <= rows[:, None]
    visible = call.visible(rows).expand(len(index), index.shape[1], -1, -1)
    return visible.gather(3, index[:, :, None, :].expand(-1, -1, rows.numel(), -1))
