"""The shipped model: every method against its dense reference on real pictures, and through transformers' pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

import vlm_attn
from tests import models
from tests.matrix import MATRIX, TENSOR_METHODS
from tests.reference.contrast import vcd
from tests.reference.llava import image_features
from tests.runs import distance, greedy
from tests.test_truth import MARGIN, TOLERANCE
from vlm_attn import scenes

CHECKPOINT = Path(vlm_attn.__file__).parent / "scenes" / "checkpoint"
pytestmark = pytest.mark.skipif(
    not (CHECKPOINT / "model.safetensors").is_file(), reason="the scenes checkpoint is not in this tree"
)
QUESTIONS = ("Is there a dog in the image?", "Describe the image.")


@pytest.fixture(scope="module")
def shipped() -> Iterator[Any]:
    model = AutoModelForImageTextToText.from_pretrained(CHECKPOINT, dtype=torch.float32).eval().requires_grad_(False)
    model.generation_config.eos_token_id = None
    with vlm_attn.wrap(model, processor=AutoProcessor.from_pretrained(CHECKPOINT)) as vlm:
        yield vlm


def prompt(vlm: Any, seed: int, question: str) -> models.Sample:
    inputs = vlm.inputs([scenes.make_scene(seed).image], question)
    return models.Sample(inputs["input_ids"][0], inputs["pixel_values"])


def set_default(name: str, vlm: Any) -> None:
    """The method with the checkpoint's own data, where its profile holds them."""
    params = MATRIX[name].default
    vlm.set_method(vlm_attn.method(name, **({} if "sink_dims" in params else params)))


def parameters(name: str, vlm: Any) -> dict[str, Any]:
    """What the reference needs to know: the profile's data spelled out."""
    set_default(name, vlm)
    values = vlm.methods[0].to_dict()
    return {key: values[key] for key in ("sink_dims", "tau", *MATRIX[name].default) if key in values}


TIED_ON_SCENE_3 = ("gift", "illava", "tome")  # two heads, or two patches of one colour


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("name", TENSOR_METHODS)
def test_logits_are_the_references(shipped: Any, name: str, question: str) -> None:
    known = parameters(name, shipped)
    sample = prompt(shipped, 6 if name in TIED_ON_SCENE_3 else 3, question)
    tokens, logits, _ = greedy(shipped.model, sample.inputs())
    last = shipped.session.last
    shipped.set_method(None)
    reference = MATRIX[name].reference(shipped.model, known, last, 0)
    reference.pixels = sample.pixels
    expected = reference.run(sample.ids, image_features(shipped.model, sample.pixels), tokens[0, :-1])
    assert getattr(reference, "margin", 1.0) > MARGIN
    assert distance(logits[:, 0], expected) <= TOLERANCE
    if name == "fastv":
        assert torch.equal(last.kept(2)[0], torch.cat(reference.kept))


def test_contrast_is_the_reference(shipped: Any) -> None:
    shipped.set_method("vcd")
    sample = prompt(shipped, 4, QUESTIONS[0])
    tokens, _, scores = greedy(shipped.model, sample.inputs(), 4)
    noised = torch.stack([shipped.methods[0].alter_pixels(picture) for picture in sample.pixels])
    shipped.set_method(None)
    expected = vcd(shipped.model, sample.ids, sample.pixels, noised, tokens[0, :-1].tolist(), 1.0, 0.1)
    assert distance(scores[:, 0], expected) <= TOLERANCE


@pytest.mark.parametrize("name", [n for n, r in sorted(MATRIX.items()) if (r.acts_on, r.pictures) == ("logits", 1)])
def test_default_strength_acts(shipped: Any, name: str) -> None:
    sample = prompt(shipped, 5, QUESTIONS[0])
    shipped.set_method(None)
    _, stock, _ = greedy(shipped.model, sample.inputs(), 3)
    set_default(name, shipped)
    _, changed, _ = greedy(shipped.model, sample.inputs(), 3)
    assert distance(changed, stock) > 1e-4


def test_prompts_of_a_batch_equal_singles(shipped: Any) -> None:
    samples = [prompt(shipped, 6, QUESTIONS[0]), prompt(shipped, 7, QUESTIONS[1])]
    assert len(samples[0].ids) != len(samples[1].ids)
    inputs = models.Batch(samples).inputs()
    pad = shipped.processor.tokenizer.pad_token_id
    inputs["input_ids"][inputs["attention_mask"] == 0] = pad
    for name in ("fastv", "vhr", "vcd"):
        shipped.set_method(name)
        _, _, together = greedy(shipped.model, inputs, 3)
        for row, sample in enumerate(samples):
            _, _, alone = greedy(shipped.model, sample.inputs(), 3)
            assert distance(together[:, row], alone[:, 0]) <= 1e-5


@pytest.mark.parametrize("name", [None, "fastv", "vcd"])
def test_pipeline_object_takes_the_wrapped_model(shipped: Any, name: str | None) -> None:
    """The ordinary pipeline gives what `ask` gives."""
    shipped.set_method(name)
    image = scenes.make_scene(8).image
    pipe = pipeline("image-text-to-text", model=shipped.model, processor=shipped.processor)
    content = [{"type": "image", "image": image}, {"type": "text", "text": QUESTIONS[1]}]
    out = pipe(
        text=[{"role": "user", "content": content}], return_full_text=False,
        generate_kwargs={"max_new_tokens": 6, "do_sample": False},
    )  # fmt: skip
    answer = shipped.ask(image, QUESTIONS[1], max_new_tokens=6)
    assert out[0]["generated_text"].strip() == answer.text
