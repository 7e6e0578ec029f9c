"""The engine's execution plans agree with each other and with dense formulas."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import vlm_attn
from tests import models
from tests.matrix import HEADS, SINKS
from tests.runs import distance, greedy, manual
from vlm_attn import ops, request
from vlm_attn.attention import columns, fused, masks, plans, segments, soft
from vlm_attn.attention.call import Call, RowMap, fused_inputs
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


def test_maps_act_in_their_own_rows_of_each_sample() -> None:
    """Two maps whose rows differ from sample to sample and from each other, alone and together."""
    c = call(n=20)
    scale, boost = 1 + torch.rand(2, 20), torch.rand(2, 20)
    text = torch.zeros(2, 20, dtype=torch.bool)
    text[0, 9:], text[1, 14:] = True, True
    last = torch.zeros(2, 20, dtype=torch.bool)
    last[:, -1] = True
    bare = c.scores(torch.arange(20))
    out = output(c, dense(c))
    for used in ((0,), (1,), (0, 1)):
        maps = tuple((RowMap(scale, None, text), RowMap(None, boost, last))[i] for i in used)
        mapped = bare
        if 0 in used:
            mapped = torch.where(text[:, None, :, None], mapped * scale[:, None, None], mapped)
        if 1 in used:
            mapped = torch.where(last[:, None, :, None], mapped + boost[:, None, None] * mapped.abs(), mapped)
        hidden = torch.ones(20, 20).triu(1).bool()
        want = output(c, mapped.masked_fill(hidden, float("-inf")).softmax(-1))
        got, _ = edit_rows(replace(c, maps=maps), out, [])
        torch.testing.assert_close(got, want, atol=2e-6, rtol=0)
        rows = torch.stack([text, last])[list(used)].any(0)
        assert torch.equal(got[~rows], out[~rows])
        assert (got[rows] - out[rows]).abs().max() > 1e-3


def test_two_maps_of_different_rows_attach_together() -> None:
    with vlm_attn.attach(models.llava(4), ["vaf", "vas_boost"]) as session:
        greedy(models.llava(4), models.single().inputs(), 2)
        assert session.last.edited


# ------------------------------------------------------------------------------------------------ kept log-sum-exp


@pytest.mark.parametrize(("heads", "kv", "bias"), [(4, 2, 1), (4, 4, 4), (8, 2, 8)])
def test_bias_of_few_keys_is_applied_to_the_output(heads: int, kv: int, bias: int) -> None:
    c = call(heads, kv, bias=bias)
    acting = torch.zeros(2, 1, 24)
    acting[0, 0, [0, 5]], acting[1, 0, 2] = 1.0, 1.0
    c = replace(c, bias=c.bias * acting if c.bias is not None else None)

    def refuse(*args: Any) -> Any:
        raise AssertionError("the backend ran")

    done, out, _ = fused.attend(c, refuse, wants_lse=False)
    torch.testing.assert_close(out, output(c, dense(c)), atol=2e-6, rtol=0)
    assert done.lse is not None
    torch.testing.assert_close(done.lse, c.logits(torch.arange(24)).logsumexp(-1), atol=2e-6, rtol=0)


def test_bias_of_many_keys_or_a_vanishing_weight_goes_to_the_backend() -> None:
    bias = torch.zeros(1, 1, 24)
    bias[..., :3] = 1.0
    assert fused.few_keys(bias, torch.float32) is not None
    bias[..., 0] = -9.0
    assert fused.few_keys(bias, torch.float32) is None
    assert fused.few_keys(torch.ones(1, 1, 24), torch.float32) is None


def test_the_kernel_that_keeps_its_lse_gives_the_output_of_sdpa() -> None:
    c = call(8, 2, n=70)
    out, lse = segments.fused(c.query, c.key, c.value, c.scaling, causal=True)
    key, value = (x.repeat_interleave(4, dim=1) for x in (c.key, c.value))
    wanted = torch.nn.functional.scaled_dot_product_attention(c.query, key, value, is_causal=True, scale=c.scaling)
    assert torch.equal(out, wanted)
    torch.testing.assert_close(lse, c.logits(torch.arange(70)).logsumexp(-1), atol=2e-6, rtol=0)


def with_lse(c: Call) -> Call:
    return replace(c, lse=segments.attend(c.query, c.key, c.value, c.scaling, causal=True)[1])


def test_column_means_from_the_operator_equal_those_from_rows() -> None:
    c = call(8, 2, n=30)
    valid = torch.ones(2, 30, dtype=torch.bool)
    valid[1, :4] = False
    heads = torch.tensor([1, 2, 7])
    as_mask = torch.ones(30, 30).tril().bool()[None, None]
    rows = columns.column_means(replace(c, mask=as_mask), valid, heads)
    for got, want in zip(columns.column_means(with_lse(c), valid, heads), rows, strict=True):
        torch.testing.assert_close(got, want, atol=2e-6, rtol=0)


@pytest.mark.parametrize("mode", ["weight", "output"])
@pytest.mark.parametrize("inside", [False, True])
def test_softened_images_equal_softened_rows(mode: str, inside: bool) -> None:
    c = call(8, 2, n=30)
    images = torch.full((2, 30), -1)
    images[0, 3:9], images[0, 12:20], images[1, 0:7], images[1, 9:11], images[1, 20:29] = 0, 1, 0, 1, 2

    def pairs(rows: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        row, key = rows[:, :, None], keys[:, None, :]
        return ((key >= row) if inside else (key > row)) & (row >= 0)

    out = output(c, dense(c))
    assert with_lse(c).plain
    rows, count = soft.soften(c, out, images, pairs, 0.4, mode)
    whole, same = soft.soften(with_lse(c), out, images, pairs, 0.4, mode)
    assert count == same > 0
    assert (rows - out).abs().max() > 1e-2
    torch.testing.assert_close(whole, rows, atol=2e-6, rtol=0)


def test_softened_images_keep_a_bias_of_the_keys_let_in() -> None:
    """A kept LSE does not hide that a bias stands on keys of the later image."""
    c = call(n=20)
    bias = torch.zeros(2, 1, 20)
    bias[:, :, 12] = 1.5
    images = torch.full((2, 20), -1)
    images[:, 3:8], images[:, 11:15] = 0, 1

    def pairs(rows: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        return (keys[:, None, :] > rows[:, :, None]) & (rows[:, :, None] >= 0)

    done, out, _ = fused.attend(replace(c, bias=bias), lambda *_: (c.query, None), wants_lse=True)
    assert done.lse is not None
    got, _ = soft.soften(done, out, images, pairs, 1.0, "weight")
    z = c.scores(torch.arange(20)) + bias[:, :, None]
    seen = torch.ones(20, 20).tril().bool() | pairs(images, images)[:, None]
    torch.testing.assert_close(got, output(c, z.masked_fill(~seen, -1e30).softmax(-1)), atol=2e-6, rtol=0)


# --------------------------------------------------------------------------------------------------- segment kernel

MIXES: list[tuple[str, dict[str, Any]]] = [
    ("var", {**SINKS, "visual_mass_min": 0.05, "rho_nonsink": 0.1, "keep": 0.2}),
    ("act", {"heads": [[1, 0], [1, 3], [2, 1]], "alpha": 1.5, "first_layer": 1}),
    ("adhh", {"heads": HEADS, "threshold": 0.1}),
    ("adhh", {"heads": HEADS, "threshold": 0.1, "renormalise": True}),
    ("head_gate", {"heads": HEADS, "mode": "block"}),
    ("head_gate", {"heads": HEADS, "mode": "block", "drop": "context", "where": "text"}),
]


def test_edited_heads_are_counted_alike_at_the_end_and_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits to be counted holds tensors, so that a long answer is counted in between."""
    model, inputs = models.llava(4), models.single().inputs()
    act = vlm_attn.method("act", heads=[[1, 0], [2, 1]], alpha=1.5, first_layer=1)
    with vlm_attn.attach(model, [act, vlm_attn.method("ilvad")]) as session:

        def answer() -> tuple[int, int, dict[int, int]]:
            greedy(model, inputs, 4)
            return len(session.last._changed), len(session.last._uncounted), dict(session.last.edited)

        waiting, compared, counted = answer()
        assert waiting > 3 and compared == 0
        monkeypatch.setattr(request, "HELD", 1)
        assert answer() == (0, waiting, counted)
        monkeypatch.setattr(request, "GATHERED", 3)
        held, compared, again = answer()
        assert held + compared < 3 and again == counted
    assert any(counted.values())


@pytest.mark.parametrize(("name", "params"), MIXES)
@pytest.mark.parametrize("padded", [False, True])
def test_one_pass_of_the_segment_operator_equals_the_rows(
    name: str, params: dict[str, Any], padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an operator that a kernel stands behind, prefill (unpadded) and decoding go through it."""
    model = models.llava(4)
    inputs = (models.padded() if padded else models.single()).inputs()
    with vlm_attn.attach(model, vlm_attn.method(name, **params)) as session:
        tokens, wanted, _ = greedy(model, inputs, 4)
        counted = dict(session.last.edited)
        calls: list[int] = []
        original = ops.segment_attention

        def counting(query: torch.Tensor, *args: Any, **kwargs: Any) -> ops.SegmentAttention:
            calls.append(query.shape[2])
            return original(query, *args, **kwargs)

        monkeypatch.setattr(ops, "segment_attention", counting)
        monkeypatch.setattr(ops, "accelerated", lambda device: True)
        got = manual(model, inputs, tokens[:, :-1])
        assert session.last.edited == counted
    assert any(counted.values())
    assert distance(got, wanted) <= 1e-5
    decoding = name in ("adhh", "head_gate") and params.get("where") != "text"  # one row in the prefill as well
    assert 1 in calls
    assert (max(calls) > 1) == (not padded and not decoding)


def test_the_explanation_names_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    with vlm_attn.attach(models.llava(4), vlm_attn.method("var", **SINKS)) as session:
        assert "kernel" not in str(session.explain())
        monkeypatch.setattr(ops, "accelerated", lambda device: True)
        said = str(session.explain())
    assert "segment kernel" in said
