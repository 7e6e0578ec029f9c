"""Methods inside everything `generate` offers: effect, batches, beams, sampling, streaming, the pipeline."""

from __future__ import annotations

import itertools
import threading
from typing import Any

import pytest
import torch
from transformers import TextIteratorStreamer

import vlm_attn
from tests import models
from tests.matrix import MATRIX, TENSOR_METHODS
from tests.reference.llava import image_features
from tests.runs import distance, greedy

GENERATING = sorted(name for name in MATRIX if MATRIX[name].acts_on != "picture")
ACTIVE = [name for name in GENERATING if MATRIX[name].acts_on != "nothing"]


def default(name: str) -> Any:
    return vlm_attn.method(name, **MATRIX[name].default)


@pytest.mark.parametrize("name", ACTIVE)
def test_default_strength_acts(name: str, backend: str) -> None:
    """In every row: no method is silently off, and none acts on the first sample only."""
    model, inputs = models.llava(4, backend), MATRIX[name].batch.inputs()
    _, logits, scores = greedy(model, inputs, 3)
    with vlm_attn.attach(model, default(name)):
        _, with_logits, with_scores = greedy(model, inputs, 3)
    on_scores = MATRIX[name].acts_on == "scores"
    stock, changed = (scores, with_scores) if on_scores else (logits, with_logits)
    for row in range(2):
        assert distance(changed[:1, row], stock[:1, row]) > 1e-4


@pytest.mark.parametrize("name", GENERATING)
@pytest.mark.parametrize("batch", [models.padded, models.mixed])
def test_rows_of_a_batch_equal_singles(name: str, batch: Any) -> None:
    model, whole = models.llava(4), batch()
    with vlm_attn.attach(model, default(name)):
        together, logits, _ = greedy(model, whole.inputs())
        for row, sample in enumerate(whole.samples):
            alone, single, _ = greedy(model, sample.inputs())
            assert torch.equal(alone[0], together[row])
            # A matrix product of another shape rounds otherwise: the stock model is off by up to 9e-6 here.
            assert distance(logits[:, row], single[:, 0]) <= 3e-5


SINGLE_PRECISION = ("act", "tome")  # refuse double


@pytest.mark.parametrize("name", [n for n in GENERATING if n not in SINGLE_PRECISION])
@pytest.mark.parametrize("batch", [models.padded, models.mixed])
def test_rows_of_a_batch_equal_singles_beyond_rounding(name: str, batch: Any) -> None:
    """In double precision, where what is left are the parts that every method computes in fp32."""
    model, whole = models.build_llava(4).double(), batch()

    def logits(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return greedy(model, {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()})[1]

    with vlm_attn.attach(model, default(name)):
        together = logits(whole.inputs())
        for row, sample in enumerate(whole.samples):
            assert distance(together[:, row], logits(sample.inputs())[:, 0]) <= 5e-6


@pytest.mark.parametrize("name", [n for n in TENSOR_METHODS if not MATRIX[n].generates_only])
def test_beams_score_their_own_sequences(name: str) -> None:
    """The reported score of the best beam is what the dense reference gives for that very sequence."""
    row = MATRIX[name]
    model, batch, steps = models.llava(4), models.padded(), 4
    inputs = batch.inputs()
    with vlm_attn.attach(model, default(name)) as session:
        out = model.generate(
            **inputs, max_new_tokens=steps, num_beams=3, do_sample=False, return_dict_in_generate=True,
            output_scores=True, length_penalty=1.0,
        )  # fmt: skip
        last = session.last
    new = out.sequences[:, inputs["input_ids"].shape[1] :]
    for index, sample in enumerate(batch.samples):
        reference = row.reference(model, row.default, last, 3 * index)
        reference.pixels = sample.pixels
        logits = reference.run(sample.ids, image_features(model, sample.pixels), new[index, :-1])
        chosen = logits.log_softmax(-1)[torch.arange(steps), new[index]].sum() / steps
        assert abs(float(chosen - out.sequences_scores[index])) <= 1e-4 * float(logits.abs().max())


@pytest.mark.parametrize("name", GENERATING)
def test_sampling_is_seeded_by_torch(name: str) -> None:
    model, inputs = models.llava(4), models.padded().inputs()

    def sample(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return model.generate(**inputs, max_new_tokens=8, do_sample=True, top_k=0, temperature=3.0)

    stock = sample(0)
    with vlm_attn.attach(model, default(name)):
        first, second, third = sample(0), sample(0), sample(1)
    assert torch.equal(first, second)
    assert not torch.equal(first, third)
    if MATRIX[name].acts_on == "nothing":
        assert torch.equal(first, stock)


def test_several_return_sequences() -> None:
    model, inputs = models.llava(4), models.padded().inputs()
    with vlm_attn.attach(model, default("fastv")) as session:
        out = model.generate(**inputs, max_new_tokens=3, do_sample=True, num_return_sequences=2)
        kept = session.last.kept(2)
    assert len(out) == 4
    assert torch.equal(kept[0], kept[1])
    assert not torch.equal(kept[1], kept[2])


@pytest.mark.parametrize("name", GENERATING)
def test_streaming(name: str) -> None:
    model, inputs = models.llava(4), models.single().inputs()
    tokenizer = models.tiny_processor().tokenizer
    with vlm_attn.attach(model, default(name)):
        tokens, _, _ = greedy(model, inputs)
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
        kwargs = {**inputs, "max_new_tokens": 6, "do_sample": False, "streamer": streamer}
        thread = threading.Thread(target=model.generate, kwargs=kwargs)
        thread.start()
        text = "".join(streamer)
        thread.join()
    assert text == tokenizer.decode(tokens[0])


@pytest.mark.parametrize("name", GENERATING)
def test_second_request_starts_afresh(name: str) -> None:
    """Facts and state of one request do not leak into the next, of another length."""
    model = models.llava(4)
    first, second = models.padded().inputs(), models.two_images().inputs()
    with vlm_attn.attach(model, default(name)):
        _, alone, alone_scores = greedy(model, second)
    with vlm_attn.attach(model, default(name)):
        greedy(model, first)
        _, after, after_scores = greedy(model, second)
    assert torch.equal(after, alone)
    assert torch.equal(after_scores, alone_scores)


def test_two_models_do_not_mix() -> None:
    left, right = models.build_llava(4), models.build_llava(4, seed=1)
    inputs = models.single().inputs()
    _, plain, _ = greedy(right, inputs)
    with vlm_attn.attach(left, default("fastv")) as one:
        _, untouched, _ = greedy(right, inputs)
        with vlm_attn.attach(right, default("vhr")):
            _, changed, _ = greedy(right, inputs)
            greedy(left, inputs)
            assert one.last.stages
    assert torch.equal(untouched, plain)
    assert not torch.equal(changed, plain)


def test_prune_edit_and_contrast_run_together() -> None:
    model, inputs = models.llava(4), models.padded().inputs()
    names = ("fastv", "var", "vhr", "vcd")
    runs = []
    for count in range(len(names) + 1):
        with vlm_attn.attach(model, [default(n) for n in names[:count]]):
            runs.append(greedy(model, inputs, 3)[2])
    for one, two in itertools.pairwise(runs):
        assert not torch.equal(one, two)
