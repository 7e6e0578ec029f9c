"""How edits of one attention call are executed: which rows are recomputed exactly, and what is merged into the output.

Plans (spec names): P0 head scale lives at ``o_proj`` (see :mod:`vlm_attn.session`). P1/P2: a few rows are computed
exactly and their change is added to the fused output. P3: all-row edits run as scaled keys or augmented dimensions
(:mod:`.call`), as LSE-merged segments (here), from column sums (:mod:`.columns`) or with extra keys (:mod:`.soft`),
so that no full block of weights is ever held.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..stages import EditView, RowEdit
from . import kernel, segments
from .call import Call, RowMap, fused_inputs
from .labelled import Changed, Labelled
from .rows import chunks, row_outputs

# From this many edited rows on, the LSE route costs less memory than exact rows at equal work.
FUSED_ROWS = 512


@dataclass(frozen=True)
class Remembered:
    """A row edit with what it remembers of the prompt and the roles of the prompt's keys."""

    edit: RowEdit
    view: EditView
    memory: Any

    def apply(self, weights: Tensor, active: Tensor | None) -> Tensor:
        """The weights ``[B, H, 1, N]`` of the last row after the edit, where ``active [B, 1, 1, 1]`` (None = all)."""
        row = weights[:, :, 0]
        edited = self.edit.edit(row, self.view, self.memory)
        if edited is row:
            return weights
        return edited[:, :, None] if active is None else torch.where(active, edited[:, :, None], weights)

    def change(self, weights: Tensor, active: Tensor | None) -> tuple[Tensor, Changed]:
        """The same, and where a weight changed."""
        edited = self.apply(weights, active)
        if edited is weights:
            return weights, None
        return edited, lambda: (edited - weights).abs_().amax(-1) > 0


Item = Labelled | Remembered
Gated = tuple[Item, Tensor]
"""An edit and the rows it acts in, bool ``[B, Q]``."""


def edit_decode(
    call: Call, edits: Sequence[Gated], every: bool = False
) -> tuple[Tensor | None, Callable[[], Tensor | int]]:
    """Plan P1: the one new row is computed exactly, edited, and used as it is; no fused call runs beside it.

    Args:
        every: the edits act in every sample.

    Returns:
        output ``[B, 1, H, d]``, None where no edit does anything (the caller then runs the backend), and how to count
        the (sample, head) pairs that were edited.
    """
    if len(edits) == 1 and kernel.suits(edits[0][0], call):
        return kernel.edit_decode(call, edits[0][0], edits[0][1])
    weights = call.weights(None)
    shape = weights.shape[:3]
    touched: list[Callable[[], Tensor]] = [functools.partial(_whole, mapped.gate[:, None]) for mapped in call.maps]
    for item, gate in edits:
        weights, changed = item.change(weights, None if every else gate[:, None, :, None])
        touched += [] if changed is None else [changed]
    if not touched:
        return None, int
    out = row_outputs(weights, call.value).transpose(1, 2).to(call.query.dtype).contiguous()
    return out, lambda: functools.reduce(torch.logical_or, [found() for found in touched]).expand(shape).sum()


def _whole(gate: Tensor) -> Tensor:
    """A map that acts changes every head."""
    return gate


def edit_rows(call: Call, out: Tensor, edits: Sequence[Gated]) -> tuple[Tensor, int]:
    """Applies pending logit maps and edits to the rows of a fused output that they act in.

    Args:
        out: ``[B, Q, H, d]`` output of the attention that ran (biases and folded maps included).
        edits: edits in composition order.

    Returns:
        The output and the number of (sample, head, row) triples that were edited.
    """
    if len(edits) == 1 and kernel.suits(edits[0][0], call):
        return kernel.edit_rows(call, edits[0][0], edits[0][1], out)
    wanted = [m.gate for m in call.pending] + [gate for _, gate in edits]
    rows = torch.stack(wanted).any(0).any(0).nonzero()[:, 0] if wanted else torch.zeros(0)
    if rows.numel() == 0:
        return out, 0
    if not edits and len(call.pending) == 1 and call.pending[0].boost is None and call.softcap is None:
        return _scaled_rows(call, out, rows)
    if call.plain and rows.numel() >= FUSED_ROWS and len(edits) == 1:
        item, gate = edits[0]
        shared = isinstance(item, Labelled) and item.labels.dim() == 2 and item.heads is None
        if isinstance(item, Labelled) and shared and bool(gate[:, rows].all()):
            return _edit_fused(call, out, rows, item)
    return _edit_exact(call, out, rows, edits)


def edit_weights(weights: Tensor, rows: Tensor, last: int, edits: Sequence[Gated]) -> Tensor:
    """The weights ``[B, H, R, N]`` of the query rows ``rows [R]`` after the edits (row edits: in row ``last``)."""
    for item, gate in edits:
        if isinstance(item, Labelled):
            weights = item.apply(weights, gate[:, None, rows, None])
        elif int(rows[-1]) == last:
            newest = item.apply(weights[:, :, -1:], gate[:, None, last:, None])
            weights = torch.cat([weights[:, :, :-1], newest], dim=2)
    return weights


def _edit_exact(call: Call, out: Tensor, rows: Tensor, edits: Sequence[Gated]) -> tuple[Tensor, int]:
    """Plan P2: the rows' weights before and after; the change of their outputs is added."""
    edited, last = 0, call.queries - 1
    result: Tensor | None = None
    for part in chunks(rows, call.query.shape[0], call.query.shape[1], call.keys):
        weights = call.weights(part, maps=call.folded)
        current = call.weights(part) if call.pending else weights
        current = edit_weights(current, part, last, edits)
        change = current - weights
        touched = change.ne(0).any(-1)
        if bool(touched.any()):
            edited += int(touched.sum())
            result = out.clone() if result is None else result
            delta = row_outputs(change, call.value).transpose(1, 2)
            result[:, part] = (result[:, part].float() + delta).to(out.dtype)
    return (out if result is None else result), edited


def _scaled_rows(call: Call, out: Tensor, rows: Tensor) -> tuple[Tensor, int]:
    """Plan P3 for a multiplicative map: its rows run once more, on scaled keys, and replace their outputs."""
    gate = call.pending[0].gate[:, rows]
    maps = tuple(replace(m, everywhere=True) for m in call.maps)
    part = replace(call, query=call.query.index_select(2, rows), mask=call.visible(rows), maps=maps, backend="sdpa")
    query, key, value, mask = fused_inputs(part)
    scaled = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=call.scaling, enable_gqa=True
    )
    scaled = scaled[..., : call.query.shape[-1]].transpose(1, 2)
    result = out.clone()
    result[:, rows] = torch.where(gate[:, :, None, None], scaled.to(out.dtype), out[:, rows])
    return result, int(gate.sum()) * call.query.shape[1]


def _edit_fused(call: Call, out: Tensor, rows: Tensor, item: Labelled) -> tuple[Tensor, int]:
    """Plan P3: ``O' = s_0 O + sum_g (s_g - s_0) M_g O_g`` with (O_g, L_g) of the gathered segments, L of all keys."""
    edit, labels, counts = item.edit, item.labels, item.counts
    query = call.query.index_select(2, rows)
    lse = call.lse
    if lse is None:
        lse = segments.attend(call.query, call.key, call.value, call.scaling, causal=True)[1]
    lse = lse.index_select(2, rows)
    masses, outputs = [], []
    for g in range(1, edit.segments):
        size = int(counts[:, g].max())
        member = labels == g
        order = torch.argsort((~member).to(torch.uint8), dim=1, stable=True)[:, :size]
        index = order[:, None, :, None].expand(-1, call.key.shape[1], -1, call.key.shape[3])
        present = member.gather(1, order)
        hidden = ~present[:, None, :] | (order[:, None, :] > rows[None, :, None])
        bias = None
        if bool(hidden.any()):
            bias = torch.zeros(hidden.shape, device=hidden.device).masked_fill_(
                hidden, torch.finfo(torch.float32).min
            )[:, None]
        part, part_lse = segments.attend(
            query, call.key.gather(2, index), call.value.gather(2, index), call.scaling, bias
        )
        masses.append((part_lse - lse).exp())
        outputs.append(part)
    segment_mass = torch.stack(masses, dim=-1)
    rest = (1 - segment_mass.sum(-1, keepdim=True)).clamp(min=0)
    whole = torch.cat([rest, segment_mass], dim=-1)
    scales = item.scales(whole)
    touched = item.changes(scales, whole)
    if not bool(touched.any()):
        return out, 0
    base = scales[..., 0]
    result = out.clone()
    delta = (base - 1)[..., None] * result[:, rows].float().transpose(1, 2)
    for g in range(1, edit.segments):
        delta = delta + ((scales[..., g] - base) * masses[g - 1])[..., None] * outputs[g - 1].float()
    result[:, rows] = (result[:, rows].float() + delta.transpose(1, 2)).to(out.dtype)
    return result, int(touched.sum())


__all__ = [
    "Call",
    "Gated",
    "Labelled",
    "Remembered",
    "RowMap",
    "edit_decode",
    "edit_rows",
    "edit_weights",
    "fused_inputs",
]
