"""Dry runs of a layer: the reading of some rows costs no more projections than it needs, and leaves nothing behind."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vlm_attn
from tests import models
from vlm_attn import dry
from vlm_attn.families import resolve

METHODS = {"feather": {}, "pyramiddrop": {}, "sparsevlm": {}, "fastv": {"keep": 6, "calibrate": ["rope_free"]}}


def reading(model: nn.Module, name: str) -> tuple[list[Tensor], Tensor]:
    """What a method read of a batch, and the logits behind it."""
    inputs = models.padded().inputs()
    method = vlm_attn.method(name, **METHODS[name])
    with vlm_attn.attach(model, method) as session, torch.no_grad():
        logits = model(**inputs).logits
        return list(session.last.scores.values()), logits


@pytest.mark.parametrize("name", METHODS)
def test_a_lean_dry_run_reads_what_a_full_one_reads(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lean_scores, lean_logits = reading(models.llava(4), name)
    monkeypatch.setattr(dry, "lean", lambda *_: nullcontext())
    full_scores, full_logits = reading(models.llava(4), name)
    assert lean_scores and len(lean_scores) == len(full_scores)
    for a, b in zip(lean_scores, full_scores, strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    assert torch.allclose(lean_logits, full_logits, atol=1e-5)


@pytest.mark.parametrize("wanted", [torch.tensor([6]), torch.tensor([2, 6])], ids=["one", "two"])
def test_a_dry_run_projects_few_queries_and_no_values(wanted: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.llava(4)
    attention = resolve(model).attention(1)
    rows: Counter[str] = Counter()
    linear = torch.nn.functional.linear
    weights = {id(getattr(attention, name).weight): name for name in ("q_proj", "k_proj", "v_proj")}

    def counted(x: Tensor, weight: Tensor, *args: Any) -> Tensor:
        rows[weights.get(id(weight), "other")] += x.shape[1]
        return linear(x, weight, *args)

    monkeypatch.setattr(torch.nn.functional, "linear", counted)
    hidden = torch.randn(1, 7, attention.q_proj.in_features)
    with dry.lean(attention, wanted) as noted:
        queries, keys, values = (getattr(attention, name)(hidden) for name in ("q_proj", "k_proj", "v_proj"))
    assert rows == {"q_proj": len(wanted), "k_proj": 7}
    assert queries.shape == attention.q_proj(hidden).shape
    assert torch.allclose(queries[:, wanted], attention.q_proj(hidden)[:, wanted], atol=1e-6)
    assert torch.equal(keys, attention.k_proj(hidden)) and not values.any()
    assert len(noted) == 1 and noted[0] is keys


class Projected:
    """Stands in for ``functional.linear`` and counts the rows that key projections take, per layer."""

    def __init__(self, model: nn.Module):
        family = resolve(model)
        self.names = {id(family.attention(n).k_proj.weight): n for n, _ in family.attentions()}
        self.rows: Counter[int] = Counter()
        self.linear = torch.nn.functional.linear

    def __call__(self, x: Tensor, weight: Tensor, *args: Any) -> Tensor:
        if id(weight) in self.names:
            self.rows[self.names[id(weight)]] += x.shape[1]
        return self.linear(x, weight, *args)


@pytest.mark.parametrize("name", ["feather", "pyramiddrop"])
def test_a_layer_takes_over_the_keys_of_its_dry_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.llava(4)
    counted = Projected(model)
    with vlm_attn.attach(model, name) as session, torch.no_grad():
        monkeypatch.setattr(torch.nn.functional, "linear", counted)
        model(**models.single().inputs())
        request = session.last
        arrived = [request.tokens.length, *(request.tokens_at(layer).length for layer in range(session.info.layers))]
        ahead = session.pruner.readings.ahead()
        assert ahead and not request.keys
        for layer in ahead:  # the keys of all that arrived, and no others
            cut = layer in session.sites and session.sites[layer].score in session.pruner.readings.own(layer)
            entered = arrived[layer] if cut else arrived[layer + 1]
            assert counted.rows[layer] == entered
            assert request.spared[layer] == arrived[layer + 1] / entered


def test_keys_of_other_hidden_states_are_not_taken_over() -> None:
    model = models.llava(4)
    counted = Projected(model)
    with vlm_attn.attach(model, "pyramiddrop") as session, torch.no_grad():
        pruner = session.pruner
        cut = pruner._cut
        pruner._cut = lambda *args: (found := cut(*args)) and (*found[:2], found[2] + 1)  # as a merging method would
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.nn.functional, "linear", counted)
            model(**models.single().inputs())
        request = session.last
        assert not request.keys and not request.spared
        for layer in pruner.readings.ahead():
            arrived = request.tokens_at(layer - 1).length
            assert counted.rows[layer] == arrived + request.tokens_at(layer).length


def test_a_failure_in_front_of_the_keys_spoils_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.llava(4)
    inputs, other = models.single().inputs(), models.padded().inputs()
    with vlm_attn.attach(model, "pyramiddrop") as session, torch.no_grad():
        expected = model(**other).logits
        layer = session.pruner.readings.ahead()[0]
        norm, calls = model.get_decoder().layers[layer].input_layernorm, []

        def fails(x: Tensor) -> Tensor:  # in the layer's own run, not in the dry one
            calls.append(x)
            if len(calls) == 2:
                raise RuntimeError("on purpose")
            return type(norm).forward(norm, x)

        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="on purpose"):
            patch.setitem(vars(norm), "forward", fails)
            model(**inputs)
        assert list(session.last.keys) == [layer]
        assert torch.equal(model(**other).logits, expected)
    assert "forward" not in vars(resolve(model).attention(layer).k_proj)


def test_projections_are_given_back_when_the_layer_fails() -> None:
    attention = resolve(models.llava(4)).attention(0)
    with pytest.raises(RuntimeError, match="on purpose"), dry.lean(attention, torch.tensor([0])):
        assert "forward" in vars(attention.q_proj) and "forward" in vars(attention.v_proj)
        raise RuntimeError("on purpose")
    assert "forward" not in vars(attention.q_proj) and "forward" not in vars(attention.v_proj)


def test_attention_of_another_shape_projects_everything() -> None:
    joined = nn.Module()
    joined.qkv = nn.Linear(4, 12)
    with dry.lean(joined, torch.tensor([0])):
        assert "forward" not in vars(joined.qkv)
    with dry.lean(None, torch.tensor([0])):
        pass
