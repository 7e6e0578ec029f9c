"""Bad input: each case gives a clear error that says what to do, or a defined result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

import vlm_attn
from tests import models
from tests.matrix import MATRIX, SINKS
from tests.runs import distance, fingerprint, greedy
from vlm_attn.errors import AttachError, MissingProfileError, UnsupportedError

# ------------------------------------------------------------------------------------------- names and parameters


@pytest.mark.parametrize(
    ("name", "closest"), [("fastvv", "fastv"), ("FastV", "fastv"), ("random-prune", "random_prune"), ("vrh", "vhr")]
)
def test_unknown_method_offers_the_closest(name: str, closest: str) -> None:
    with pytest.raises(ValueError, match=f"unknown method '{name}'; did you mean '{closest}'"):
        vlm_attn.method(name)


def test_hopeless_name_lists_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"unknown method 'qqqqqq' \(known: .*fastv.*vhr"):
        vlm_attn.method("qqqqqq")


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("fastv", {"layers": 2}, "no parameter 'layers'; did you mean 'layer'"),
        ("noop", {"strength": 1}, "it takes no parameters"),
        ("fastv", {"layer": "2"}, "layer='2'"),
        ("fastv", {"layer": 2.0}, "layer=2.0"),
        ("fastv", {"layer": True}, "layer=True"),
        ("fastv", {"layer": 0}, "layer=0"),
        ("fastv", {"layer": -1}, "layer=-1"),
        ("fastv", {"keep": 0}, "keep=0"),
        ("fastv", {"keep": -3}, "keep=-3"),
        ("fastv", {"keep": 1.5}, "keep=1.5"),
        ("fastv", {"keep": float("nan")}, "keep=nan"),
        ("fastv", {"keep": "half"}, "keep='half'"),
        ("fastv", {"keep": None}, "keep=None"),
        ("fastv", {"calibrate": ["exp_trnd"]}, "calibrate"),
        ("fastv", {"calibrate": "exp_trend"}, "calibrate"),
        ("fastv", {"sigma": float("inf")}, "sigma=inf"),
        ("random_prune", {"seed": -1}, "seed=-1"),
        ("random_prune", {"seed": 1.5}, "seed=1.5"),
        ("var", {**SINKS, "keep": 1.1}, "keep=1.1"),
        ("var", {**SINKS, "tau": float("nan")}, "tau=nan"),
        ("var", {**SINKS, "tau": -1.0}, "tau=-1.0"),
        ("var", {**SINKS, "rho_nonsink": -0.1}, "rho_nonsink=-0.1"),
        ("var", {**SINKS, "visual_mass_min": 2.0}, "visual_mass_min=2.0"),
        ("var", {"sink_dims": (-1,), "tau": 1.0}, "sink_dims"),
        ("vhr", {"alpha": float("nan")}, "alpha=nan"),
        ("vhr", {"alpha": -1.0}, "alpha=-1.0"),
        ("vhr", {"distance": "l1"}, "distance='l1'"),
        ("vcd", {"noise_step": 1000}, "noise_step=1000"),
        ("vcd", {"noise_step": -1}, "noise_step=-1"),
        ("vcd", {"beta": 0.0}, "beta=0.0"),
        ("vcd", {"beta": 1.5}, "beta=1.5"),
        ("vcd", {"alpha": -0.5}, "alpha=-0.5"),
        ("carve", {"top": 0.0}, "top=0.0"),
        ("carve", {"top": 1.2}, "top=1.2"),
        ("carve", {"regions": 0}, "regions=0"),
        ("carve", {"mode": "end"}, "mode='end'"),
        ("placebo", {"share": float("nan")}, "share=nan"),
    ],
)
def test_bad_parameters_are_named(name: str, params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=name) as caught:
        vlm_attn.method(name, **params)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("fastv", {"layer": 99}),
        ("random_prune", {"layer": 99}),
        ("uniform_prune", {"layer": 4}),
        ("var", {**SINKS, "first_layer": 99}),
        ("var", {"sink_dims": (64,), "tau": 1.0}),
        ("var", {"sink_dims": (), "tau": 1.0}),
        ("placebo", {"first_layer": 99}),
        ("vhr", {"last_layers": 99}),
        ("carve", {"layers": (99,)}),
    ],
)
def test_values_beyond_the_model_are_refused_at_attach(name: str, params: dict[str, Any]) -> None:
    model = models.build_llava(4)
    before = fingerprint(model)
    method = vlm_attn.method(name, **params)
    with pytest.raises(ValueError, match=f"{name}.*(99|64|4|sink_dims)"):
        vlm_attn.attach(model, method)
    assert fingerprint(model) == before


@pytest.mark.parametrize(
    ("name", "params"), [("var", {}), ("var", {"tau": 3.0}), ("fastv", {"calibrate": ["exp_trend"]})]
)
def test_missing_calibration_names_the_command(
    name: str, params: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLM_ATTN_PROFILES", str(tmp_path))
    model = models.build_llava(4)
    before = fingerprint(model)
    with pytest.raises(MissingProfileError, match=f"vlm-attn calibrate .*--for {name}"):
        vlm_attn.attach(model, vlm_attn.method(name, **params))
    assert fingerprint(model) == before


@pytest.mark.parametrize(
    ("pipeline", "message"),
    [
        (["fastv", "random_prune"], "fastv and random_prune"),
        (["vhr", "vhr"], "vhr and vhr"),
        ([vlm_attn.method("var", **SINKS), "placebo"], "var and placebo|placebo and var"),
        ({"method": "fastv"}, "needs a 'name'"),
        ({"name": "fastv", "keeep": 3}, "did you mean 'keep'"),
        ("nowhere.yaml", "nowhere.yaml does not exist"),
    ],
)
def test_bad_pipelines(pipeline: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vlm_attn.attach(models.llava(4), pipeline)


@pytest.mark.parametrize("pipeline", [3, b"fastv", vlm_attn.method])
def test_objects_that_are_no_method(pipeline: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="method"):
        vlm_attn.attach(models.llava(4), pipeline)


@pytest.mark.parametrize(
    "text", ["{name: fastv, layer: [", "!!python/object/apply:os.system ['true']", "3", "", "name: fastv\nlayr: 3\n"]
)
def test_bad_recipe_files(text: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match="recipe|parameter"):
        vlm_attn.attach(models.llava(4), path)


def test_good_recipe_file_is_the_method(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("- {name: fastv, layer: 1, keep: 3}\n- vhr\n")
    with vlm_attn.attach(models.llava(4), path) as session:
        assert [m.to_dict()["name"] for m in session.methods] == ["fastv", "vhr"]
        assert session.methods[0] == vlm_attn.method("fastv", layer=1, keep=3)


# --------------------------------------------------------------------------------------------------------- models


def text_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    return LlamaForCausalLM(config)


def vision_model() -> CLIPVisionModel:
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    return CLIPVisionModel(config)


@pytest.mark.parametrize(
    "make", [text_model, vision_model, lambda: torch.nn.Linear(2, 2), lambda: models.llava(4).model]
)
def test_models_that_are_no_vlm(make: Any) -> None:
    model = make()
    with pytest.raises(AttachError, match=type(model).__name__):
        vlm_attn.attach(model, "fastv")


def test_attach_twice_is_refused_and_harmless() -> None:
    model, inputs = models.llava(4), models.single().inputs()
    with vlm_attn.attach(model, "fastv"):
        _, logits, _ = greedy(model, inputs, 3)
        with pytest.raises(AttachError, match="attached to this model already.*detach"):
            vlm_attn.attach(model, "vhr")
        _, again, _ = greedy(model, inputs, 3)
    assert torch.equal(again, logits)
    with vlm_attn.attach(model, "vhr"):
        pass


def test_modified_model_is_refused() -> None:
    model = models.build_llava(4)
    del model.get_decoder().layers[1].self_attn.o_proj
    with pytest.raises(AttachError, match=r"self_attn\.o_proj in decoder layer 1"):
        vlm_attn.attach(model, "noop")


def test_unknown_backend_is_refused() -> None:
    model = models.build_llava(4)
    model.get_decoder().config._attn_implementation = "paged|sdpa"
    with pytest.raises(UnsupportedError, match=r"paged\|sdpa.*sdpa"):
        vlm_attn.attach(model, "noop")


# --------------------------------------------------------------------------------------------------- prompts


@pytest.fixture
def vlm() -> Any:
    wrapped = vlm_attn.wrap(models.llava(4), "fastv", processor=models.tiny_processor())
    yield wrapped
    wrapped.close()


WITHOUT_PICTURES = ("act", "zerotuning")  # by their definition they act on the first token or any sink


@pytest.mark.parametrize(
    "name", [n for n in sorted(MATRIX) if MATRIX[n].acts_on != "picture" and n not in WITHOUT_PICTURES]
)
def test_prompt_without_image_is_the_stock_answer(name: str) -> None:
    """Nothing to prune, no visual mass to move, no picture to contrast: text passes through unchanged."""
    model = models.llava(4)
    ids = torch.tensor([[0, 0, 1, 5, 8, 13], [1, 3, 5, 7, 9, 11]])
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    _, logits, scores = greedy(model, inputs)
    with vlm_attn.attach(model, vlm_attn.method(name, **MATRIX[name].default)):
        _, got, got_scores = greedy(model, inputs)
    assert distance(got, logits) <= 1e-5
    assert distance(got_scores, scores) <= 1e-5


def test_batch_in_which_one_prompt_has_no_image() -> None:
    model, sample = models.llava(4), models.sample(seed=1)
    text = models.Sample(torch.tensor([1, 5, 8, 13, 21]), sample.pixels[:0])
    inputs = models.Batch([sample, text]).inputs()
    for name in ("fastv", "var", "vcd"):
        method = vlm_attn.method(name, **MATRIX[name].default)
        with vlm_attn.attach(model, method):
            _, _, scores = greedy(model, inputs, 3)
            _, _, alone = greedy(model, sample.inputs(), 3)
        assert distance(scores[:1, 0], alone[:1, 0]) <= 1e-5


def test_typed_placeholder_is_refused(vlm: Any) -> None:
    with pytest.raises(ValueError, match="image placeholder '<image>'"):
        vlm.ask(models.picture(), "what is <image> this")


@pytest.mark.parametrize("text", ["", "   ", None, 3, b"w5"])
def test_empty_question_is_refused(vlm: Any, text: Any) -> None:
    with pytest.raises(ValueError, match="question"):
        vlm.ask(models.picture(), text)


def test_ask_without_picture_answers(vlm: Any) -> None:
    answer = vlm.ask(None, "w5 w6", max_new_tokens=3)
    assert len(answer.tokens) == 3
    assert answer.stats["visual_tokens"] == 0


def test_wrong_number_of_placeholders_is_refused() -> None:
    model, sample = models.llava(4), models.sample(seed=1)
    inputs = sample.inputs()
    inputs["input_ids"][0, -2] = models.IMAGE_ID
    with vlm_attn.attach(model, "fastv"), pytest.raises(ValueError, match=r"17 image placeholders.*16|do not match"):
        model.generate(**inputs, max_new_tokens=2)


def test_mask_of_another_shape_is_refused() -> None:
    model, inputs = models.llava(4), models.single().inputs()
    inputs["attention_mask"] = inputs["attention_mask"][:, :-1]
    with vlm_attn.attach(model, "fastv"), pytest.raises((ValueError, RuntimeError)):
        model(**inputs)


def test_closed_object_says_so(vlm: Any) -> None:
    vlm.close()
    vlm.close()
    with pytest.raises(ValueError, match=r"closed.*wrap"):
        vlm.ask(models.picture(), "w5")
    vlm.set_method("vhr")
    assert vlm.ask(models.picture(), "w5", max_new_tokens=1).tokens


def test_failed_swap_keeps_the_old_method(vlm: Any) -> None:
    with pytest.raises(ValueError, match="unknown method"):
        vlm.set_method("nothing_like_it")
    assert [m["name"] for m in vlm.method] == ["fastv"]
    assert vlm.ask(models.picture(), "w5", max_new_tokens=1).tokens


@pytest.mark.parametrize("kind", ["heat", "", None])
def test_unknown_heatmap(vlm: Any, kind: Any) -> None:
    with pytest.raises(ValueError, match="heatmap"):
        vlm.heatmap(models.picture(), "w5", kind=kind)
