"""Attention readings of pruners against a dense matrix, worked off in several chunks of rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from vlm_attn import readings
from vlm_attn.attention.call import Call
from vlm_attn.sites import RowScore

B, H, KV, N, D = 2, 4, 2, 24, 8


def call(mask: Tensor | None = None, bias: Tensor | None = None) -> Call:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(B, H, N, D, generator=generator)
    k, v = (torch.randn(B, KV, N, D, generator=generator) for _ in range(2))
    return Call(q, k, v, mask, 0.5, True, None, bias)


def dense(c: Call) -> Tensor:
    logits = c.query @ c.key.repeat_interleave(H // KV, dim=1).transpose(2, 3) * c.scaling
    if c.bias is not None:
        logits = logits + c.bias[:, :, None]
    seen = torch.ones(N, N).tril().bool() if c.mask is None else c.mask
    return logits.masked_fill(~seen, -torch.inf).softmax(-1).float()


def some_rows(first: int) -> Tensor:
    """Rows with gaps that differ between the samples."""
    rows = torch.rand(B, N, generator=torch.Generator().manual_seed(1)) > 0.4
    rows[:, :first] = False
    return rows


LEFT_PADDED = torch.ones(B, 1, N, N).tril().bool() & (torch.arange(N) >= torch.tensor([[0], [5]]))[:, None, None]
LEFT_PADDED[..., 0] = True  # padding rows see something
CALLS = {
    "plain": call(),
    "double": replace(call(), **{name: getattr(call(), name).double() for name in ("query", "key", "value")}),
    "padded": call(mask=LEFT_PADDED),
    "biased": call(bias=torch.randn(B, H, N, generator=torch.Generator().manual_seed(2))),
}
VISUAL = torch.zeros(B, N, dtype=torch.bool)
VISUAL[:, 4:16] = True


@pytest.mark.parametrize("rows", [some_rows(6), some_rows(N)], ids=["some", "none"])
@pytest.mark.parametrize("kind", CALLS)
def test_sums_over_rows_equal_the_dense_ones(kind: str, rows: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in ("CHUNK_ELEMENTS", "BLOCK_ELEMENTS"):
        monkeypatch.setattr(f"vlm_attn.attention.rows.{limit}", 3 * B * H * N)
    c = CALLS[kind]
    total = (dense(c) * rows[:, None, :, None]).sum(2)
    each = readings.read(RowScore(0, "all", over="sum", per_head=True), c, rows, VISUAL)
    assert torch.allclose(each, total, atol=1e-5)
    mean = readings.read(RowScore(0, "all"), c, rows, VISUAL)
    assert torch.allclose(mean, total.mean(1) / rows.sum(1, keepdim=True).clamp(min=1), atol=1e-5)


@pytest.mark.parametrize("kind", CALLS)
def test_weights_over_their_rotary_gain(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in ("CHUNK_ELEMENTS", "BLOCK_ELEMENTS"):
        monkeypatch.setattr(f"vlm_attn.attention.rows.{limit}", 3 * B * H * N)
    c, rows = CALLS[kind], some_rows(6)
    angle = torch.arange(N)[:, None] * torch.tensor([1.0, 0.1, 0.01, 0.001]).repeat(2)
    tables = angle.cos()[None], angle.sin()[None]
    gain = (angle[:, None] - angle[None]).cos().mean(-1).clamp(min=readings.FLOOR)
    total = (dense(c) / gain * rows[:, None, :, None]).sum(2)
    each = readings.read(RowScore(0, "all", over="sum", rope="ones", per_head=True), c, rows, VISUAL, tables)
    assert torch.allclose(each, total, atol=1e-4)


@pytest.mark.parametrize("kind", CALLS)
def test_without_rotary_embedding_rows_see_visual_keys_alone(kind: str) -> None:
    c, rows = CALLS[kind], some_rows(6)
    hidden = torch.zeros(B, 1, N).masked_fill(~VISUAL[:, None], -1e30)
    total = (dense(replace(c, bias=hidden if c.bias is None else c.bias + hidden)) * rows[:, None, :, None]).sum(2)
    each = readings.read(RowScore(0, "all", over="sum", rope="free", per_head=True), c, rows, VISUAL)
    assert torch.allclose(each, total, atol=1e-5)
    assert (each[:, :, ~VISUAL[0]] == 0).all()
