"""Compiled FlexAttention: one model, neutral and acting, against the dense reference.

Needs a CUDA device: on the CPU, torch 2.15 aborts the process inside the compiled kernel. The matrix runs
FlexAttention uncompiled, with the same masks and score functions.
"""

from __future__ import annotations

import pytest
import torch

import vlm_attn
from tests import models
from tests.matrix import MATRIX
from tests.reference.llava import image_features
from tests.runs import distance, greedy


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:_compile flag:DeprecationWarning")
def test_compiled() -> None:
    """Neutral within 1e-5 of stock, pruned and edited within 1e-4 of the reference, over prefill and two steps."""
    if not torch.cuda.is_available():
        pytest.skip("compiled FlexAttention needs a CUDA device, and there is none")
    model, sample = models.build_llava(4, backend="flex_attention").cuda(), models.sample(seed=1)
    inputs = {name: value.cuda() for name, value in sample.inputs().items()}
    _, stock, _ = greedy(model, inputs, 3)
    with vlm_attn.attach(model, "noop"):
        _, neutral, _ = greedy(model, inputs, 3)
    assert distance(neutral, stock) <= 1e-5
    method = [vlm_attn.method("fastv"), vlm_attn.method("vhr")]
    for one in method:
        with vlm_attn.attach(model, one) as session:
            tokens, logits, _ = greedy(model, inputs, 3)
        reference = MATRIX[one.name].reference
        assert reference is not None
        dense = reference(model, {}, session.last, 0)
        expected = dense.run(sample.ids.cuda(), image_features(model, sample.pixels.cuda()), tokens[0, :-1])
        assert distance(logits[:, 0], expected) <= 1e-4
    _, after, _ = greedy(model, inputs, 3)
    assert torch.equal(after, stock)
