"""The engine's execution plans agree with each other and with dense formulas."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from vlm_attn.attention import masks, plans
from vlm_attn.attention.call import Call, fused_inputs
from vlm_attn.attention.plans import Labelled, edit_rows
from vlm_attn.stages import SegmentEdit


class Halve(SegmentEdit):
    """Halves segment 1, gives what it lost to segment 2."""

    name, summary, segments = "halve", "test edit", 3

    def scales(self, masses: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        gain = 1 + 0.5 * masses[..., 1] / masses[..., 2].clamp(min=1e-9)
        return torch.stack([torch.ones_like(gain), torch.full_like(gain, 0.5), gain], dim=-1)


def call(heads: int = 4, kv: int = 2, n: int = 24, batch: int = 2, bias: int = 0) -> Call:
    generator = torch.Generator().manual_seed(heads * 100 + n)
    q = torch.randn(batch, heads, n, 16, generator=generator)
    k, v = (torch.randn(batch, kv, n, 16, generator=generator) for _ in range(2))
    added = torch.randn(batch, bias, n, generator=generator) if bias else None
    return Call(q, k, v, None, 0.25, True, None, added)


def dense(c: Call) -> torch.Tensor:
    return c.weights(torch.arange(c.queries))


def output(c: Call, weights: torch.Tensor) -> torch.Tensor:
    value = c.value.repeat_interleave(c.query.shape[1] // c.value.shape[1], dim=1)
    return (weights @ value).transpose(1, 2)


@pytest.mark.parametrize(("heads", "kv"), [(2, 2), (8, 2), (7, 1)])
def test_fused_segments_equal_exact_rows(heads: int, kv: int, monkeypatch: pytest.MonkeyPatch) -> None:
    c = call(heads, kv, n=40)
    labels = torch.zeros(2, 40, dtype=torch.uint8)
    labels[0, 3:12], labels[1, 2:9] = 2, 2
    labels[0, 4], labels[0, 20], labels[1, 3] = 1, 1, 1  # one donor lies inside the edited rows
    gate = (torch.arange(40) >= 14).repeat(2, 1)
    out = output(c, dense(c))
    exact, count = edit_rows(c, out, [(Labelled.of(Halve(), labels), gate)])
    monkeypatch.setattr(plans, "FUSED_ROWS", 1)
    fused, same = edit_rows(c, out, [(Labelled.of(Halve(), labels), gate)])
    assert count == same > 0
    assert (exact - out).abs().max() > 1e-3
    torch.testing.assert_close(fused, exact, atol=2e-6, rtol=0)
    assert torch.equal(exact[:, :14], out[:, :14])


def test_rows_are_chunked_without_changing_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    c = call()
    labels = torch.zeros(2, 24, dtype=torch.uint8)
    labels[:, 2:8], labels[:, 5] = 2, 1
    gate = (torch.arange(24) >= 10).repeat(2, 1)
    gate[1, 10:15] = False
    out = output(c, dense(c))
    whole, _ = edit_rows(c, out, [(Labelled.of(Halve(), labels), gate)])
    monkeypatch.setattr("vlm_attn.attention.rows.CHUNK_ELEMENTS", 600)
    parts, _ = edit_rows(c, out, [(Labelled.of(Halve(), labels), gate)])
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=0)
    assert torch.equal(parts[1, 10:15], out[1, 10:15])


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("heads", "kv", "bias"), [(4, 2, 1), (4, 4, 4), (8, 2, 8), (7, 1, 7)])
def test_key_bias_equals_biased_softmax(backend: str, padded: bool, heads: int, kv: int, bias: int) -> None:
    c = call(heads, kv, bias=bias)
    if padded:
        seen = torch.ones(24, 24).tril().bool()[None, None].repeat(2, 1, 1, 1)
        seen[1, :, :, :5] = False
        seen[1, :, :5, :5] |= torch.eye(5).bool()
        c = replace(c, mask=masks.to_backend(seen, backend, torch.float32), backend=backend)
    elif backend == "eager":
        seen = torch.ones(24, 24).tril().bool()[None, None]
        c = replace(c, mask=masks.to_backend(seen, backend, torch.float32), backend=backend)
    q, k, v, mask = fused_inputs(c)
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    got = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=0.25
    )[..., :16]
    want = output(c, dense(c))
    plain = output(c, dense(replace(c, bias=None)))
    assert (want - plain).abs().max() > 1e-2
    torch.testing.assert_close(got.transpose(1, 2), want, atol=2e-6, rtol=0)
