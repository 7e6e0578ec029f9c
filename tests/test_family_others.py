"""Families with prefixes, blocks, separators, indicator tokens, queries and convolutions: what is special to each."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import vlm_attn
from tests import geometry_check
from tests.runs import distance, greedy
from vlm_attn.errors import AttachError, UnsupportedError
from vlm_attn.families import ADAPTERS, UNSUPPORTED, resolve
from vlm_attn.families.zoo import SPECIMENS, Sample
from vlm_attn.families.zoo.base import BOS
from vlm_attn.families.zoo.others import BREAK, END, START
from vlm_attn.stages import Contrast, method_dataclass
from vlm_attn.tokens import TokenMap

SIZES = [(56, 56), (112, 56), (60, 90), (130, 75), (200, 190)]
ONE, OTHER = Sample(seed=1), Sample(seed=2, before=5, after=9)
TWO = Sample(pictures=((56, 84), (112, 56)), seed=3, after=4)
TEXT = Sample(pictures=(), seed=4, before=3, after=4)


@functools.cache
def built(name: str) -> Any:
    return SPECIMENS[name].build()


def token_map(name: str, *samples: Sample) -> TokenMap:
    """Roles of the tokens of a batch, as a session without methods sees them."""
    with vlm_attn.attach(built(name)) as session:
        session.model(**SPECIMENS[name].inputs(samples))
        return session.last.tokens


@pytest.mark.parametrize(
    ("name", "reach"),
    [
        ("paligemma", 0), ("gemma3", 0), ("mistral3", 0), ("ovis2", 0), ("deepseek_vl", 0), ("janus", 0),
        ("lfm2_vl", 0), ("molmo2", 0), ("deepseek_vl_hybrid", 1),
    ],
)  # fmt: skip
def test_a_drawn_square_is_found_again(name: str, reach: int) -> None:
    geometry_check.check(SPECIMENS[name], SIZES, reach=reach)


@pytest.mark.parametrize("at_once", [1, 2])
def test_mistral3_grids_follow_the_picture(at_once: int) -> None:
    tokens = token_map("mistral3", TWO, *[TEXT] * (at_once - 1))
    assert tokens.grids[0] == ((3, 2), (2, 4))
    assert tokens.cell[0][tokens.vis[0]].tolist()[:7] == [[0, 0], [0, 1], [1, 0], [1, 1], [2, 0], [2, 1], [0, 0]]
    assert all(row == () for row in tokens.layouts[1:])


def test_separators_leave_with_the_picture() -> None:
    for name, markers in (
        ("mistral3", {BREAK, END}),
        ("ovis2", {START, END, 103, 104, 105}),
        ("gemma3", {START, END}),
    ):
        inputs = SPECIMENS[name].inputs([TWO, ONE])
        family = resolve(built(name))
        ids, mask = family.text_only(inputs["input_ids"], inputs["attention_mask"])
        for row, sample in enumerate((TWO, ONE)):
            left = ids[row][mask[row].bool()].tolist()
            assert [token for token in left if token != BOS] == [word for run in sample.words() for word in run], name
            assert markers & set(inputs["input_ids"][row].tolist()), "the prompt has no separators: nothing is tested"


def test_ovis2_tiles_belong_to_their_picture() -> None:
    sample = replace(TWO, pictures=((56, 56), (112, 112), (112, 56)))
    tokens = token_map("ovis2", TEXT, sample)
    assert [len(lay.views) for lay in tokens.layouts[1]] == [1, 5, 3]
    assert tokens.img_id[1][tokens.vis[1]].bincount().tolist() == [4, 20, 12]
    assert tokens.frame[1][tokens.img_id[1] == 1].tolist() == [view for view in range(5) for _ in range(4)]


def test_tiles_cut_by_other_settings_are_an_error() -> None:
    for name, setting in (("ovis2", "max_patches"), ("lfm2_vl", "max_tiles")):
        family = resolve(built(name))
        images = SPECIMENS[name].processor().image_processor
        layout = token_map(name, replace(ONE, pictures=((112, 112),))).layouts[0][0]
        assert len(family.geometry(images, (112, 112), layout)) == 5
        setattr(images, setting, 2)
        with pytest.raises(ValueError, match="on the processor itself"):
            family.geometry(images, (112, 112), layout)


@pytest.mark.parametrize("name", ["lfm2_vl", "molmo2", "ovis2", "deepseek_vl_hybrid"])
def test_branch_alters_the_pixels_of_each_picture_in_every_tower(name: str) -> None:
    """Two prompts in one batch get the contrast that each gets alone, and no pixel tensor stays as it was."""
    model, specimen = built(name), SPECIMENS[name]
    options = {"max_new_tokens": 2, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
    with vlm_attn.attach(model, Blackened()) as session:
        both = model.generate(**specimen.inputs([TWO, OTHER]), **options).scores[0]
        media = session.last.media["image"]
        names = session.family.pixel_arguments(media)
        for argument in names:
            pixels = media.arguments[argument]
            parts = session.family.pictures(media, pixels)
            assert len(parts) == 3
            assert sum(part.numel() for part in parts) == pixels.numel()
        for row, sample in enumerate((TWO, OTHER)):
            inputs = specimen.inputs([sample])
            alone = model.generate(**inputs, **options).scores[0]
            assert distance(both[row : row + 1], alone) < 3e-5  # a contrast of roundings
            with session.suspended():
                plain = model(**inputs).logits[:, -1]
                black = model(**{**inputs, **{n: torch.zeros_like(inputs[n]) for n in names}}).logits[:, -1]
            assert distance(alone, 2 * plain - black) < 1e-4
    assert len(names) == 1 + (name == "deepseek_vl_hybrid")


def test_lfm2_tells_neighbouring_pictures_apart() -> None:
    sample = replace(TWO, pictures=((112, 112), (56, 56), (56, 112)), between=0)
    tokens = token_map("lfm2_vl", sample, OTHER)
    assert [len(lay.views) for lay in tokens.layouts[0]] == [5, 1, 3]
    assert [len(lay.views) for lay in tokens.layouts[1]] == [1]


def test_lfm2_convolutions() -> None:
    model = built("lfm2_vl")
    with pytest.raises(UnsupportedError, match="convolution"):
        vlm_attn.attach(model, "fastv")
    with vlm_attn.attach(model) as session:
        assert [number for number, _ in session.family.attentions()] == [1, 2]
    model = SPECIMENS["lfm2_vl"].build(layer_types=["full_attention", "conv", "conv", "full_attention"])
    with pytest.raises(ValueError, match=r"none of its layers \[2\] has attention"):
        vlm_attn.attach(model, "placebo")


def test_pan_and_scan_has_no_geometry() -> None:
    images = SPECIMENS["gemma3"].processor().image_processor
    images.do_pan_and_scan = True
    layout = token_map("gemma3", ONE).layouts[0][0]
    with pytest.raises(ValueError, match="do_pan_and_scan=False"):
        resolve(built("gemma3")).geometry(images, (56, 56), layout)


@pytest.mark.parametrize("name", ["instructblip", "blip-2", "aria"])
def test_queries_have_no_grid(name: str) -> None:
    tokens = token_map(name, ONE, OTHER)
    assert tokens.vis.sum(1).tolist() == [8, 8]
    assert bool((tokens.cell == -1).all())
    assert tokens.grids == ((None,), (None,))


@method_dataclass
class Mirrored(Contrast):
    """Contrast with the mirrored picture."""

    name = "mirrored"
    summary = "contrast with the mirrored picture"

    def alter_pixels(self, pixels: Tensor) -> Tensor:
        return pixels.flip(-1)

    def combine(self, logits: Tensor, branch: Tensor) -> Tensor:
        return 2 * logits - branch


@method_dataclass
class Blackened(Mirrored):
    """Contrast with a picture of zeros."""

    name = "blackened"
    summary = "contrast with a picture of zeros"

    def alter_pixels(self, pixels: Tensor) -> Tensor:
        return torch.zeros_like(pixels)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("name", ["instructblip", "blip-2"])
def test_blip_branches_are_two_plain_forwards(name: str, masked: bool) -> None:
    """The inner language model generates; a branch beside it must see mask, positions and its own picture."""
    model, samples = built(name), [ONE, OTHER] if masked else [ONE]
    inputs = SPECIMENS[name].inputs(samples)
    if not masked:
        del inputs["attention_mask"]
    with vlm_attn.attach(model, Mirrored()):
        out = model.generate(
            **inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_scores=True
        )
    prompt = inputs["input_ids"].shape[1]
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    for step, scores in enumerate(out.scores):
        both = []
        for pixels in (inputs["pixel_values"], inputs["pixel_values"].flip(-1)):
            whole = dict(inputs, pixel_values=pixels, input_ids=out.sequences[:, : prompt + step])
            whole["attention_mask"] = torch.nn.functional.pad(mask, (0, step), value=1)
            both.append(model(**whole).logits[:, -1])
        assert distance(scores, 2 * both[0] - both[1]) < 1e-4
        assert distance(both[0], both[1]) > 1e-2, "the mirrored picture looks the same: nothing is tested"


@pytest.mark.parametrize("name", ["instructblip", "blip-2"])
def test_blip_padding_between_queries_and_words(name: str) -> None:
    """The real processor pads there; methods at neutral strength still change nothing."""
    model, specimen = built(name), SPECIMENS[name]
    processor = specimen.processor()
    texts, images = [specimen.prompt(s) for s in (ONE, OTHER)], [s.images()[0] for s in (ONE, OTHER)]
    inputs = dict(processor(text=texts, images=images, padding=True, return_tensors="pt"))
    assert not bool((inputs["attention_mask"].diff(dim=1) >= 0).all()), "this padding is on the left"
    tokens, plain, _ = greedy(model, inputs, min_new_tokens=4, steps=4)
    for name_of, parameters in (("fastv", {"keep": 8}), ("placebo", {"keep": 1.0})):
        with vlm_attn.attach(model, vlm_attn.method(name_of, **parameters)):
            again, logits, _ = greedy(model, inputs, min_new_tokens=4, steps=4)
        assert torch.equal(again, tokens)
        assert distance(logits, plain) <= 1e-5


def test_blip_with_an_encoder_decoder_is_refused() -> None:
    from transformers import Blip2Config, Blip2ForConditionalGeneration, T5Config

    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Blip2Config(
        text_config=T5Config(d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=160),
        vision_config={**vision, "image_size": 28, "patch_size": 14},
        qformer_config={**vision, "vocab_size": 160}, num_query_tokens=4, image_token_id=99,
    )  # fmt: skip
    with pytest.raises(AttachError, match="encoder-decoder"):
        vlm_attn.attach(Blip2ForConditionalGeneration(config))


def test_mllama_has_a_second_branch_and_nothing_else() -> None:
    """The branch encodes its own pixels; later tokens keep the tiles that the prompt's last token saw."""
    model, specimen = built("mllama"), SPECIMENS["mllama"]
    for name in ("fastv", "vhr", "carve"):
        with pytest.raises(UnsupportedError, match="cross-attention"):
            vlm_attn.attach(model, name)
    inputs = specimen.inputs([TWO, OTHER])
    with vlm_attn.attach(model, Blackened()) as session:
        out = model.generate(
            **inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_scores=True
        )
        assert session.last.tokens.vis.sum(1).tolist() == [2, 1]
    prompt = inputs["input_ids"].shape[1]
    for step, scores in enumerate(out.scores):
        both = []
        for pixels in (inputs["pixel_values"], torch.zeros_like(inputs["pixel_values"])):
            whole = dict(inputs, pixel_values=pixels, input_ids=out.sequences[:, : prompt + step])
            whole["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, step), value=1)
            tiles = inputs["cross_attention_mask"]
            whole["cross_attention_mask"] = torch.cat([tiles, tiles[:, -1:].expand(-1, step, -1, -1)], dim=1)
            both.append(model(**whole).logits[:, -1])
        assert distance(scores, 2 * both[0] - both[1]) < 1e-4
        assert distance(both[0], both[1]) > 1e-2, "the black picture looks the same: nothing is tested"


def test_refused_families_are_real_and_say_why() -> None:
    from transformers import CONFIG_MAPPING, GitConfig, GitForCausalLM

    assert not set(UNSUPPORTED) & set(ADAPTERS)
    assert all(name in CONFIG_MAPPING for name in UNSUPPORTED)
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = GitForCausalLM(GitConfig(vision_config={**small, "image_size": 28, "patch_size": 14}, **small))
    with pytest.raises(AttachError, match=r"'git' cannot be served: .*without placeholders"):
        vlm_attn.attach(model)


def test_janus_drops_the_second_branch() -> None:
    with pytest.raises(UnsupportedError, match="drops logits processors"):
        vlm_attn.attach(built("janus"), "vcd")


def test_a_branch_that_never_ran_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = SPECIMENS["deepseek_vl"].build()
    generate = type(model).generate

    def deaf(self: Any, *args: Any, logits_processor: Any = None, **kwargs: Any) -> Any:
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "generate", deaf, raising=False)
    with vlm_attn.attach(model, "vcd"), pytest.raises(UnsupportedError, match="took no part"):
        model.generate(**SPECIMENS["deepseek_vl"].inputs([ONE]), max_new_tokens=2)


def test_paligemma_prompt_tokens_see_later_ones_after_pruning() -> None:
    """A reader of the kept prompt must not fall back to a causal mask: the first token still sees the last."""
    model, inputs = built("paligemma"), SPECIMENS["paligemma"].inputs([ONE])
    changed = dict(inputs, input_ids=inputs["input_ids"].clone())
    changed["input_ids"][0, -1] = 7
    states = []
    for given in (inputs, changed):
        with vlm_attn.attach(model, vlm_attn.method("uniform_prune", layer=2, keep=4)) as session:
            states.append(model(**given, output_hidden_states=True, use_cache=True).logits)
            assert int(session.last.tokens_at(3).vis.sum()) == 4
    assert distance(states[0][:, 0], states[1][:, 0]) > 1e-3
