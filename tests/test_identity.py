"""A method at its neutral strength changes nothing; a detached one leaves nothing behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, StoppingCriteria

import vlm_attn
from tests import models
from tests.matrix import MATRIX
from tests.runs import distance, fingerprint, greedy, manual

TOLERANCE = 1e-5
METHODS = sorted(MATRIX)


@pytest.mark.parametrize("kind", ["single", "padded"])
@pytest.mark.parametrize("name", METHODS)
def test_neutral_changes_nothing(name: str, backend: str, kind: str) -> None:
    """Prefill and four cached steps, through `generate` and through a hand-written loop."""
    neutral = next(row for row in vlm_attn.methods() if row.name == name).neutral()
    model, inputs = models.llava(4, backend), models.BATCHES[kind]().inputs()
    tokens, logits, scores = greedy(model, inputs, 5)
    looped = manual(model, inputs, tokens[:, :-1])
    with vlm_attn.attach(model, neutral):
        _, with_logits, with_scores = greedy(model, inputs, 5)
        with_loop = manual(model, inputs, tokens[:, :-1])
    assert distance(with_logits, logits) <= TOLERANCE
    assert distance(with_scores, scores) <= TOLERANCE
    assert distance(with_loop, looped) <= TOLERANCE


@pytest.mark.parametrize("name", [n for n in METHODS if MATRIX[n].acts_on != "picture"])
def test_detach_leaves_nothing(name: str) -> None:
    model, inputs = models.build_llava(4), models.padded().inputs()
    (_, logits, scores), before = greedy(model, inputs), fingerprint(model)
    with vlm_attn.attach(model, vlm_attn.method(name, **MATRIX[name].default)) as session:
        greedy(model, inputs)
        assert fingerprint(model) != before  # else the check below sees nothing
    assert fingerprint(model) == before
    _, after, after_scores = greedy(model, inputs)
    assert torch.equal(after, logits)
    assert torch.equal(after_scores, scores)
    session.detach()
    assert fingerprint(model) == before


def test_detach_keeps_hooks_of_others(backend: str) -> None:
    model = models.build_llava(4, backend=backend)
    seen: list[int] = []
    layer = model.get_decoder().layers[1]
    handle = layer.register_forward_pre_hook(lambda *_: seen.append(1))

    greedy(model, models.single().inputs(), 2)  # transformers installs hooks of its own on first use
    before = fingerprint(model)
    with vlm_attn.attach(model, vlm_attn.method("fastv", layer=1)):
        greedy(model, models.single().inputs(), 2)
    assert fingerprint(model) == before
    count = len(seen)
    greedy(model, models.single().inputs(), 2)
    assert len(seen) == count + 2
    handle.remove()


class Boom(LogitsProcessor):
    """Raises at the third new token."""

    def __init__(self, error: BaseException) -> None:
        self.error, self.calls = error, 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Counts and raises."""
        self.calls += 1
        if self.calls == 3:
            raise self.error
        return scores


def fail_in_generate(model: Any, inputs: dict[str, torch.Tensor], error: BaseException) -> None:
    model.generate(**inputs, max_new_tokens=5, do_sample=False, logits_processor=[Boom(error)])


def fail_in_layer(model: Any, inputs: dict[str, torch.Tensor], error: BaseException) -> None:
    def hook(*_: Any) -> None:
        raise error

    handle = model.get_decoder().layers[2].mlp.register_forward_pre_hook(hook)
    try:
        model(**inputs)
    finally:
        handle.remove()


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("fail", [fail_in_generate, fail_in_layer])
@pytest.mark.parametrize("name", ["fastv", "var", "vhr", "vcd"])
def test_failure_leaves_nothing(name: str, fail: Any, error: BaseException) -> None:
    model, inputs = models.build_llava(4), models.padded().inputs()
    (_, logits, _), before = greedy(model, inputs), fingerprint(model)
    method = vlm_attn.method(name, **MATRIX[name].default)
    with vlm_attn.attach(model, method):
        _, expected, expected_scores = greedy(model, inputs)

    def run() -> None:
        with vlm_attn.attach(model, method):
            fail(model, inputs, error)

    with pytest.raises(type(error)):
        run()
    assert fingerprint(model) == before
    assert torch.equal(greedy(model, inputs)[1], logits)
    with vlm_attn.attach(model, method):
        with pytest.raises(type(error)):
            fail(model, inputs, error)
        _, again, again_scores = greedy(model, inputs)  # the session itself is still good
    assert torch.equal(again, expected)
    assert torch.equal(again_scores, expected_scores)


def test_failed_attach_takes_everything_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.build_llava(4)
    before = fingerprint(model)

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("no")

    lm = model.get_decoder()
    monkeypatch.setattr(type(lm), "register_forward_hook", broken)
    with pytest.raises(RuntimeError, match="no"):
        vlm_attn.attach(model, "noop")
    monkeypatch.undo()
    assert fingerprint(model) == before
    with vlm_attn.attach(model, "noop"):
        pass
    assert fingerprint(model) == before


class StopAt(StoppingCriteria):
    """Stops once `count` tokens stand behind the prompt."""

    def __init__(self, prompt: int, count: int) -> None:
        self.limit = prompt + count

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """True for every finished row."""
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.limit)


@pytest.mark.parametrize("name", [n for n in METHODS if MATRIX[n].acts_on != "picture"])
def test_stopping_criteria(name: str) -> None:
    model, inputs = models.llava(4), models.padded().inputs()
    width = inputs["input_ids"].shape[1]
    with vlm_attn.attach(model, vlm_attn.method(name, **MATRIX[name].default)):
        whole, _, _ = greedy(model, inputs)
        stopped, _, _ = greedy(model, inputs, stopping_criteria=[StopAt(width, 3)])
    assert torch.equal(stopped, whole[:, :3])
