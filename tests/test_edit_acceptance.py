"""The engine's acceptance tests, by number: what every fast path of an attention edit must satisfy."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import vlm_attn
from tests import models
from tests.matrix import GIFT, HEADS, MATRIX, SINKS
from tests.reference.edits_rows import Map, top_heads
from tests.reference.llava import image_features
from tests.runs import distance, greedy, manual
from vlm_attn.attention import interface, plans
from vlm_attn.attention.call import Call
from vlm_attn.edits import Edits
from vlm_attn.profiles import Profile
from vlm_attn.request import Request
from vlm_attn.stages import ModelInfo
from vlm_attn.tokens import Layout, TokenMap, build_token_map

# ------------------------------------------------------------------------------------------------------- test 1

IMAGES = "..v.vv..vvv...", "..vv.v....v.vv..."  # two images each, with text inside the first and the second
CASES: list[tuple[str, dict[str, Any]]] = [
    ("pai", {"alpha": 0.6, "gamma": 1.0, "first_layer": 0}),
    ("vaf", {"enh": 1.5, "sup": 0.6, "layers": [0]}),
    ("vas_boost", {"image": 0.5, "system": 0.4}),
    ("zerotuning", {"gamma": 3.0, "heads": [[0, 1], [0, 2]]}),
    ("sofa", {"sigma": 0.4}),
    ("sofa", {"sigma": 0.4, "mode": "output", "intra_image": True}),
    ("var", {"sink_dims": [0], "tau": 1.1, "first_layer": 0, "visual_mass_min": 0.05, "rho_nonsink": 0.1}),
    ("act", {"heads": "all", "alpha": 1.4, "first_layer": 0}),
    ("adhh", {"heads": [[0, 0], [0, 2]], "threshold": 0.1}),
    ("head_gate", {"heads": [[0, 1], [0, 3]], "mode": "block", "where": "text"}),
]


def token_map() -> TokenMap:
    """Two left-padded samples, two images each, visual tokens scattered among text."""
    width = max(map(len, IMAGES)) + 1
    valid = torch.tensor([[i >= width - len(row) for i in range(width)] for row in IMAGES])
    vis = torch.tensor([[c == "v" for c in row.rjust(width, ".")] for row in IMAGES])
    return build_token_map(vis, valid, [[Layout.without_grid(3)] * 2, [Layout.without_grid(3)] * 2])


def run_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> tuple[Tensor, None]:
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=0.4, enable_gqa=True
    )
    return out.transpose(1, 2), None


class Layer:
    """One attention layer with random states: the engine's output and the reference's, prefill and one new row."""

    def __init__(self, name: str, params: dict[str, Any], ratio: int, dtype: torch.dtype = torch.float32):
        generator = torch.Generator().manual_seed(ratio)
        heads, kv = models.HEADS[ratio]
        self.tokens, self.name, self.params, self.dtype = token_map(), name, params, dtype
        n, self.model = self.tokens.length, models.llava(ratio)
        self.q, self.k, self.v = (torch.randn(2, h, n + 1, 8, generator=generator).to(dtype) for h in (heads, kv, kv))
        self.hidden = torch.randn(2, n, 6, generator=generator)
        info = ModelInfo("", "test", 4, heads, kv, 8, 6)
        method = vlm_attn.method(name, **params).resolve(info, Profile("", {}))
        self.edits = Edits([method], info, range(4))
        self.request = Request(tokens=self.tokens, entered=self.tokens)
        self.group = heads // kv

    def engine(self) -> tuple[Tensor, Tensor]:
        """Outputs ``[B, N, H, d]`` of the prefill and ``[B, 1, H, d]`` of the new row."""
        n = self.tokens.length
        causal = torch.ones(n, n).tril().bool()
        mask = (causal & self.tokens.valid[:, None, None, :]) | torch.eye(n).bool()
        call = Call(self.q[:, :, :n], self.k[:, :, :n], self.v[:, :, :n], mask, 0.4, True, None, None)
        self.edits.prepare(0, self.hidden, self.request)
        prefill = self.edits.attend(0, call, self.request, run_sdpa)[1]
        seen = torch.cat([self.tokens.valid, torch.ones(2, 1).bool()], dim=1)[:, None, None]
        new = replace(call, query=self.q[:, :, n:], key=self.k, value=self.v, mask=seen)
        return prefill, self.edits.attend(0, new, self.request, run_sdpa)[1]

    def dense(self, row: int) -> tuple[Tensor, Tensor]:
        """The same of one sample, ``[n, H, d]`` and ``[1, H, d]``, from the method's own reference."""
        n, pad = self.tokens.length, int((~self.tokens.valid[row]).sum())
        reference = MATRIX[self.name].reference(self.model, self.params, None, row)
        reference.visual = self.tokens.vis[row, pad:]
        reference.image_of = lambda keys: [*self.tokens.img_id[row, pad:].tolist(), -1][:keys]
        reference.sinks = {}
        reference.on_layer_input(0, self.hidden[row, pad:], True)
        out = []
        for first, last in ((pad, n), (n, n + 1)):
            q = self.q[row, :, first:last].float()
            k, v = (x[row, :, pad:last].float().repeat_interleave(self.group, 0) for x in (self.k, self.v))
            visible = torch.arange(pad, last)[None] <= torch.arange(first, last)[:, None]
            z = reference.edit_logits(0, q @ k.transpose(1, 2) * 0.4, first == pad)
            factors = reference.see(0, visible, first == pad)
            factors = visible.float() if factors is None else factors
            weights = (z + factors.log()).softmax(-1)
            out.append((reference.edit_weights(0, weights, first == pad) @ v).transpose(0, 1))
        return out[0], out[1]


def largest_error(layer: Layer) -> tuple[float, float]:
    """Absolute error over valid rows, and the scale of the outputs."""
    prefill, new = layer.engine()
    error = scale = 0.0
    for row in range(2):
        dense, dense_new = layer.dense(row)
        valid = layer.tokens.valid[row]
        error = max(error, float((prefill[row][valid].float() - dense).abs().max()))
        error = max(error, float((new[row].float() - dense_new).abs().max()))
        scale = max(scale, float(dense.abs().max()))
    return error, scale


@pytest.mark.parametrize("ratio", [1, 4, 7])
@pytest.mark.parametrize(("name", "params"), CASES, ids=[f"{n}-{i}" for i, (n, _) in enumerate(CASES)])
def test_1_fast_paths_equal_dense_rows(name: str, params: dict[str, Any], ratio: int) -> None:
    """fp32 within 1e-5, bf16 within 2 %; grouped heads, left padding, two images, scattered visual tokens."""
    layer = Layer(name, params, ratio)
    error, _ = largest_error(layer)
    assert error < 1e-5
    assert layer.request.edited or layer.request.biases or layer.request.maps, "nothing was edited"
    error, scale = largest_error(Layer(name, params, ratio, torch.bfloat16))
    assert error < 2e-2 * scale


@pytest.mark.parametrize("ratio", [1, 4, 7])
@pytest.mark.parametrize("name", ["gift", "paint", "ilvad", "vhr"])
def test_1_edits_that_look_beyond_their_layer(name: str, ratio: int) -> None:
    """They read other layers, the encoder, a draft or a second stream first, hence whole models; fp32 within 1e-5."""
    assert from_reference(name, models.pairs(), ratio) < 1e-5


def from_reference(name: str, batch: models.Batch, ratio: int = 4) -> float:
    """Distance between logits of greedy decoding and the dense step-by-step reference of each sample."""
    params, model = MATRIX[name].default, models.llava(ratio)
    with vlm_attn.attach(model, vlm_attn.method(name, **params)) as session:
        tokens, logits, _ = greedy(model, batch.inputs())
        last = session.last
    assert last.edited, "nothing was edited"
    expected = []
    for row, sample in enumerate(batch.samples):
        reference = MATRIX[name].reference(model, params, last, row)
        reference.pixels = sample.pixels
        expected.append(reference.run(sample.ids, image_features(model, sample.pixels), tokens[row, :-1]))
    return distance(logits, torch.stack(expected, dim=1))


def test_1_fused_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """The LSE route of long unpadded prompts."""
    monkeypatch.setattr(plans, "FUSED_ROWS", 1)
    used = []
    original = plans._edit_fused
    monkeypatch.setattr(plans, "_edit_fused", lambda *a: used.append(1) or original(*a))
    model, sample = models.llava(4), models.sample(seed=1)
    params = {**SINKS, "first_layer": 1}
    with vlm_attn.attach(model, vlm_attn.method("var", **params)) as session:
        tokens, logits, _ = greedy(model, sample.inputs())
    reference = MATRIX["var"].reference(model, params, session.last, 0)
    expected = reference.run(sample.ids, image_features(model, sample.pixels), tokens[0, :-1])
    assert used
    assert distance(logits[:, 0], expected) <= 1e-5


# ------------------------------------------------------------------------------------------------------- test 2

OFF = [
    ("var", {**SINKS, "keep": 1.0}),
    ("act", {"heads": "all", "beta": 1.0}),
    ("zerotuning", {"gamma": 1.0}),
    ("gift", {**GIFT, "saliency_layer": 1, "enhance_layers": [0, 2], "alpha": 0.0}),
    ("pai", {"alpha": 0.0, "gamma": 1.0}),
    ("paint", {"alpha": 0.0, "beta": 0.0}),
    ("vhr", {"alpha": 1.0}),
    ("sofa", {"sigma": 0.0}),
    ("adhh", {"heads": HEADS, "threshold": 1.5}),
    ("vaf", {"enh": 1.0, "sup": 1.0}),
    ("vas_boost", {"image": 0.0, "system": 0.0}),
    ("head_gate", {"heads": HEADS, "alpha": 1.0}),
    ("ilvad", {"alpha": 0.0, "text": 0.0}),
]


@pytest.mark.parametrize(("name", "params"), OFF, ids=[n for n, _ in OFF])
def test_2_no_op_settings_give_the_stock_kernel(name: str, params: dict[str, Any]) -> None:
    model, inputs = models.llava(4), models.pairs().inputs()
    _, stock, _ = greedy(model, inputs, 3)
    with vlm_attn.attach(model, vlm_attn.method(name, **params)):
        _, off, _ = greedy(model, inputs, 3)
    assert distance(off, stock) < 1e-6


# ------------------------------------------------------------------------------------------------------- test 3


def test_3_var_keeps_row_sums_and_other_text_and_needs_sinks(monkeypatch: pytest.MonkeyPatch) -> None:
    before_after: list[tuple[Tensor, Tensor, Tensor]] = []
    original = plans.Labelled.apply

    def spy(self: plans.Labelled, weights: Tensor, active: Tensor) -> Tensor:
        out = original(self, weights, active)
        before_after.append((weights, out, self.labels))
        return out

    monkeypatch.setattr(plans.Labelled, "apply", spy)
    model, batch = models.llava(4), models.padded()
    with vlm_attn.attach(model, vlm_attn.method("var", **SINKS)) as session:
        tokens, _, _ = greedy(model, batch.inputs(), 3)
        edited, last = sum(session.last.edited.values()), session.last
    for before, after, labels in before_after:
        assert torch.allclose(after.sum(-1), torch.ones(()), atol=1e-5)
        other = (labels == 0)[:, None, None, :]
        n = labels.shape[-1]
        assert torch.equal(torch.where(other, before[..., :n], 0), torch.where(other, after[..., :n], 0))
        assert torch.equal(before[..., n:], after[..., n:])
    count = 0
    for row, sample in enumerate(batch.samples):
        reference = MATRIX["var"].reference(model, SINKS, last, row)
        reference.run(sample.ids, image_features(model, sample.pixels), tokens[row, :-1])
        count += reference.edited
    assert edited == count > 0
    with vlm_attn.attach(model, vlm_attn.method("var", sink_dims=(3, 7), tau=1e9)) as session:
        greedy(model, batch.inputs(), 3)
        assert not session.last.edited


# ------------------------------------------------------------------------------------------------------- test 4


def test_4_sofa_between_causal_and_the_union_mask() -> None:
    causal, _ = Layer("sofa", {"sigma": 0.0}, 4).engine()
    nearly, _ = Layer("sofa", {"sigma": 1e-7}, 4).engine()
    assert (nearly - causal).abs().max() < 1e-5
    layer = Layer("sofa", {"sigma": 1.0}, 4)
    full, _ = layer.engine()
    assert (full - causal).abs().max() > 1e-2
    n, tokens = layer.tokens.length, layer.tokens
    image = tokens.img_id
    union = torch.ones(n, n).tril().bool()[None] | ((image[:, None] > image[:, :, None]) & (image[:, :, None] >= 0))
    union = (union & tokens.valid[:, None, :]) | torch.eye(n).bool()
    expected, _ = run_sdpa(layer.q[:, :, :n], layer.k[:, :, :n], layer.v[:, :, :n], union[:, None])
    assert (full - expected)[tokens.valid].abs().max() < 1e-5


# ------------------------------------------------------------------------------------------------------- test 5


@pytest.mark.parametrize("name", [n for n, row in MATRIX.items() if row.acts_on == "logits" and n in dict(OFF)])
def test_5_a_sample_alone_equals_itself_in_a_batch(name: str) -> None:
    model, batch = models.llava(7), models.pairs()
    with vlm_attn.attach(model, vlm_attn.method(name, **MATRIX[name].default)):
        _, together, _ = greedy(model, batch.inputs(), 3)
        for row, sample in enumerate(batch.samples):
            _, alone, _ = greedy(model, sample.inputs(), 3)
            assert distance(together[:, row], alone[:, 0]) <= 1e-5


# ------------------------------------------------------------------------------------------------------- test 6


def continued(method: Any, given: dict[int, Tensor] | None = None) -> float:
    """Distance between cached decoding of forced tokens and one prefill of prompt and tokens."""
    model, sample = models.llava(4), models.sample(seed=1)
    forced = torch.tensor([[11, 12, 13, 14]])
    whole = models.Sample(torch.cat([sample.ids, forced[0]]), sample.pixels)
    with vlm_attn.attach(model, method) as session:
        stepwise = manual(model, sample.inputs(), forced)
        labels = {layer: found for (_, layer), found in session.last.labels.items()}
    if given is not None:
        given.update(labels)
    with vlm_attn.attach(model, method):
        at_once = model(**whole.inputs()).logits[0, -1]
    return distance(stepwise[-1, 0], at_once)


ALL_ROWS = [
    ("zerotuning", {"gamma": 3.0}),
    ("vaf", {"enh": 1.4, "layers": [0, 1, 2]}),
    ("vas_boost", {"image": 0.4}),
    ("head_gate", {"heads": HEADS}),  # VHR's path with supplied heads
]


@pytest.mark.parametrize(("name", "params"), ALL_ROWS, ids=[n for n, _ in ALL_ROWS])
def test_6_all_row_methods_decode_as_they_prefill(name: str, params: dict[str, Any]) -> None:
    assert continued(vlm_attn.method(name, **params)) <= 1e-5


@pytest.mark.parametrize(("name", "params"), [("var", {**SINKS, "first_layer": 0}), ("act", {"heads": "all"})])
def test_6_with_a_supplied_sink_set(name: str, params: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    method, given = vlm_attn.method(name, **params), {}
    own = type(method).labels

    def labels(self: Any, view: Any) -> Tensor:
        """Sinks of the prompt; the tokens behind it are none, as in decoding."""
        if view.layer not in given:
            return own(self, view)
        found = given[view.layer]
        return torch.nn.functional.pad(found, (0, view.tokens.length - found.shape[-1]))

    monkeypatch.setattr(type(method), "labels", labels)
    assert continued(method, given) <= 1e-5


LAST_ROW = ("pai", "paint", "gift", "adhh")


@pytest.mark.parametrize("name", LAST_ROW)
def test_6_last_row_methods_must_not(name: str) -> None:
    """Earlier generated rows were edited when they were last, and their keys and values stand in the cache."""
    assert continued(vlm_attn.method(name, **MATRIX[name].default)) > 1e-4


@pytest.mark.parametrize("name", [*LAST_ROW, "ilvad"])
def test_6_last_row_methods_step_by_step(name: str) -> None:
    assert from_reference(name, models.padded()) <= 1e-5


@pytest.mark.parametrize(("name", "home"), [("gift", "_gaze"), ("ilvad", "_evidence")])
def test_6_answers_outgrow_the_room_behind_a_layout(name: str, home: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a method laid out at the prompt's keys has room for some generated tokens, then for more."""
    model, inputs = models.llava(4), models.padded().inputs()

    def logits() -> Tensor:
        with vlm_attn.attach(model, vlm_attn.method(name, **MATRIX[name].default)):
            return greedy(model, inputs, 6)[1]

    roomy = logits()
    monkeypatch.setattr(f"vlm_attn_methods.{home}.ROOM", 1)
    assert torch.equal(logits(), roomy)


# ------------------------------------------------------------------------------------------------------- test 7


@pytest.mark.parametrize("source", [1, 2])
def test_7_gift_map_is_the_same_in_one_pass_and_in_two(source: int) -> None:
    """Also the same as from a prompt whose last token is held back."""
    model, sample, maps = models.llava(4), models.sample(seed=4), []
    for layers in ([source + 1], [0, source + 1]):
        method = vlm_attn.method("gift", **GIFT, saliency_layer=source, enhance_layers=layers)
        with vlm_attn.attach(model, method) as session:
            assert (session.edits.reads_ahead is None) == (len(layers) == 1)
            greedy(model, sample.inputs(), 1)
            maps.append(session.last.memory[0].map[0])
    torch.testing.assert_close(maps[0], maps[1], atol=1e-6, rtol=0)
    held = Map(model, source)
    held.run(sample.ids[:-1], image_features(model, sample.pixels))
    visual = sample.visual[:-1]
    words = range(int(visual.nonzero()[-1, 0]) + 1, len(sample.ids) - 2)
    shift = torch.stack([(held.map[:, i] - held.map[:, i - 1]).clamp(min=0)[:, visual] for i in words])
    heads, _ = top_heads([float(shift[:, h].sum()) for h in range(8)], 0.5)
    expected = shift[:, heads].mean((0, 1))
    order = maps[0][sample.visual].argsort()
    assert torch.equal(order, expected.argsort())
    assert float(maps[0].max()) == 1.0


# ------------------------------------------------------------------------------------------------------- test 8


def counted(method: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[list[tuple[int, int]], list[int]]:
    """(layer, rows) of every kernel call and rows of every exact computation, prefill and three steps."""
    calls: list[tuple[int, int]] = []
    exact: list[int] = []
    original, logits = interface.base_function, Call.logits

    def counting(backend: str, module: Any) -> Any:
        base = original(backend, module)

        def run(module: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
            calls.append((module.layer_idx, query.shape[2]))
            return base(module, query, *args, **kwargs)

        return run

    def rows(self: Call, wanted: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        exact.append(1 if wanted is None else wanted.numel())
        return logits(self, wanted, *args, **kwargs)

    monkeypatch.setattr(interface, "base_function", counting)
    monkeypatch.setattr(Call, "logits", rows)
    model, inputs = models.llava(4), models.single().inputs()
    with vlm_attn.attach(model, method):
        calls.clear()
        greedy(model, inputs, 4)
    return calls, exact


def test_8_budget_of_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts instead of seconds: VAR computes no more than the text rows again and, in decoding, each layer once; VHR
    runs one text-only prefill."""
    sample = models.sample(seed=1)
    text_rows = len(sample.ids) - int(sample.visual.nonzero()[-1, 0]) - 1
    calls, exact = counted(vlm_attn.method("var", **SINKS, first_layer=1), monkeypatch)
    assert sorted(layer for layer, rows in calls if rows > 1) == [0, 1, 2, 3]
    assert max(exact) <= text_rows
    decoding = [layer for layer, rows in calls if rows == 1]
    assert all(decoding.count(layer) + 3 * (layer in (1, 2)) == 3 for layer in range(4))
    monkeypatch.undo()
    calls, exact = counted(vlm_attn.method("vhr"), monkeypatch)
    prefills = [rows for _, rows in calls if rows > 1]
    assert sorted(set(prefills)) == sorted({len(sample.ids), len(sample.ids) - models.N_VISUAL})
    assert len(prefills) == 8
    assert not exact
    assert math.isclose(len([1 for _, rows in calls if rows == 1]), 12)
