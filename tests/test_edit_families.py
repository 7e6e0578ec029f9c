"""Every attention edit on families that differ: nothing at neutral strength, the dense reference's logits at work."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from torch import Tensor

import vlm_attn
from tests.matrix import GIFT, HEADS, MATRIX
from tests.reference.edits_family import Applied
from tests.runs import greedy
from tests.test_truth import MARGIN
from vlm_attn.families.checks import distance
from vlm_attn.families.zoo import SPECIMENS, Sample

STEPS = 4  # the prefill and three decode steps
TOLERANCE = 1e-4
FAMILIES = ("llava_next", "qwen2_5_vl", "internvl")  # a canvas with row ends, M-RoPE, tiles
ENCODERS = ("vipllava", "paligemma", "deepseek_vl")  # a visual token per patch; with and without a class token
ONE = Sample(pictures=((80, 56),), before=4, after=9, seed=5)
TWO = Sample(pictures=((80, 56), (56, 80)), before=4, after=7, seed=6)
SINKS = {"sink_dims": (3, 7, 11, 20, 33), "tau": 1.0, "visual_mass_min": 0.02, "rho_nonsink": 0.1, "first_layer": 0}
PARAMETERS: dict[str, dict[str, Any]] = {
    "var": SINKS,
    "pai": {"gamma": 1.0, "alpha": 0.5, "first_layer": 1},
    "paint": {"spatial_ratio": 0.1, "iqr_factor": 0.5, "first_layer": 0},
    "vaf": {"enh": 1.5, "sup": 0.6},
    "vas_boost": {"image": 0.5, "system": 0.4},
    "zerotuning": {"gamma": 3.0, "heads": HEADS},
    "adhh": {"heads": HEADS, "threshold": 0.05},
    "head_gate": {"heads": HEADS, "mode": "block", "where": "text"},
    "act": {"heads": HEADS, "alpha": 2.0, "first_layer": 0},
    "gift": {**GIFT, "saliency_layer": 2, "enhance_layers": [1, 3], "alpha": 2.0},
    "ilvad": {"tau": 1.5, "first_layer": 1, "draft": 4},
    "sofa": {},
}
CASES = [(name, family) for name in PARAMETERS for family in (ENCODERS if name == "paint" else FAMILIES)]


@functools.cache
def model_of(family: str) -> Any:
    return SPECIMENS[family].build()


@functools.cache
def inputs_of(family: str, pictures: int) -> dict[str, Tensor]:
    return SPECIMENS[family].inputs([ONE if pictures == 1 else TWO])


@functools.cache
def stock_of(family: str, pictures: int) -> Tensor:
    return greedy(model_of(family), inputs_of(family, pictures), STEPS)[1]


@pytest.mark.parametrize(("name", "family"), CASES, ids=[f"{n}-{f}" for n, f in CASES])
def test_truth_identity_and_effect(name: str, family: str) -> None:
    """VHR's own references on families are in test_truth_families.py."""
    model, params, pictures = model_of(family), PARAMETERS[name], MATRIX[name].pictures
    inputs, stock = inputs_of(family, pictures), stock_of(family, pictures)
    with vlm_attn.attach(model, type(vlm_attn.method(name, **params)).neutral()):
        assert distance(greedy(model, inputs, STEPS)[1], stock) <= 1e-5
    with vlm_attn.attach(model, vlm_attn.method(name, **params)) as session:
        tokens, logits, _ = greedy(model, inputs, STEPS)
        last = session.last
    part = MATRIX[name].reference(model, params, last, 0)
    expected = Applied(model, part).answer(inputs, tokens[0])
    assert getattr(part, "margin", 1.0) > MARGIN
    assert distance(logits[:, 0], expected) <= TOLERANCE
    assert distance(logits, stock) > 10 * TOLERANCE
