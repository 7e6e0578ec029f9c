"""How one attention call is executed: which rows are recomputed exactly, and what is merged into the fused output.

Plans (spec names): P0 head scale lives at ``o_proj`` (see :mod:`vlm_attn.session`). P1/P2: a few rows are computed
exactly and their change is added to the fused output. P3: for long text after the image in unpadded causal prompts,
segments come from LSE-returning fused attention and are merged, so that no block of weights is ever held.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..stages import SegmentEdit
from . import masks, segments
from .rows import chunks, row_outputs, row_weights

# From this many edited rows on, the LSE route costs less memory than exact rows at equal work.
FUSED_ROWS = 512


@dataclass(frozen=True)
class Call:
    """One attention call: rotated ``query [B, H, Q, d]``, ``key``/``value [B, Hkv, N, d]``, the backend's mask."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Any
    scaling: float
    causal: bool
    softcap: float | None
    bias: Tensor | None

    @property
    def queries(self) -> int:
        """Number of query rows."""
        return self.query.shape[2]

    @property
    def keys(self) -> int:
        """Number of keys."""
        return self.key.shape[2]

    def weights(self, rows: Tensor) -> Tensor:
        """Exact fp32 weights ``[B, H, R, N]`` of the query rows ``rows [R]``, biases included."""
        mask = masks.row_bias(
            self.mask, rows, self.query.shape[0], self.queries, self.keys, self.query.device, self.causal
        )
        query = self.query.index_select(2, rows)
        bias = None if self.bias is None else self.bias[:, :, None, :]
        return row_weights(query, self.key, self.scaling, mask, bias, self.softcap)


def with_bias(call: Call, backend: str) -> tuple[Tensor, Tensor, Tensor, Any]:
    """Arguments ``(query, key, value, mask)`` that make a plain attention function add ``call.bias``.

    Few rows and the eager backend: an additive mask. Otherwise the augmented dimension: ``q~ = [q, 1]`` and
    ``k~ = [k, bias / scaling]``, so that fused kernels need no mask; the output is sliced back to ``d``.
    """
    bias = call.bias
    if bias is None:
        return call.query, call.key, call.value, call.mask
    b, h, q, d = call.query.shape
    if backend == "eager" or q == 1 or call.softcap is not None:
        rows = torch.arange(q, device=call.query.device)
        mask = masks.row_bias(call.mask, rows, b, q, call.keys, call.query.device, call.causal)
        total = bias[:, :, None, :] if mask is None else mask + bias[:, :, None, :]
        return call.query, call.key, call.value, total.expand(b, h, q, -1).to(call.query.dtype)
    kv = call.key.shape[1]
    if bias.shape[1] not in (1, kv):
        raise ValueError(
            "a per-head key bias inside a key/value group needs the eager backend; use one bias per group"
        )
    extra = 8
    query = torch.nn.functional.pad(call.query, (0, extra))
    query[..., d] = 1.0
    key = torch.nn.functional.pad(call.key, (0, extra))
    key[..., d] = (bias / call.scaling).to(key.dtype)
    return query, key, torch.nn.functional.pad(call.value, (0, extra)), call.mask


@dataclass(frozen=True)
class Labelled:
    """An edit with the labels of one layer's prompt keys (uint8 ``[B, n]``; later keys have label 0).

    ``members`` fp32 ``[B, 1, n, G]`` is the one-hot form, ``counts`` fp32 ``[B, G]`` the segment sizes.
    """

    edit: SegmentEdit
    labels: Tensor
    members: Tensor
    counts: Tensor

    @classmethod
    def of(cls, edit: SegmentEdit, labels: Tensor) -> Labelled:
        """Computes the derived forms once."""
        members = torch.nn.functional.one_hot(labels.long(), edit.segments).float()
        return cls(edit, labels, members[:, None], members.sum(1))

    def apply(self, weights: Tensor, active: Tensor) -> Tensor:
        """The weights ``[B, H, R, N]`` after the edit, in the rows where ``active [B, 1, R, 1]``."""
        n = self.labels.shape[1]
        prompt = weights[..., :n]
        scales = torch.where(active, self.edit.scales(prompt @ self.members, self.counts), 1.0)
        edited = prompt * (scales @ self.members.transpose(2, 3))
        return edited if n == weights.shape[-1] else torch.cat([edited, weights[..., n:]], dim=-1)


def edit_decode(call: Call, gate: Tensor, edits: Sequence[Labelled]) -> tuple[Tensor | None, int]:
    """Plan P1: the one new row is computed exactly, edited, and used as it is; no fused call runs beside it.

    Args:
        gate: bool ``[B]``, the samples that count.

    Returns:
        output ``[B, 1, H, d]``, or None where no weight changes (the caller then runs the backend), and the number
        of (sample, head) pairs that were edited.
    """
    weights = call.weights(torch.zeros(1, dtype=torch.long, device=call.query.device))
    current = weights
    for item in edits:
        current = item.apply(current, gate[:, None, None, None])
    edited = int(current.ne(weights).any(-1).sum())
    if edited == 0:
        return None, 0
    return row_outputs(current, call.value).transpose(1, 2).to(call.query.dtype).contiguous(), edited


def edit_rows(call: Call, out: Tensor, rows: Tensor, gate: Tensor, edits: Sequence[Labelled]) -> tuple[Tensor, int]:
    """Applies segment edits to some rows of a fused output.

    Args:
        out: ``[B, Q, H, d]`` output of the untouched attention.
        rows: query rows ``[R]`` to look at.
        gate: bool ``[B, R]``, the rows that count in each sample.
        edits: labelled edits in composition order.

    Returns:
        The output and the number of (sample, head, row) triples that were edited.
    """
    plain = call.mask is None and call.causal and call.bias is None and call.softcap is None
    if plain and call.queries == call.keys and rows.numel() >= FUSED_ROWS and len(edits) == 1 and bool(gate.all()):
        return _edit_fused(call, out, rows, edits[0])
    edited = 0
    batch, heads = call.query.shape[:2]
    result: Tensor | None = None
    start = 0
    for part in chunks(rows, batch, heads, call.keys):
        weights = call.weights(part)
        active = gate[:, None, start : start + part.numel(), None]
        start += part.numel()
        current = weights
        for item in edits:
            current = item.apply(current, active)
        change = current - weights
        touched = change.ne(0).any(-1)
        if bool(touched.any()):
            edited += int(touched.sum())
            result = out.clone() if result is None else result
            delta = row_outputs(change, call.value).transpose(1, 2)
            result[:, part] = (result[:, part].float() + delta).to(out.dtype)
    return (out if result is None else result), edited


def _edit_fused(call: Call, out: Tensor, rows: Tensor, item: Labelled) -> tuple[Tensor, int]:
    """Plan P3: ``O' = O + sum_g (s_g - 1) M_g O_g`` with (O_g, L_g) of the gathered segments and L of all keys."""
    edit, labels, counts = item.edit, item.labels, item.counts
    query = call.query.index_select(2, rows)
    _, lse = segments.attend(call.query, call.key, call.value, call.scaling, causal=True)
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
    scales = edit.scales(torch.cat([rest, segment_mass], dim=-1), counts)
    touched = (scales[..., 1:] != 1).any(-1)
    if not bool(touched.any()):
        return out, 0
    delta = sum(
        ((scales[..., g + 1] - 1) * masses[g])[..., None] * outputs[g].float() for g in range(edit.segments - 1)
    )
    result = out.clone()
    result[:, rows] = (result[:, rows].float() + delta.transpose(1, 2)).to(out.dtype)  # type: ignore[union-attr]
    return result, int(touched.sum())
