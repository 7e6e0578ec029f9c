"""Keep-all is bit-exact and removal is masking, on plain pictures, tiles, M-RoPE and DeepStack, batches of three."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

import vlm_attn
from tests.runs import distance, greedy
from vlm_attn.families.zoo import SPECIMENS, Sample
from vlm_attn.registry import methods

FAMILIES = ["llava", "llava_next", "qwen2_5_vl", "qwen3_vl"]
BACKENDS = ["sdpa", "eager"]
# Three prompts of different lengths; two pictures, one and one.
THREE = [Sample(pictures=((56, 84), (112, 56)), seed=2, before=5, after=9), Sample(seed=1), Sample(seed=8, after=12)]
STEPS = 6  # the prefill and five decode steps


@functools.cache
def built(family: str, backend: str) -> Any:
    """Random weights."""
    return SPECIMENS[family].build(backend=backend)


@functools.cache
def prompts(family: str) -> dict[str, Tensor]:
    """The batch, left-padded."""
    inputs = SPECIMENS[family].inputs(THREE)
    assert len(set(inputs["attention_mask"].sum(1).tolist())) == 3
    return inputs


@functools.cache
def stock(family: str, backend: str) -> Tensor:
    """Logits `[steps, B, V]` of the unwrapped model."""
    return greedy(built(family, backend), prompts(family), STEPS)[1]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_everything_is_bit_exact(family: str, backend: str) -> None:
    """Every pruning method that the family supports, at its neutral strength."""
    expected, ran = stock(family, backend), 0
    for row in methods():
        if row.stage != "prune":
            continue
        try:
            with vlm_attn.attach(built(family, backend), row.neutral(), SPECIMENS[family].processor()):
                _, logits, _ = greedy(built(family, backend), prompts(family), 2)
        except vlm_attn.errors.UnsupportedError:
            continue  # by name; which ones is the support record's business
        ran += 1
        assert torch.equal(logits, expected[:2]), row.name
    assert ran >= 8


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_removal_is_masking(family: str, layer: int, backend: str) -> None:
    """The set that a method keeps, once removed and once only hidden from every later query, prefill and decoding."""
    model, inputs = built(family, backend), prompts(family)
    method = (
        vlm_attn.method("divprune", keep=0.3, positions="keep")
        if layer == 0
        else vlm_attn.method("fastv", layer=layer, keep=0.3)
    )
    with vlm_attn.attach(model, method) as session:
        tokens, logits, _ = greedy(model, inputs, STEPS)
        roles, left = session.last.tokens, session.last.stages[-1].tokens
    kept = torch.zeros_like(roles.vis)
    for row in range(roles.batch):
        kept[row, left.index[row][left.vis[row]]] = True
    dropped = roles.vis & ~kept
    assert (dropped.sum(1) > 8).all()
    assert distance(logits, masked(model, inputs, tokens, dropped, layer)) <= 1e-5
    assert distance(stock(family, backend)[0], logits[0]) > 1e-3


def masked(model: Any, inputs: dict[str, Tensor], tokens: Tensor, dropped: Tensor, layer: int) -> Tensor:
    """Logits `[steps, B, V]` of the stock model on the same answer; from `layer` on nobody sees dropped keys."""
    prompt = inputs["input_ids"].shape[1]

    def hide(module: Any, args: Any, kwargs: Any) -> Any:
        mask = kwargs["attention_mask"]
        gone = torch.zeros(len(dropped), mask.shape[-1], dtype=torch.bool)
        gone[:, :prompt] = dropped
        gone = gone[:, None, None]
        return args, {**kwargs, "attention_mask": mask & ~gone if mask.dtype == torch.bool else mask - 1e9 * gone}

    def dictate(ids: Tensor, scores: Tensor) -> Tensor:
        return torch.full_like(scores, -torch.inf).scatter(1, tokens[:, ids.shape[1] - prompt][:, None], 0.0)

    layers = model.get_decoder().layers[layer:]
    hooks = [module.register_forward_pre_hook(hide, with_kwargs=True) for module in layers]
    try:
        return greedy(model, inputs, tokens.shape[1], logits_processor=[dictate])[1]
    finally:
        for hook in hooks:
            hook.remove()
