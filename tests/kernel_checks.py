"""Dense fp64 definitions of the operators, and comparisons with them, for the interpreter, CUDA and the references.

Everything here holds full matrices of weights and shares no code with the operators.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlm_attn import ops

INF = float("inf")
VAR = ops.Mix(
    donors=(ops.TEXT_SINK, ops.VISUAL_SINK),
    receivers=(ops.VISUAL,),
    keep=0.6,
    gate=(ops.VISUAL, ops.VISUAL_SINK),
    gate_min=0.2,
    share_min=0.5,
)
ACT = ops.Mix(donors=(1, 3), receivers=(0, 2), keep=0.4)
ADHH = ops.Mix(donors=(0, 1), gate_min=0.4)
MIXES = {"none": None, "var": VAR, "act": ACT, "adhh": ADHH}


@dataclass(frozen=True)
class Case:
    """Sizes of one problem; ``hide`` is the share of keys that padding hides, ``spread`` the size of the logits."""

    batch: int = 1
    kv_heads: int = 2
    group: int = 1
    queries: int = 20
    keys: int = 40
    head_dim: int = 64
    dtype: torch.dtype = torch.float32
    causal: bool = True
    hide: float = 0.2
    spread: float = 1.0
    seed: int = 0

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group

    @property
    def scaling(self) -> float:
        return self.spread * self.head_dim**-0.5


@dataclass(frozen=True)
class Inputs:
    """Tensors of a case: strided as the models give them (heads inside positions), left padding and a few holes."""

    case: Case
    query: Tensor
    key: Tensor
    value: Tensor
    key_mask: Tensor
    labels: Tensor
    active: Tensor
    rows: Tensor
    gate: Tensor

    @classmethod
    def of(cls, case: Case, device: str = "cpu", per_head: bool = False) -> Inputs:
        generator = torch.Generator().manual_seed(case.seed)

        def normal(heads: int, length: int, scale: float = 1.0) -> Tensor:
            shape = (case.batch, length, heads, case.head_dim)
            return (scale * torch.randn(shape, generator=generator)).to(case.dtype).transpose(1, 2).to(device)

        def share(*shape: int) -> Tensor:
            return torch.rand(shape, generator=generator)

        query, key = normal(case.heads, case.queries), normal(case.kv_heads, case.keys)
        value = normal(case.kv_heads, case.keys, 0.3)
        pads = (share(case.batch, 1) * 2 * case.hide * case.keys).long()
        mask = (torch.arange(case.keys) >= pads) & (share(case.batch, case.keys) >= case.hide / 4)
        shape = (case.batch, case.heads, case.keys) if per_head else (case.batch, case.keys)
        labels = torch.randint(0, 4, shape, generator=generator).to(torch.uint8)
        # runs of one label, as in a prompt: tiles of pure text and pure picture occur
        labels[..., : case.keys // 2] = torch.where(share(*labels[..., : case.keys // 2].shape) < 0.03, 3, 2)
        labels[~(mask if not per_head else mask[:, None].expand(shape))] = ops.PAD
        rows = torch.randperm(case.queries, generator=generator)[: max(1, case.queries // 2)]
        active = share(case.batch, 1, case.queries) > 0.2
        gate = share(case.batch, len(rows)) > 0.2
        return cls(case, query, key, value, *(x.to(device) for x in (mask, labels, active, rows, gate)))


def logits(x: Inputs, visible: Tensor) -> Tensor:
    """fp64 ``[B, H, Q, N]``, -inf at keys that are hidden; ``visible`` broadcasts to it."""
    case = x.case
    key = x.key.double().repeat_interleave(case.group, dim=1)
    z = x.query.double() @ key.transpose(2, 3) * case.scaling
    if case.causal:
        n = torch.arange(case.keys, device=z.device)
        visible = visible & (n <= n[case.keys - case.queries :, None])
    return z.masked_fill(~visible, -INF)


def dense_mass(x: Inputs, rows: Tensor | None, gate: Tensor | None, masked: bool) -> tuple[Tensor, Tensor]:
    """Mass ``[B, H, N]`` and the LSE ``[B, H, Q]``."""
    visible = x.key_mask if masked else torch.ones_like(x.key_mask)
    z = logits(x, visible[:, None, None])
    weights = torch.nan_to_num(z.softmax(-1))
    rows = torch.arange(x.case.queries, device=z.device) if rows is None else rows
    counted = torch.ones(x.case.batch, len(rows), device=z.device) if gate is None else gate
    return torch.einsum("bhrn,br->bhn", weights[:, :, rows], counted.double()), z.logsumexp(-1)


def dense_segments(x: Inputs, mix: ops.Mix | None, active: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, LSE, LSE of the labels, and how far every row's gate is from its thresholds (inf where it has none)."""
    labels = (x.labels if x.labels.ndim == 3 else x.labels[:, None])[:, :, None]
    z = logits(x, labels < 4)
    weights = torch.nan_to_num(z.softmax(-1))
    segment = torch.stack([z.masked_fill(labels != g, -INF).logsumexp(-1) for g in range(4)], -1)
    margin = torch.full(z.shape[:3], INF, device=z.device, dtype=z.dtype)
    if mix is not None:

        def mass(wanted: tuple[int, ...]) -> Tensor:
            return sum(torch.where(labels == g, weights, 0.0).sum(-1) for g in wanted)  # type: ignore[return-value]

        tested = mass(mix.gate or mix.donors)
        chosen = tested >= mix.gate_min
        margin = (tested - mix.gate_min).abs() if mix.gate_min else margin
        given, received = mass(mix.donors), mass(mix.receivers) if mix.receivers else torch.ones_like(tested)
        if mix.receivers:
            chosen &= (received > 0) & (received >= mix.share_min * tested)
            if mix.share_min:
                margin = torch.minimum(margin, (received - mix.share_min * tested).abs())
        if active is not None:
            chosen &= active
        factors = torch.ones_like(weights)
        for g in range(4):
            factor = torch.ones_like(tested)
            if g in mix.donors:
                factor = torch.full_like(tested, mix.keep)
            elif g in mix.receivers:
                factor = 1 + (1 - mix.keep) * given / received.clamp(min=1e-300)
            factors = torch.where((labels == g) & chosen[..., None], factor[..., None], factors)
        weights = weights * factors
    value = x.value.double().repeat_interleave(x.case.group, dim=1)
    return weights @ value, z.logsumexp(-1), segment, margin


def same_top(found: Tensor, wanted: Tensor, count: int, tie: float = 1e-5) -> bool:
    """Whether the ``count`` largest entries are the same set, entries within ``tie`` of the last counting as equal."""
    least = wanted.topk(count, dim=-1).values[..., -1:]
    return bool((wanted.gather(-1, found.topk(count, dim=-1).indices) >= least - tie).all())


def check_mass(x: Inputs, *, all_rows: bool, given: bool, masked: bool, gated: bool, reduce_heads: bool) -> None:
    """:func:`vlm_attn.ops.key_mass` against the definition."""
    rows = None if all_rows else x.rows
    gate = None if all_rows or not gated else x.gate
    wanted, lse = dense_mass(x, rows, gate, masked)
    wanted = wanted.sum(1) if reduce_heads else wanted
    found = ops.key_mass(
        x.query,
        x.key,
        rows,
        x.case.scaling,
        lse.float() if given else None,
        x.key_mask if masked else None,
        x.case.causal,
        reduce_heads,
        gate=gate,
    )
    assert found.dtype == torch.float32
    assert found.shape == wanted.shape
    assert not found.isnan().any()
    # 2e-3 is the bar; relative to the mass of one key, which sums many rows and heads, far less is reached.
    assert (found - wanted).abs().max() <= min(2e-3, 2e-5 * max(1.0, float(wanted.max())))
    assert same_top(found.double(), wanted, min(8, wanted.shape[-1]), tie=1e-4)


def check_segments(x: Inputs, mix: ops.Mix | None, active: bool = True) -> None:
    """:func:`vlm_attn.ops.segment_attention` against the definition."""
    chosen = x.active if active else None
    wanted, lse, segment, margin = dense_segments(x, mix, chosen)
    found = ops.segment_attention(x.query, x.key, x.value, x.labels, x.case.scaling, mix, x.case.causal, active=chosen)
    assert found.output.dtype == x.case.dtype
    assert not any(part.isnan().any() for part in found)
    for mine, theirs in ((found.lse, lse), (found.segment_lse, segment)):
        # A segment 60 below the row's maximum may be lost in fp32: its mass is 0 either way.
        deep = theirs < lse.view(*lse.shape, *[1] * (theirs.ndim - 3)) - 60
        assert ((mine - theirs).abs()[~deep & ~theirs.isinf()] <= 1e-4).all()
        assert torch.equal(mine.isinf() | deep, theirs.isinf() | deep)
    clear = margin > 1e-5
    # 2e-3 is the bar, beyond the rounding to the dtype in which the output is stored (eps / 2 of its size).
    stored = 0.0 if x.case.dtype == torch.float32 else torch.finfo(x.case.dtype).eps / 2
    error = ((found.output.double() - wanted).abs() - stored * wanted.abs())[clear]
    assert (error <= 2e-3).all(), f"output off by {float(error.max())}"
    if x.case.dtype == torch.float32:
        assert (error <= 1e-5).all(), f"output off by {float(error.max())}"
    assert (found.output[lse.isinf()] == 0).all()
    if mix is not None:
        opened = mix.open(found.segment_lse, chosen)
        plain = dense_segments(x, None, None)[0]
        change = (wanted - plain).abs().amax(-1)
        assert (change[~opened & clear] < 1e-9).all()
