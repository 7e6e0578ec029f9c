"""The few tensor operations that deserve a kernel, each with a torch reference, dispatched by device.

Two operators live in the torch library namespace ``vlm_attn``: :func:`key_mass` (how much attention each key receives
from chosen rows) and :func:`segment_attention` (attention over labelled keys, with per-segment log-sum-exp and an
optional move of mass between segments). The reference works row chunk by row chunk on any device and holds no full
matrix of weights. A package of kernels offers an entry point in the group ``vlm_attn.kernels`` named after a device
type (``cuda``): a function that takes the device type and calls :func:`register_kernels`. It is loaded when the first
tensor of that device arrives; where it cannot be imported, a warning says so and the reference runs.

Shapes: ``B`` samples, ``H`` query heads, ``Hkv`` key/value heads (query head h reads ``h // (H / Hkv)``), ``Q`` query
rows, ``N`` keys, ``d`` head dimension. Queries are the last ``Q`` of the ``N`` positions: row i stands at position
``N - Q + i`` and, if causal, sees keys up to there. Logits, sums and LSE (natural logarithm) are fp32 throughout. No
gradients.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import NamedTuple

import torch
from torch import Tensor

from .attention.rows import blocks, chunks, row_logits, row_outputs

GROUP = "vlm_attn.kernels"
TEXT, TEXT_SINK, VISUAL, VISUAL_SINK = range(4)
LABELS = 4
PAD = 255
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
INF = float("inf")
_ACCELERATED: set[str] = set()
_references = False

torch.library.define(
    "vlm_attn::key_mass",
    "(Tensor query, Tensor key, Tensor? rows, float scaling, Tensor? lse, Tensor? key_mask, Tensor? gate, "
    "bool causal, bool reduce_heads) -> Tensor",
)
torch.library.define(
    "vlm_attn::segment_attention",
    "(Tensor query, Tensor key, Tensor value, Tensor labels, float scaling, Tensor? active, bool causal, "
    "int donors, int receivers, int gate, float keep, float gate_min, float share_min) -> (Tensor, Tensor, Tensor)",
)


@dataclass(frozen=True)
class Mix:
    """Moves attention mass between segments, per head and row, where a gate on the masses opens.

    Donors keep the share ``keep`` of their weights; the rest goes to the receivers in proportion to their weights, or
    is dropped if there are none: with the donors' mass and normalised output ``M_D, O_D``, the receivers' ``M_R, O_R``
    and the mass ``M_G`` of the gate's labels,

        ``O' = O + [M_G >= gate_min][M_R >= share_min M_G] (1 - keep) M_D (O_R - O_D)``

    A row whose receivers hold no mass stays as it is. VAR: donors (text-sink, visual-sink), receivers (visual), gate
    (visual, visual-sink). ACT with known sinks: donors the sinks, receivers all other labels. AD-HH: donors the text
    labels, no receivers, ``keep=0``.

    Attributes:
        donors, receivers: disjoint labels 0..3. keep: share of their weight that donors keep, 0..1 (1 = no change).
        gate: labels whose joint mass is tested, by default the donors'.
        gate_min: least mass of the gate's labels. share_min: least share of it that the receivers hold.
    """

    donors: tuple[int, ...]
    receivers: tuple[int, ...] = ()
    keep: float = 0.0
    gate: tuple[int, ...] | None = None
    gate_min: float = 0.0
    share_min: float = 0.0

    def __post_init__(self) -> None:
        named = (*self.donors, *self.receivers, *(self.gate or ()))
        if not all(label in range(LABELS) for label in named):
            raise ValueError(f"labels of a mix are 0..{LABELS - 1}; got {self}")
        if not self.donors or set(self.donors) & set(self.receivers):
            raise ValueError(f"a mix needs donors, and no label can be donor and receiver; got {self}")
        if not 0 <= self.keep <= 1:
            raise ValueError(f"keep={self.keep} must lie in 0..1")

    def open(self, segment_lse: Tensor, active: Tensor | None = None) -> Tensor:
        """bool ``[B, H, Q]``: the (head, row) pairs the mix changes, from ``segment_lse [B, H, Q, 4]``."""
        return _gate(_masses(segment_lse), *self.masks()[1:], self.gate_min, self.share_min, active)

    def masks(self) -> tuple[int, int, int]:
        """Donors, receivers and gate as bit masks over the labels."""
        return _bits(self.donors), _bits(self.receivers), _bits(self.donors if self.gate is None else self.gate)


class SegmentAttention(NamedTuple):
    """``output [B, H, Q, d]`` in the query's dtype, ``lse [B, H, Q]`` and ``segment_lse [B, H, Q, 4]`` in fp32.

    A segment without visible keys has LSE -inf; a row without visible keys has output 0 and LSE -inf. ``exp(
    segment_lse - lse)`` are the masses before any mix.
    """

    output: Tensor
    lse: Tensor
    segment_lse: Tensor


def key_mass(
    query: Tensor,
    key: Tensor,
    rows: Tensor | None,
    scaling: float,
    lse: Tensor | None = None,
    key_mask: Tensor | None = None,
    causal: bool = True,
    reduce_heads: bool = False,
    *,
    gate: Tensor | None = None,
) -> Tensor:
    """Attention each key receives: ``mass_j = sum_i exp(scaling <q_i, k_j> - L_i)`` over chosen rows i.

    Rows x keys never exist in memory on a device with kernels. Divide by the number of rows (or of rows that see the
    key) for means.

    Args:
        query: ``[B, H, Q, d]``, rotated; key: ``[B, Hkv, N, d]``; fp16, bf16 or fp32.
        rows: int ``[R]``, rows 0..Q-1 of the query, the same for all samples; None for all. Checked where they lie on
            the CPU; out-of-range rows on another device count nothing.
        lse: fp32 ``[B, H, Q]``, the LSE of the rows over everything they attend to; computed if not given.
        key_mask: bool ``[B, N]``, False hides a key (padding).
        causal: whether rows see only keys up to their own position.
        reduce_heads: sum over the query heads.
        gate: bool ``[B, R]``, False leaves a row out in that sample (rows of padding, say).

    Returns:
        fp32 ``[B, H, N]``, or ``[B, N]`` with ``reduce_heads``. Rows that see no key add nothing.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit together.
    """
    b, h, q, n = _check(query, key, causal)
    if rows is not None:
        _check_rows(rows, q)
        rows = rows.to(query.device)
    r = q if rows is None else rows.numel()
    _expect("lse", lse, (b, h, q), torch.float32)
    _expect("key_mask", key_mask, (b, n), torch.bool)
    _expect("gate", gate, (b, r), torch.bool)
    if 0 in (b, h, r, n):
        return query.new_zeros((b, n) if reduce_heads else (b, h, n), dtype=torch.float32)
    run = torch.ops.vlm_attn.key_mass if _with_kernels(query.device.type) else key_mass_reference
    return run(query, key, rows, scaling, lse, key_mask, gate, causal, reduce_heads)


def segment_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    labels: Tensor,
    scaling: float,
    mix: Mix | None = None,
    causal: bool = True,
    *,
    active: Tensor | None = None,
) -> SegmentAttention:
    """Attention over labelled keys in one pass: output, LSE, LSE of every segment, and a gated move of mass.

    Args:
        query: ``[B, H, Q, d]``; key, value: ``[B, Hkv, N, d]``; fp16, bf16 or fp32, one dtype.
        labels: uint8 ``[B, n]`` or per head ``[B, H, n]``, n <= N: 0..3 (by convention ``TEXT, TEXT_SINK, VISUAL,
            VISUAL_SINK``); any other value (``PAD``) hides the key. Keys from n on have label 0: generated tokens.
        mix: what to move between the segments; None for plain attention.
        causal: whether rows see only keys up to their own position.
        active: bool, broadcastable to ``[B, H, Q]``: heads and rows that the mix may change; None for all.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit together.
    """
    b, h, q, n = _check(query, key, causal)
    if value.shape != key.shape or value.dtype != key.dtype:
        raise ValueError(f"value {value.dtype} {list(value.shape)} must be like key {key.dtype} {list(key.shape)}")
    if labels.dtype != torch.uint8 or tuple(labels.shape[:-1]) not in ((b,), (b, h)) or labels.shape[-1] > n:
        raise ValueError(
            f"labels must be uint8 [{b}, n] or [{b}, {h}, n] with n <= {n}; got {labels.dtype} {list(labels.shape)}"
        )
    if active is not None:
        if active.dtype != torch.bool:
            raise TypeError(f"active must be bool, got {active.dtype}")
        active = active.expand(b, h, q)
    if 0 in (b, h, q, n):
        lse = query.new_full((b, h, q), -INF, dtype=torch.float32)
        return SegmentAttention(torch.zeros_like(query), lse, lse[..., None].repeat(1, 1, 1, LABELS))
    run = torch.ops.vlm_attn.segment_attention if _with_kernels(query.device.type) else segment_attention_reference
    masks = (0, 0, 0) if mix is None else mix.masks()
    keep, gate_min, share_min = (1.0, 0.0, 0.0) if mix is None else (mix.keep, mix.gate_min, mix.share_min)
    return SegmentAttention(
        *run(query, key, value, labels, scaling, active, causal, *masks, keep, gate_min, share_min)
    )


# ------------------------------------------------------------------------------------------------------- devices


def register_kernels(device: str, **implementations: Callable[..., object]) -> None:
    """Makes functions the implementations of operators on one device type.

    Args:
        device: device type, such as ``"cuda"``.
        implementations: ``key_mass=`` and / or ``segment_attention=``, with the parameters of their references
            :func:`key_mass_reference`, :func:`segment_attention_reference`. Inputs were checked and are not empty.
    """
    if implementations:
        _ACCELERATED.add(device)
    for name, function in implementations.items():
        torch.library.impl(f"vlm_attn::{name}", device, function)


def accelerated(device: str) -> bool:
    """Whether kernels run on a device type (loads them if they are installed)."""
    return _with_kernels(device) and device in _ACCELERATED


@contextmanager
def references() -> Iterator[None]:
    """Inside, the torch references run on every device: to compare them with the kernels, or to look for a fault."""
    global _references
    before, _references = _references, True
    try:
        yield
    finally:
        _references = before


def _with_kernels(device: str) -> bool:
    """Whether kernels may run; loads those of the device."""
    if _references:
        return False
    load_kernels(device)
    return True


@functools.cache
def load_kernels(device: str) -> None:
    """Loads (once) the installed kernels for a device type; warns where they cannot be imported."""
    for point in entry_points(group=GROUP, name=device):
        try:
            register = point.load()
        except ImportError as error:
            warnings.warn(
                f"no kernels on {device}: {error}; the slower torch reference runs instead "
                "(pip install 'vlm-attn[gpu]' brings them)",
                stacklevel=3,
            )
        else:
            register(device)


# ---------------------------------------------------------------------------------------------------- references


def key_mass_reference(
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
    """:func:`key_mass` in torch, block by block of heads and rows."""
    (b, h, q, _), (_, kv, n, _) = query.shape, key.shape
    group = h // kv
    rows = torch.arange(q, device=query.device) if rows is None else rows
    gates = torch.ones(b, len(rows), dtype=torch.bool, device=query.device) if gate is None else gate
    total = query.new_zeros((b, h, n), dtype=torch.float32)
    for held, listed in blocks(len(rows), kv, b * group * n, query.device):
        heads, part, counted = slice(held.start * group, held.stop * group), rows[listed], gates[:, listed]
        seen = n - q + int(part.max()) + 1 if causal else n
        logits = row_logits(query[:, heads].index_select(2, part), key[:, held, :seen], scaling)
        # Keys before the first row's own position are hidden from none of the rows, unless they are padding.
        first = 0 if key_mask is not None else n - q + int(part.min()) + 1 if causal else n
        hidden = _hidden(part + n - q, first, seen, causal, key_mask)
        logits[..., first:].masked_fill_(hidden, -INF)
        if lse is None and key_mask is None:  # every row sees itself
            weights = logits.softmax(-1)
        else:
            norm = logits.logsumexp(-1) if lse is None else lse[:, heads].index_select(2, part)
            norm = norm.masked_fill(norm.isinf() | ~counted[:, None], INF)  # what is not counted may hold anything
            weights = logits.sub_(norm[..., None]).exp_()
        total[:, heads, :seen] += (counted[:, None, None].float() @ weights)[:, :, 0]
    return total.sum(1) if reduce_heads else total


def segment_attention_reference(
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
    """:func:`segment_attention` in torch, row chunk by row chunk; label sets are bit masks."""
    (b, h, q, _), n = query.shape, key.shape[2]
    labels = labels if labels.ndim == 3 else labels[:, None]
    labels = torch.nn.functional.pad(labels, (0, n - labels.shape[-1]))[:, :, None]
    members = [labels == label for label in range(LABELS)]
    output, segment_lse = torch.empty_like(query), query.new_empty((b, h, q, LABELS), dtype=torch.float32)
    for part in chunks(torch.arange(q, device=query.device), b, h, n):
        logits = row_logits(query.index_select(2, part), key, scaling)
        logits.masked_fill_(_hidden(part + n - q, 0, n, causal, None) | (labels >= LABELS), -INF)
        segments = torch.stack([logits.where(m, -INF).logsumexp(-1) for m in members], dim=-1)
        lse = segments.logsumexp(-1)
        weights = logits.sub_(lse.masked_fill(lse.isinf(), 0.0)[..., None]).exp_()
        if donors:
            masses = _masses(segments)
            opened = _gate(
                masses, receivers, gate, gate_min, share_min, None if active is None else active.index_select(2, part)
            )
            taken = (1 - keep) * opened * _pick(masses, donors)
            gain = taken / _pick(masses, receivers).clamp(min=torch.finfo(torch.float32).tiny)
            loss = (1 - keep) * opened
            for label, member in enumerate(members):
                change = gain if receivers >> label & 1 else -loss if donors >> label & 1 else None
                if change is not None:
                    weights = torch.where(member, weights * (1 + change[..., None]), weights)
        output[:, :, part] = row_outputs(weights, value).to(query.dtype)
        segment_lse[:, :, part] = segments
    return output, segment_lse.logsumexp(-1), segment_lse


def _hidden(positions: Tensor, first: int, end: int, causal: bool, key_mask: Tensor | None) -> Tensor:
    """bool, broadcastable to ``[B, H, R, end - first]``: which of these keys rows at ``positions [R]`` do not see."""
    hidden = torch.zeros(1, 1, 1, end - first, dtype=torch.bool, device=positions.device)
    if causal:
        hidden = (torch.arange(first, end, device=positions.device) > positions[:, None])[None, None]
    return hidden if key_mask is None else hidden | ~key_mask[:, None, None, first:end]


def _masses(segment_lse: Tensor) -> Tensor:
    """fp32 ``[..., 4]`` shares of the rows' weight; 0 in rows that see nothing."""
    lse = segment_lse.logsumexp(-1, keepdim=True)
    return (segment_lse - lse.masked_fill(lse.isinf(), 0.0)).exp()


def _bits(labels: tuple[int, ...]) -> int:
    return sum(1 << label for label in set(labels))


def _pick(masses: Tensor, mask: int) -> Tensor:
    """Joint mass of the labels in a bit mask."""
    return masses[..., [label for label in range(LABELS) if mask >> label & 1]].sum(-1)


def _gate(
    masses: Tensor, receivers: int, gate: int, gate_min: float, share_min: float, active: Tensor | None
) -> Tensor:
    tested = _pick(masses, gate)
    opened = tested >= gate_min
    if receivers:
        received = _pick(masses, receivers)
        opened &= (received > 0) & (received >= share_min * tested)
    return opened if active is None else opened & active


def _check(query: Tensor, key: Tensor, causal: bool) -> tuple[int, int, int, int]:
    if query.ndim != 4 or key.ndim != 4:
        raise ValueError(f"query and key must be [B, heads, length, d]; got {list(query.shape)}, {list(key.shape)}")
    (b, h, q, d), (kb, kv, n, kd) = query.shape, key.shape
    if kb != b or kd != d or kv == 0 or h % kv:
        raise ValueError(
            f"query {list(query.shape)} and key {list(key.shape)} do not fit: the same batch and head dimension, and "
            "a number of query heads that is a multiple of the key heads, are needed"
        )
    if query.dtype != key.dtype or query.dtype not in DTYPES:
        raise TypeError(f"query and key must share one of {DTYPES}; got {query.dtype} and {key.dtype}")
    if causal and q > n:
        raise ValueError(f"causal attention of {q} rows needs at least as many keys; got {n}")
    return b, h, q, n


def _check_rows(rows: Tensor, queries: int) -> None:
    if rows.ndim != 1 or rows.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"rows must be an integer vector [R], got {rows.dtype} {list(rows.shape)}")
    # Values on another device, or of traced tensors, stay unread.
    if type(rows) is Tensor and rows.device.type == "cpu" and rows.numel():
        least, most = int(rows.min()), int(rows.max())
        if least < 0 or most >= queries:
            raise ValueError(f"rows {least}..{most} are not all in 0..{queries - 1}")


def _expect(name: str, tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tensor is not None and (tuple(tensor.shape) != shape or tensor.dtype != dtype):
        raise ValueError(f"{name} must be {dtype} {list(shape)}; got {tensor.dtype} {list(tensor.shape)}")


torch.library.impl("vlm_attn::key_mass", "default", key_mass_reference)
torch.library.impl("vlm_attn::segment_attention", "default", segment_attention_reference)


@torch.library.register_fake("vlm_attn::key_mass")
def _key_mass_shape(  # type: ignore[no-untyped-def]
    query, key, rows, scaling, lse, key_mask, gate, causal, reduce_heads
) -> Tensor:
    b, h, n = query.shape[0], query.shape[1], key.shape[2]
    return query.new_empty((b, n) if reduce_heads else (b, h, n), dtype=torch.float32)


@torch.library.register_fake("vlm_attn::segment_attention")
def _segment_attention_shape(  # type: ignore[no-untyped-def]
    query, key, value, labels, scaling, active, causal, donors, receivers, gate, keep, gate_min, share_min
) -> tuple[Tensor, Tensor, Tensor]:
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    return torch.empty_like(query), lse, lse.new_empty((*lse.shape, LABELS))
