"""PAI's guidance: the scores of `generate` against two dense streams, the text-only one without the edit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import vlm_attn
from tests import models
from tests.reference.edits_logits import Pai
from tests.reference.llava import Dense, image_features
from tests.runs import distance, greedy
from vlm_attn.errors import UnsupportedError


@pytest.mark.parametrize("kind", ["single", "padded", "two_images"])
@pytest.mark.parametrize("params", [{}, {"gamma": 2.0, "plausibility": 0.01, "alpha": 0.5}])
def test_guidance_is_two_streams(kind: str, params: dict[str, Any]) -> None:
    model, batch = models.llava(4), models.BATCHES[kind]()
    method = vlm_attn.method("pai", **params)
    with vlm_attn.attach(model, method):
        tokens, _, scores = greedy(model, batch.inputs())
    for row, sample in enumerate(batch.samples):
        forced = tokens[row, :-1]
        edited = Pai(model, method.alpha).run(sample.ids, image_features(model, sample.pixels), forced)
        text = Dense(model).run(sample.ids[~sample.visual], None, forced)
        s, u = edited.log_softmax(-1), text.log_softmax(-1)
        expected = method.gamma * (s - u) + u
        for step in range(len(s)):
            floor = float(s[step].max()) + math.log(method.plausibility)
            expected[step, s[step] < floor] = -math.inf
        assert distance(scores[:, row], expected) <= 1e-4


def test_guidance_refuses_beams_and_a_second_contrast() -> None:
    model = models.llava(4)
    with vlm_attn.attach(model, "pai"), pytest.raises(UnsupportedError, match="pai.*num_beams=1"):
        model.generate(**models.single().inputs(), max_new_tokens=2, num_beams=2)
    with pytest.raises(ValueError, match="pai and vcd"):
        vlm_attn.attach(model, ["pai", "vcd"])


def test_without_guidance_no_second_stream_runs() -> None:
    model, inputs = models.llava(4), models.single().inputs()
    with vlm_attn.attach(model, vlm_attn.method("pai", gamma=1.0)):
        _, logits, scores = greedy(model, inputs, 2)
    assert torch.equal(logits, scores)
