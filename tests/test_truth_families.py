"""Methods against dense references on families that differ: tiles, M-RoPE, DeepStack, bidirectional prefixes."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

import vlm_attn
from tests.reference import family as reference
from tests.reference.contrast import contrast
from vlm_attn.families import resolve
from vlm_attn.families.checks import distance, trace
from vlm_attn.families.zoo import SPECIMENS, Sample
from vlm_attn.families.zoo.base import BOS, FIRST_WORD, LAST_WORD

STEPS = 6  # the prefill and five decode steps
TOLERANCE = 1e-4
FAMILIES = ("llava_next", "qwen2_5_vl", "qwen3_vl", "internvl", "smolvlm", "paligemma", "gemma3")
ONE = Sample(pictures=((80, 56),), before=4, after=7, seed=5)
TWO = Sample(pictures=((80, 56), (56, 100)), before=4, after=7, seed=6)
SAMPLES = {
    **{name: (name, ONE) for name in FAMILIES},
    **{f"{name} two pictures": (name, TWO) for name in FAMILIES if SPECIMENS[name].several},
}


@functools.cache
def model_of(name: str) -> Any:
    return SPECIMENS[name].build()


@functools.cache
def inputs_of(case: str) -> dict[str, Tensor]:
    name, sample = SAMPLES[case]
    return SPECIMENS[name].inputs([sample])


def per_picture(case: str) -> list[int]:
    """Visual tokens of each picture, from prompts with that picture alone."""
    name, sample = SAMPLES[case]
    image_id = model_of(name).config.image_token_id
    alone = [SPECIMENS[name].inputs([Sample(pictures=(size,))])["input_ids"] for size in sample.pictures]
    return [int((ids == image_id).sum()) for ids in alone]


def attached(case: str, method: Any) -> tuple[Any, Tensor, Tensor, Tensor]:
    """Last request, tokens, logits `[STEPS, V]` and scores of the wrapped model."""
    model = model_of(SAMPLES[case][0])
    with vlm_attn.attach(model, method) as session:
        tokens, logits, scores = trace(model, inputs_of(case), STEPS)
        return session.last, tokens[0], logits[:, 0], scores[:, 0]


@pytest.mark.parametrize("case", SAMPLES)
def test_unwrapped(case: str) -> None:
    """The reference without a method is the stock model: whatever differs below, the method does."""
    model = model_of(SAMPLES[case][0])
    tokens, logits, _ = trace(model, inputs_of(case), STEPS)
    assert distance(reference.OnModel(model).answer(inputs_of(case), tokens[0]), logits[:, 0]) <= 1e-5


@pytest.mark.parametrize("case", SAMPLES)
@pytest.mark.parametrize("params", [{}, {"layer": 1, "keep": 2}, {"layer": 3, "keep": 0.25}], ids=str)
def test_fastv(case: str, params: dict[str, Any]) -> None:
    last, tokens, logits, _ = attached(case, vlm_attn.method("fastv", **params))
    row_ends = last.tokens.vis[0] & (last.tokens.frame[0] < 0)  # their places are tested in test_family_tiles.py
    dense = reference.FastV(model_of(SAMPLES[case][0]), per_picture(case), row_ends, **params)
    assert distance(logits, dense.answer(inputs_of(case), tokens)) <= TOLERANCE
    assert dense.kept is not None
    assert last.kept(dense.layer)[0].tolist() == torch.cat(dense.kept).tolist()
    assert len(last.kept(dense.layer)[0]) < int(dense.visual.sum())


@pytest.mark.parametrize("case", SAMPLES)
def test_var(case: str) -> None:
    # Sinks and rows enough for a random model of few visual tokens.
    sinks = {"sink_dims": (3, 7, 11, 20, 33), "tau": 1.0}
    params = {**sinks, "visual_mass_min": 0.02, "rho_nonsink": 0.1, "first_layer": 0}
    last, tokens, logits, _ = attached(case, vlm_attn.method("var", **params))
    dense = reference.Var(model_of(SAMPLES[case][0]), **params)
    assert distance(logits, dense.answer(inputs_of(case), tokens)) <= TOLERANCE
    assert dense.edited > 0
    assert sum(last.edited.values()) == dense.edited


@pytest.mark.parametrize("case", SAMPLES)
def test_vhr(case: str) -> None:
    name, sample = SAMPLES[case]
    words = [word for run in sample.words() for word in run]
    ids = inputs_of(case)["input_ids"][0]
    text = torch.tensor([[*([BOS] if BOS in ids else []), *words]])
    text_inputs = {"input_ids": text, "attention_mask": torch.ones_like(text)}
    if "token_type_ids" in inputs_of(case):
        text_inputs["token_type_ids"] = torch.zeros_like(text)
    _, tokens, logits, _ = attached(case, "vhr")
    dense = reference.Vhr(model_of(name), text_inputs)
    assert distance(logits, dense.answer(inputs_of(case), tokens)) <= TOLERANCE
    assert any(len(heads) for heads in dense.selected.values())


@pytest.mark.parametrize("case", SAMPLES)
def test_vcd(case: str) -> None:
    model, inputs = model_of(SAMPLES[case][0]), inputs_of(case)
    method = vlm_attn.method("vcd")
    _, tokens, logits, scores = attached(case, method)
    family = resolve(model)
    noised = inputs["pixel_values"].clone()
    with vlm_attn.attach(model, "noop") as session:
        trace(model, inputs, 1)
        media = session.last.media["image"]
    for picture in family.pictures(media, noised):
        picture.copy_(method.alter_pixels(picture))
    assert not torch.equal(noised, inputs["pixel_values"])
    plain = reference.OnModel(model).answer(inputs, tokens)
    other = reference.OnModel(model).answer({**inputs, "pixel_values": noised}, tokens)
    expected = torch.stack([contrast(a, b, 1.0, 0.1) for a, b in zip(plain, other, strict=True)])
    assert distance(logits, plain) <= TOLERANCE
    assert distance(scores, expected) <= TOLERANCE


@pytest.mark.parametrize("case", SAMPLES)
def test_text_only_prompt_holds_the_words(case: str) -> None:
    """What stays when the picture leaves: the words (and the start token), none of the tokens that framed it."""
    name, sample = SAMPLES[case]
    inputs = inputs_of(case)
    ids, mask = resolve(model_of(name)).text_only(inputs["input_ids"], inputs["attention_mask"])
    left = ids[0][mask[0].bool()].tolist()
    assert [i for i in left if FIRST_WORD <= i <= LAST_WORD] == [word for run in sample.words() for word in run]
    assert all(FIRST_WORD <= i <= LAST_WORD or i == BOS for i in left)
