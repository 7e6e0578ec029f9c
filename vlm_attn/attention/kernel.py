"""Segment edits in one pass of the segment operator, on devices that have a kernel for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeGuard

import torch
from torch import Tensor

from .. import ops
from .call import Call
from .labelled import Labelled


def suits(item: object, call: Call) -> TypeGuard[Labelled]:
    """Whether this edit of this call can be said to the operator: known keys per row, no change of the logits."""
    if not isinstance(item, Labelled) or not ops.accelerated(call.query.device.type):
        return False
    if call.bias is not None or call.maps or call.softcap is not None or not (call.plain or call.queries == 1):
        return False
    fits = item.edit.segments <= ops.LABELS and call.query.dtype in ops.DTYPES
    return fits and item.edit.mix(item.counts) is not None


def edit_rows(call: Call, item: Labelled, gate: Tensor, out: Tensor) -> tuple[Tensor, int]:
    """Replaces the (head, row) pairs of ``out [B, Q, H, d]`` that an edit which :func:`suits` changes.

    Args:
        gate: bool ``[B, Q]``, the rows it acts in; the operator runs from the first of them on.

    Returns:
        The output and the number of changed (sample, head, row) triples.
    """
    rows = gate.any(0).nonzero()[:, 0]
    if rows.numel() == 0:
        return out, 0
    first = int(rows[0])
    edited, opened = _run(call, item, gate, first)
    if not bool(opened.any()):
        return out, 0
    result = out.clone()
    result[:, first:] = torch.where(opened[..., None], edited.to(out.dtype), out[:, first:])
    return result, int(opened.sum())


def edit_decode(call: Call, item: Labelled, gate: Tensor) -> tuple[Tensor, Callable[[], Tensor]]:
    """The one new row, ``[B, 1, H, d]``, and how to count the (sample, head) pairs that changed."""
    edited, opened = _run(call, item, gate, 0)
    return edited.contiguous(), opened.sum


def _run(call: Call, item: Labelled, gate: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """Outputs ``[B, R, H, d]`` of the rows from ``first`` on and bool ``[B, R, H]`` of the pairs that changed."""
    said = item.edit.mix(item.counts)
    if said is None:
        raise ValueError(f"{item.edit.name} is no mix of segments")
    mix, allowed = said
    heads = torch.ones((), dtype=torch.bool, device=gate.device) if item.heads is None else item.heads[:, None]
    active = gate[:, None, first:] & allowed[:, None, None] & heads
    found = ops.segment_attention(
        call.query[:, :, first:], call.key, call.value, _labels(call, item), call.scaling, mix, active=active
    )
    # Donors without mass, or that keep everything, change nothing: there the output that ran stays, to the last bit.
    giving = found.segment_lse[..., list(mix.donors)].amax(-1) > -ops.INF
    opened = mix.open(found.segment_lse, active) & giving & (mix.keep != 1)
    return found.output.transpose(1, 2), opened.transpose(1, 2)


def _labels(call: Call, item: Labelled) -> Tensor:
    """uint8 labels of all keys, generated tokens included; keys that a single row does not see are padding."""
    labels = item.labels.to(torch.uint8)
    new = call.keys - labels.shape[-1]
    labels = torch.nn.functional.pad(labels, (0, new), value=item.edit.generated)
    if call.queries > 1 or call.mask is None:
        return labels.contiguous()
    visible = call.visible(torch.zeros(1, dtype=torch.long, device=labels.device))[:, 0, 0]
    hidden = ~visible if labels.dim() == 2 else ~visible[:, None]
    return labels.masked_fill(hidden, ops.PAD).contiguous()
