"""One attention call as data, and its exact rows: logits with everything that enters before the softmax."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import masks
from .rows import row_logits

Run = Callable[[Tensor, Tensor, Tensor, Any], tuple[Tensor, Tensor | None]]
"""The backend's own attention on ``(query, key, value, mask)``: output ``[B, Q, H, d]`` and weights or None."""


@dataclass(frozen=True, eq=False)
class RowMap:
    """``z' = scale_j z + boost_j |z|`` in chosen rows.

    Attributes:
        scale, boost: fp32 ``[B, N]`` over the keys of the call, None = 1 and 0.
        gate: bool ``[B, Q]``, the rows it acts in.
        everywhere: it acts in every row, so that scaled keys can stand for it.
    """

    scale: Tensor | None
    boost: Tensor | None
    gate: Tensor
    everywhere: bool = False

    def apply(self, logits: Tensor, rows: Tensor | None, index: Tensor | None = None) -> Tensor:
        """Logits ``[B, H, R, N]`` of the query rows ``rows [R]`` (None = all) after the map; ``index [B, H, N]`` picks
        keys."""
        out = logits
        if self.scale is not None:
            out = out * _per_key(self.scale, index)
        if self.boost is not None:
            out = out + _per_key(self.boost, index) * logits.abs()
        gate = self.gate if rows is None else self.gate[:, rows]
        return torch.where(gate[:, None, :, None], out, logits)


def _per_key(x: Tensor, index: Tensor | None) -> Tensor:
    """``[B, N]`` as ``[B, 1, 1, N]``, or gathered at ``index [B, H, S]`` as ``[B, H, 1, S]``."""
    if index is None:
        return x[:, None, None, :]
    return x[:, None, :].expand(-1, index.shape[1], -1).gather(2, index)[:, :, None, :]


@dataclass(frozen=True)
class Call:
    """One attention call: rotated ``query [B, H, Q, d]``, ``key``/``value [B, Hkv, N, d]``, the backend's mask.

    Attributes:
        bias: fp32 ``[B, H or 1, N]`` added to the logits of every row.
        backend: name of the backend whose mask this is.
        maps: logit maps, applied before bias and mask.
        lse: fp32 ``[B, H, Q]`` of every row over what it attends to, where the attention that ran returned it.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Any
    scaling: float
    causal: bool
    softcap: float | None
    bias: Tensor | None
    backend: str = "sdpa"
    maps: tuple[RowMap, ...] = ()
    lse: Tensor | None = None

    @property
    def queries(self) -> int:
        """Number of query rows."""
        return self.query.shape[2]

    @property
    def keys(self) -> int:
        """Number of keys."""
        return self.key.shape[2]

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.query.shape[1] // self.key.shape[1]

    @property
    def plain(self) -> bool:
        """Unpadded, causal over the whole square, nothing added to the logits."""
        bare = self.mask is None and self.bias is None and self.softcap is None and not self.maps
        return bare and self.causal and self.queries == self.keys

    @property
    def folded(self) -> tuple[RowMap, ...]:
        """The maps that the backend itself can run, as scaled keys."""
        return tuple(m for m in self.maps if m.everywhere and m.boost is None and self.softcap is None)

    @property
    def pending(self) -> tuple[RowMap, ...]:
        """The maps that only exact rows can apply."""
        return tuple(m for m in self.maps if m not in self.folded)

    def visible(self, rows: Tensor) -> Tensor:
        """bool ``[B or 1, H or 1, R, N]``: the keys that the query rows ``rows [R]`` may attend to."""
        return masks.visible(
            self.mask, rows, self.query.shape[0], self.queries, self.keys, self.query.device, self.causal
        )

    def heads(self, heads: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value of some query heads, in ascending order, with one key/value head each; None = as is."""
        if heads is None or (len(heads) == self.key.shape[1] and self.group == 1):  # every head has its own
            return self.query, self.key, self.value
        shared = torch.div(heads, self.group, rounding_mode="floor")
        return self.query[:, heads], self.key[:, shared], self.value[:, shared]

    def scores(self, rows: Tensor | None, heads: Tensor | None = None) -> Tensor:
        """fp32 ``[B, H, R, N]`` of the query rows ``rows [R]`` (None = all) before maps, biases and mask."""
        query, key, _ = self.heads(heads)
        query = query if rows is None else query.index_select(2, rows)
        return row_logits(query, key, self.scaling, self.softcap)

    def logits(self, rows: Tensor | None, heads: Tensor | None = None, maps: Sequence[RowMap] | None = None) -> Tensor:
        """Exact fp32 logits ``[B, H, R, N]`` of the query rows ``rows [R]`` (None = all): softcap, maps, biases, mask.

        Args:
            maps: the maps to apply, all of them by default.
        """
        logits = self.scores(rows, heads)
        return self.finish(logits, rows, heads, maps)

    def finish(
        self, logits: Tensor, rows: Tensor | None, heads: Tensor | None = None, maps: Sequence[RowMap] | None = None
    ) -> Tensor:
        """Adds to :meth:`scores` what :meth:`logits` says."""
        for item in self.maps if maps is None else maps:
            logits = item.apply(logits, rows)
        if self.bias is not None:
            bias = self.bias if heads is None or self.bias.shape[1] == 1 else self.bias[:, heads]
            logits = logits + bias[:, :, None, :]
        mask = masks.row_bias(
            self.mask, rows, self.query.shape[0], self.queries, self.keys, self.query.device, self.causal
        )
        return logits if mask is None else logits + mask

    def weights(
        self, rows: Tensor | None, heads: Tensor | None = None, maps: Sequence[RowMap] | None = None
    ) -> Tensor:
        """Exact fp32 weights ``[B, H, R, N]`` of the query rows ``rows [R]`` (None = all)."""
        return self.logits(rows, heads, maps).softmax(-1)


def fused_inputs(call: Call) -> tuple[Tensor, Tensor, Tensor, Any]:
    """``(query, key, value, mask)`` with which the backend adds ``call.bias`` and runs the ``call.folded`` maps.

    Maps: the keys are scaled on the fly. Bias in few rows and in the eager backend: an additive mask. Otherwise the
    augmented dimensions ``q~ = [q, e_m]``, ``k~ = [k, b / c]`` with one dimension per query head m of a key/value
    group, so that fused kernels need no mask; the output must be sliced back to ``d``.
    """
    query, key, value, mask = call.query, call.key, call.value, call.mask
    for item in call.folded:
        if item.scale is not None:
            key = (key.float() * item.scale[:, None, :, None]).to(key.dtype)
    bias = call.bias
    if bias is None:
        return query, key, value, mask
    b, h, q, d = query.shape
    if call.backend == "eager" or q == 1 or call.softcap is not None:
        rows = torch.arange(q, device=query.device)
        added = masks.row_bias(mask, rows, b, q, call.keys, query.device, call.causal)
        total = bias[:, :, None, :] if added is None else added + bias[:, :, None, :]
        return query, key, value, total.expand(b, h, q, -1).to(query.dtype)
    kv, group = key.shape[1], call.group if bias.shape[1] > 1 else 1
    extra = -(-group // 8) * 8
    member = torch.arange(h, device=query.device) % group
    query = torch.nn.functional.pad(query, (0, extra))
    query[:, torch.arange(h, device=query.device), :, d + member] = 1.0
    key = torch.nn.functional.pad(key, (0, extra))
    per_member = bias.expand(b, kv * group, -1).reshape(b, kv, group, -1) if group > 1 else bias[:, :, None, :]
    key[..., d : d + group] = (per_member / call.scaling).transpose(2, 3).to(key.dtype)
    return query, key, torch.nn.functional.pad(value, (0, extra)), mask
