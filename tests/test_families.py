"""Every family: the generic checks on one method per stage, mixed batches, videos, precisions, dispatched models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from torch import Tensor
from transformers import AutoProcessor

import vlm_attn
from tests.conftest import FLEX
from vlm_attn.errors import AttachError, UnsupportedError
from vlm_attn.families import ADAPTERS, UNSUPPORTED, checks
from vlm_attn.families.checks import bench, check, distance, trace
from vlm_attn.families.zoo import SPECIMENS, Sample
from vlm_attn.profiles import BUNDLED

ROWS = {row.name: row for row in vlm_attn.methods()}
ONE_PER_STAGE = ("fastv", "random_prune", "var", "vhr", "vcd")
TYPICAL = ("llava_next", "qwen2_5_vl", "internvl", "smolvlm", "gemma3")


def test_every_adapter_has_a_specimen() -> None:
    assert set(ADAPTERS) == set(SPECIMENS)
    assert not set(ADAPTERS) & set(UNSUPPORTED)
    assert len(ADAPTERS) >= 24


@pytest.mark.parametrize("name", ONE_PER_STAGE)
@pytest.mark.parametrize("family", ADAPTERS)
def test_cell(family: str, name: str) -> None:
    cell = check(family, "sdpa", ROWS[name])
    assert cell.status in ("executed", "refused"), cell.detail
    # A refusal is the family's own sentence, or the method's about this model; never a stray exception.
    assert cell.status == "executed" or len(cell.detail) > 30
    assert (cell.stage in ADAPTERS[family].refused) <= (cell.status == "refused")
    if "needs transformers" in cell.detail:
        pytest.skip(cell.detail)


@pytest.mark.parametrize("name", ["fastv", "var", "vcd"])
@pytest.mark.parametrize("backend", ["eager", FLEX])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "paligemma", "llava_next"])
def test_cell_with_other_backends(family: str, backend: str, name: str) -> None:
    with torch.compiler.set_stance("force_eager"):
        cell = check(family, backend, ROWS[name])
    if "transformers itself" in cell.detail:
        pytest.skip(cell.detail)
    assert cell.status == "executed", cell.detail


@pytest.mark.parametrize("name", ["fastv", "random_prune", "var"])
@pytest.mark.parametrize("family", TYPICAL)
def test_rows_of_a_batch_are_the_singles(family: str, name: str) -> None:
    """Three unequal rows (two with other pictures, one with two) against the same rows alone."""
    cell = check(family, "sdpa", ROWS[name])
    assert cell.figures["rows alone"] <= 1e-5


def scores_alone(model: Any, family: str, sample: Sample, like: Tensor) -> tuple[float, float]:
    """Distance of the first step of `like [V]` from the sample alone, and whether it answers at all."""
    alone = trace(model, SPECIMENS[family].inputs([sample]), 1)[2][0, 0]
    return distance(like, alone), float(like.isfinite().any())


@pytest.mark.parametrize("name", ["fastv", "random_prune", "var", "vhr", "vcd"])
@pytest.mark.parametrize("family", TYPICAL)
def test_words_beside_pictures(family: str, name: str) -> None:
    """A row without a picture beside rows with one and two: each gives what it gives alone."""
    two = ((70, 56), (56, 90)) if SPECIMENS[family].several else ((70, 56),)
    samples = [Sample(pictures=(), seed=3), Sample(pictures=two, seed=4), Sample(after=10, seed=5)]
    model = bench(family, "sdpa").model
    with vlm_attn.attach(model, name, profile=bench(family, "sdpa").profile):
        together = trace(model, SPECIMENS[family].inputs(samples), 1)[2][0]
        for row, sample in enumerate(samples):
            apart, answers = scores_alone(model, family, sample, together[row])
            assert answers
            assert apart <= 1e-4, row


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the processors themselves
@pytest.mark.parametrize("name", ["noop", "fastv", "vhr", "vcd"])
@pytest.mark.parametrize("family", [name for name, s in SPECIMENS.items() if s.video and name in ADAPTERS])
def test_video(family: str, name: str) -> None:
    """Frames are views of one item; the stock answer without a method, another one with it; rows stay apart."""
    try:
        model, specimen = bench(family, "sdpa").model, SPECIMENS[family]
    except UnsupportedError as refusal:
        pytest.skip(str(refusal))
    clip, longer = Sample(frames=4, seed=6), Sample(frames=4, seed=7, after=9)
    inputs = specimen.inputs([clip])
    _, _, stock = trace(model, inputs, 2)
    try:
        with vlm_attn.attach(model, name, profile=bench(family, "sdpa").profile) as session:
            _, _, scores = trace(model, inputs, 2)
            layout, layouts = session.last.tokens.layouts[0][0], session.last.tokens.images(0)
            mixed = trace(model, specimen.inputs([clip, longer]), 1)[2][0]
    except UnsupportedError as refusal:
        pytest.skip(f"refused: {refusal}")
    # Some processors lay frames out as pictures, which is what the model sees.
    assert layout.video or layouts == clip.frames
    assert (distance(scores, stock) <= 1e-5) == (name == "noop")
    assert distance(mixed[0], scores[0, 0]) <= 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_half_precision(family: str, dtype: torch.dtype) -> None:
    model = SPECIMENS[family].build(dtype=dtype)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in SPECIMENS[family].inputs([Sample()]).items()}
    _, stock, _ = trace(model, inputs, 3)
    for name in ("fastv", "var", "vhr", "vcd"):
        with vlm_attn.attach(model, ROWS[name].neutral()):
            assert torch.equal(trace(model, inputs, 3)[1], stock), name
        with vlm_attn.attach(model, name, profile=bench(family, "sdpa").profile):
            _, logits, scores = trace(model, inputs, 3)
        assert logits.isfinite().all(), name
        assert not torch.equal(scores.float(), stock.float()), name


def spread(model: Any, folder: Path, how: str) -> Any:
    if how == "disk":
        return disk_offload(model, folder, execution_device=torch.device("cpu"))
    if how == "cpu":
        return cpu_offload(model, execution_device=torch.device("cpu"))
    return dispatch_model(model, {"": "cpu"}, force_hooks=True)


@pytest.mark.parametrize("how", ["disk", "cpu", "dispatched"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_dispatched_models(family: str, how: str, tmp_path: Path) -> None:
    """Weights on `meta` between the calls of their module: nobody may read them in a hook."""
    specimen, inputs = SPECIMENS[family], SPECIMENS[family].inputs([Sample(), Sample(seed=1, after=8)])
    for name in ("fastv", "var", "vhr", "vcd"):
        model = specimen.build()
        with vlm_attn.attach(model, name, profile=bench(family, "sdpa").profile):
            _, _, expected = trace(model, inputs, 3)
        model = spread(model, tmp_path / name, how)
        with vlm_attn.attach(model, name, profile=bench(family, "sdpa").profile):
            _, _, scores = trace(model, inputs, 3)
        assert distance(scores, expected) <= 1e-5, name


class Packed(torch.nn.Module):
    """A linear layer whose weight is int8 and not named as one expects, as quantised checkpoints have it."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("codes", (linear.weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        """`x (codes * scale)^T`"""
        return x @ (self.codes.to(x.dtype) * self.scale).T


def test_packed_weights() -> None:
    model, inputs = SPECIMENS["llava"].build(), SPECIMENS["llava"].inputs([Sample()])
    for layer in model.get_decoder().layers:
        for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(layer.self_attn, part, Packed(getattr(layer.self_attn, part)))
    _, stock, _ = trace(model, inputs, 3)
    for name in ("fastv", "var", "vhr", "vcd"):
        with vlm_attn.attach(model, ROWS[name].neutral()):
            assert distance(trace(model, inputs, 3)[1], stock) <= 1e-5, name
        with vlm_attn.attach(model, name, profile=bench("llava", "sdpa").profile):
            assert distance(trace(model, inputs, 3)[2], stock) > 1e-4, name


# ------------------------------------------------------------------------------------------------- what is refused


def test_compiled_model_is_refused() -> None:
    model = SPECIMENS["llava"].build()
    with pytest.raises(AttachError, match="compiled.*attach to the plain model first"):
        vlm_attn.attach(torch.compile(model), "fastv")
    model.compile()
    with pytest.raises(AttachError, match="compiled.*attach to the plain model first"):
        vlm_attn.attach(model, "fastv")


def test_compiling_an_attached_model_keeps_the_method() -> None:
    model, inputs = SPECIMENS["llava"].build(), SPECIMENS["llava"].inputs([Sample()])
    stock = model(**inputs).logits[:, -1]
    with vlm_attn.attach(model, "fastv"):
        expected = model(**inputs).logits[:, -1]
        compiled = torch.compile(model, backend="eager")(**inputs).logits[:, -1]
    assert distance(compiled, expected) <= 1e-5
    assert distance(expected, stock) > 1e-3
    torch._dynamo.reset()


@pytest.mark.parametrize("part", ["self_attn", "o_proj", "layers"])
def test_renamed_part_is_named(part: str) -> None:
    model = SPECIMENS["qwen2_5_vl"].build()
    decoder = model.get_decoder()
    owner = {"self_attn": decoder.layers[1], "o_proj": decoder.layers[1].self_attn, "layers": decoder}[part]
    setattr(owner, "renamed", getattr(owner, part))  # noqa: B010
    delattr(owner, part)
    with pytest.raises(AttachError, match=part):
        vlm_attn.attach(model, "noop")


def test_wrong_processor_is_named() -> None:
    model, own = SPECIMENS["qwen2_5_vl"].build(), SPECIMENS["qwen2_5_vl"].processor()
    other = AutoProcessor.from_pretrained(BUNDLED["scenes"])  # its tokenizer has a word at the model's placeholder id
    for processor, message in (
        (other, r"LlavaProcessor.*does not belong to the model \(qwen2_5_vl\): token 99"),
        (own.tokenizer, "a tokenizer alone"),
        (own.image_processor, "an image processor alone"),
    ):
        with pytest.raises(AttachError, match=message):
            vlm_attn.wrap(model, "noop", processor=processor)
    vlm_attn.wrap(model, "noop", processor=own).close()


@pytest.mark.parametrize("family", sorted(UNSUPPORTED))
def test_unsupported_families_say_why(family: str) -> None:
    assert len(UNSUPPORTED[family]) > 30


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "internvl", "smolvlm", "gemma3", "llava_next"])
@pytest.mark.parametrize("change", ["too few", "too many"])
def test_placeholders_that_do_not_match(family: str, change: str) -> None:
    model, inputs = bench(family, "sdpa").model, dict(SPECIMENS[family].inputs([Sample()]))
    ids = inputs["input_ids"].clone()
    image_id = model.config.image_token_id
    at = int((ids[0] == image_id).nonzero()[0, 0])
    ids[0, at if change == "too few" else -1] = 5 if change == "too few" else image_id
    with vlm_attn.attach(model, "fastv"), pytest.raises((ValueError, IndexError, RuntimeError)) as caught:
        model.generate(**{**inputs, "input_ids": ids}, max_new_tokens=2)
    assert "token" in str(caught.value) or "placeholder" in str(caught.value)
    with vlm_attn.attach(model, "fastv"):  # nothing is left of the failed request
        trace(model, inputs, 1)


def test_long_prompt_beyond_a_sliding_window_is_refused() -> None:
    specimen = SPECIMENS["gemma3"]
    model, inputs = specimen.build(sliding_window=40), specimen.inputs([Sample(after=12)])
    trace(model, inputs, 2)
    with vlm_attn.attach(model, "fastv"), pytest.raises(UnsupportedError, match="sliding window of 40"):
        model.generate(**inputs, max_new_tokens=20)


def test_probe_catches_attention_that_goes_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    model = SPECIMENS["llava"].build()
    attention = model.get_decoder().layers[2].self_attn
    monkeypatch.setattr(attention, "forward", lambda hidden_states, **_: (hidden_states, None))
    with pytest.raises(AttachError, match="decoder layer 2 does not call the attention function"):
        vlm_attn.attach(model, "noop")


def test_checks_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """A neutral strength that is none, and a default that changes nothing, are both findings."""
    row = ROWS["fastv"]
    monkeypatch.setattr(row.cls, "neutral", classmethod(lambda cls: cls(layer=1, keep=0.5)))
    assert "neutral" in checks.check("llava", "sdpa", row).detail
    monkeypatch.undo()
    monkeypatch.setattr(row.cls, "keep_mask", lambda self, view: view.tokens.vis)
    assert "changes nothing" in checks.check("llava", "sdpa", row).detail
