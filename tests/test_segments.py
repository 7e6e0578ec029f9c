"""The algebra of key segments against a dense softmax in fp64, with grouped heads, hidden keys and empty segments."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_attn.attention import masks, rows, segments

INF = float("inf")


def tensors(heads: int, kv_heads: int, queries: int, keys: int, seed: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, heads, queries, 8), (2, kv_heads, keys, 8), (2, kv_heads, keys, 8))
    return tuple(2 * torch.randn(shape, generator=generator) for shape in shapes)


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and LSE in fp64; `keep` bool broadcastable to `[B, H, Q, N]`; rows without keys give 0 and -inf."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(group, dim=1) for x in (k, v))
    logits = (q.double() @ k.transpose(2, 3) * 0.3).masked_fill(~keep, -INF)
    lse = logits.logsumexp(-1)
    weights = torch.nan_to_num((logits - lse[..., None]).exp())
    return weights @ v, lse


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2), (7, 1)])
@settings(max_examples=15, deadline=None)
@given(keys=st.integers(1, 40), queries=st.integers(1, 6), parts=st.integers(1, 5), seed=st.integers(0, 10**6))
def test_merged_segments_are_the_whole(
    heads: int, kv_heads: int, keys: int, queries: int, parts: int, seed: int
) -> None:
    q, k, v = tensors(heads, kv_heads, queries, keys, seed)
    owner = torch.randint(0, parts, (keys,), generator=torch.Generator().manual_seed(seed))
    pieces = [segments.attend(q, k[:, :, owner == g], v[:, :, owner == g], 0.3) for g in range(parts)]
    out, lse = segments.merge(pieces)
    whole, whole_lse = dense(q, k, v, torch.ones(1, 1, 1, keys, dtype=torch.bool))
    assert (out - whole).abs().max() < 1e-5
    assert (lse - whole_lse).abs().max() < 1e-5


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2), (7, 1)])
def test_attend_with_masks(heads: int, kv_heads: int) -> None:
    q, k, v = tensors(heads, kv_heads, 9, 9, 3)
    causal = torch.ones(9, 9).tril().bool()[None, None]
    out, lse = segments.attend(q, k, v, 0.3, causal=True)
    expected, expected_lse = dense(q, k, v, causal)
    assert (out - expected).abs().max() < 1e-5
    assert (lse - expected_lse).abs().max() < 1e-5
    padded = causal & (torch.arange(9) >= 3)[None, None, None]
    additive = torch.zeros(padded.shape).masked_fill(~padded, torch.finfo(torch.float32).min)
    out, lse = segments.attend(q, k, v, 0.3, mask=additive)
    expected, expected_lse = dense(q, k, v, padded)
    assert (out - expected).abs().max() < 1e-5
    assert (lse[..., :3] == -INF).all()
    assert (out[:, :, :3] == 0).all()
    assert (lse[..., 3:] - expected_lse[..., 3:]).abs().max() < 1e-5


def test_empty_segment_has_no_mass() -> None:
    q, k, v = tensors(4, 2, 3, 6, 1)
    empty = segments.attend(q, k[:, :, :0], v[:, :, :0], 0.3)
    assert (empty[1] == -INF).all()
    whole = segments.attend(q, k, v, 0.3)
    out, lse = segments.merge([whole, empty])
    assert torch.allclose(out, whole[0], atol=1e-6)
    assert torch.allclose(lse, whole[1], atol=1e-6)
    out, lse = segments.merge([empty, empty])
    assert (out == 0).all()
    assert (lse == -INF).all()


@pytest.mark.parametrize("scales", [(0.6, 1.0, 2.5), (1.0, 0.0, 1.0)])
def test_scaling_and_renormalising_is_a_bias(scales: tuple[float, float, float]) -> None:
    """Multiply the weights of segment g by s_g and renormalise == add log s_g to its logits."""
    q, k, v = tensors(4, 4, 5, 18, 4)
    pieces = [segments.attend(q, k[:, :, 6 * g : 6 * g + 6], v[:, :, 6 * g : 6 * g + 6], 0.3) for g in range(3)]
    biased = [(out, lse + (math.log(s) if s else -INF)) for (out, lse), s in zip(pieces, scales, strict=True)]
    out, _ = segments.merge(biased)
    bias = torch.tensor(scales).clamp(min=1e-30).log().repeat_interleave(6)
    expected = rows.row_outputs(rows.row_weights(q, k, 0.3, bias=bias[None, None, None]), v)
    assert (out - expected).abs().max() < 1e-5


def test_row_logits_follow_the_head_map() -> None:
    """Query head h reads key/value head h // (H / Hkv)."""
    q, k, v = tensors(8, 2, 3, 5, 5)
    logits = rows.row_logits(q, k, 0.5)
    weights = logits.softmax(-1)
    out = rows.row_outputs(weights, v)
    for head in range(8):
        assert torch.allclose(logits[:, head], q[:, head] @ k[:, head // 4].transpose(1, 2) * 0.5, atol=1e-5)
        assert torch.allclose(out[:, head], weights[:, head] @ v[:, head // 4], atol=1e-5)


def test_softcap_comes_before_the_bias() -> None:
    q, k, _ = tensors(2, 1, 2, 4, 6)
    raw = rows.row_logits(10 * q, k, 1.0)
    capped = rows.row_weights(10 * q, k, 1.0, bias=torch.full((1, 1, 1, 4), 3.0), softcap=2.0)
    assert torch.allclose(capped, (2 * torch.tanh(raw / 2)).softmax(-1), atol=1e-6)


def test_chunks_cover_every_row_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "CHUNK_ELEMENTS", 100)
    pieces = list(rows.chunks(torch.arange(17), 1, 2, 10))
    assert len(pieces) == 4
    assert torch.equal(torch.cat(pieces), torch.arange(17))


def test_mask_rows_of_every_form_agree() -> None:
    """None, boolean and additive masks describe the same causal visibility."""
    seen = torch.ones(6, 6).tril().bool()
    wanted = torch.tensor([0, 3, 5])
    forms = [None, seen[None, None], torch.zeros(1, 1, 6, 6).masked_fill(~seen, torch.finfo(torch.float32).min)]
    for form in forms:
        assert torch.equal(masks.visible(form, wanted, 1, 6, 6, seen.device)[0, 0], seen[wanted])
        bias = masks.row_bias(form, wanted, 1, 6, 6, seen.device)
        assert bias is not None
        assert torch.equal(bias[0, 0] == 0, seen[wanted])


def test_missing_mask_over_a_longer_cache_is_refused() -> None:
    with pytest.raises(ValueError, match="chunked prefill"):
        masks.visible(None, torch.tensor([0]), 1, 3, 7, torch.device("cpu"))


def test_gathered_mask_keeps_causality_and_padding() -> None:
    idx = torch.tensor([[0, 2, 3, 5], [1, 2, 4, 5]])
    valid = torch.tensor([[True] * 4, [False, True, True, True]])
    mask = masks.gather(None, idx, valid, "sdpa", torch.float32, causal=True)
    assert mask is not None
    for row in range(2):
        for i in range(4):
            for j in range(4):
                expected = i == j or (j <= i and bool(valid[row, j]))
                assert bool(mask[row, 0, i, j]) == expected
    assert masks.gather(None, idx, torch.ones_like(valid), "sdpa", torch.float32, causal=True) is None


def test_decode_mask_hides_dropped_slots_only() -> None:
    valid = torch.tensor([[True, False, True]])
    assert masks.decode(torch.ones_like(valid), 1, 5, "sdpa", torch.float32) is None
    mask = masks.decode(valid, 2, 4, "sdpa", torch.float32)
    assert mask is not None
    assert mask[0, 0].int().tolist() == [[1, 0, 1, 1, 1, 0], [1, 0, 1, 1, 1, 1]]
    additive = masks.decode(valid, 2, 4, "eager", torch.float32)
    assert additive is not None
    assert torch.equal(additive == 0, mask)
