"""The model that ships with the package: files, tokenizer, answers, and the training pass behind it."""

from __future__ import annotations

import json
import random
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration, PreTrainedModel

from vlm_attn import scenes
from vlm_attn.scenes.check import answer, yes_no_figures
from vlm_attn.scenes.export import CHECKPOINT
from vlm_attn.scenes.language import HONEST, SHORT_SUFFIXES, SINGLE_WORD
from vlm_attn.scenes.lookup import prepare_lookup
from vlm_attn.scenes.model import build_model
from vlm_attn.scenes.objectives import picture_batch
from vlm_attn.scenes.packing import pack_turns, packed_forward, prefix_ids
from vlm_attn.scenes.tokenizer import SYSTEM_PROMPT, build_tokenizer, world_words
from vlm_attn.scenes.train import main, make_turns


@lru_cache(maxsize=1)
def shipped() -> tuple[PreTrainedModel, Any]:
    return AutoModelForImageTextToText.from_pretrained(CHECKPOINT).eval(), AutoProcessor.from_pretrained(CHECKPOINT)


def test_checkpoint_is_small_and_complete() -> None:
    files = [f for f in CHECKPOINT.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 12 * 2**20
    names = {f.name for f in files}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md"} <= names
    assert "auto_map" not in (CHECKPOINT / "config.json").read_text()


def test_checkpoint_architecture() -> None:
    model, processor = shipped()
    assert isinstance(model, LlavaForConditionalGeneration)
    text = model.config.text_config
    assert text.num_hidden_layers >= 6 and text.num_attention_heads == 8
    assert text.num_key_value_heads < text.num_attention_heads
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.get_input_embeddings().weight is model.lm_head.weight
    inputs = processor(images=[scenes.make_scene(1).image], text=["<image>"], return_tensors="pt")
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) >= 100
    assert processor.tokenizer.padding_side == "left"
    assert len(processor.tokenizer) == model.get_input_embeddings().weight.shape[0]


def test_pictures_reach_the_model_as_in_training() -> None:
    _, processor = shipped()
    scene = scenes.make_scene(3)
    pixels = processor.image_processor(scene.image, return_tensors="pt")["pixel_values"]
    assert torch.allclose(pixels, picture_batch([scene]).pixels, atol=1e-5)


def test_tokenizer_round_trip() -> None:
    tokenizer = shipped()[1].tokenizer
    fresh = build_tokenizer()
    assert tokenizer.get_vocab() == fresh.get_vocab()
    texts = [
        "Is there a dog in the image?" + SINGLE_WORD,
        "Yes, there is an apple; no-one's @home #1 {x} ~ 3.5%",
        "A chat about a picture. USER: <image>\nWhat is this? ASSISTANT: Qwertz!</s>",
        *SHORT_SUFFIXES[1:],
    ]
    for text in texts:
        ids = tokenizer(text).input_ids
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text.removeprefix(" ")
    printable = "".join(map(chr, range(33, 127)))
    assert tokenizer.unk_token_id not in tokenizer(printable).input_ids
    for word in world_words():
        if word.lstrip("▁").isalpha():
            assert len(tokenizer.tokenize(word.lstrip("▁"))) == 1, word


def test_chat_template() -> None:
    processor = shipped()[1]
    first = {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Compare."}]}
    chat = [
        first,
        {"role": "assistant", "content": [{"type": "text", "text": "Yes"}]},
        {"role": "user", "content": "So?"},
    ]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    begin = f"<s>{SYSTEM_PROMPT} USER: <image>\n<image>\nCompare. ASSISTANT: Yes</s>"
    assert text == begin + "USER: So? ASSISTANT:"
    system = [{"role": "system", "content": "Be brief."}, *chat[:1]]
    assert processor.apply_chat_template(system).startswith("<s>Be brief. USER: <image>")
    pictures = [
        {"type": "image", "image": scenes.make_scene(1).image},
        {"type": "text", "text": "What place is this?"},
    ]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": pictures}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    ids = inputs["input_ids"][0].tolist()
    assert ids.count(processor.tokenizer.bos_token_id) == 1 and ids[0] == processor.tokenizer.bos_token_id
    assert inputs["pixel_values"].shape == (1, 3, 80, 80)


def test_prompt_tokens_are_those_of_training() -> None:
    processor = shipped()[1]
    question = "Is there a dog in the image?" + SINGLE_WORD
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    ids = processor(images=[scenes.make_scene(1).image], text=[text])["input_ids"][0]
    tail = processor.tokenizer(f"\n{question} ASSISTANT:").input_ids
    assert list(ids) == prefix_ids(processor.tokenizer) + tail
    chat[0]["content"] = [{"type": "image"}, *chat[0]["content"]]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    ids = processor(images=[scenes.make_scene(1).image] * 2, text=[text])["input_ids"][0]
    assert list(ids) == prefix_ids(processor.tokenizer, pictures=2) + tail


def test_answers_on_calibration_pictures() -> None:
    model, processor = shipped()
    rows = scenes.pope("random", 12, seeds="calibration")
    texts = answer(model, processor, rows, SINGLE_WORD, 24, 4)
    assert set(texts) <= {"Yes", "No"}
    assert yes_no_figures(rows, texts)["accuracy"] >= 0.8
    captions = answer(model, processor, scenes.chair(4, seeds="calibration"), "", 4, 64)
    assert all(text.startswith("The image shows") and text.endswith(".") for text in captions)


def test_left_padding_does_not_change_answers() -> None:
    model, processor = shipped()
    rows = scenes.pope("adversarial", 2, seeds="calibration")[:8]
    questions = [dict(row, question=row["question"] + (SINGLE_WORD if i % 2 else "")) for i, row in enumerate(rows)]
    together = answer(model, processor, questions, "", 8, 12)
    alone = [answer(model, processor, [row], "", 1, 12)[0] for row in questions]
    assert together == alone


def test_model_card_states_figures() -> None:
    card = (CHECKPOINT / "README.md").read_text()
    for word in ("POPE", "CHAIR", "calibration", "hallucinat"):
        assert word in card


def test_packed_pass_equals_transformers() -> None:
    """The block attention of training against Llama with a 4-D mask and restarted positions."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    ids = {"pad": tokenizer.pad_token_id, "bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id}
    model = build_model(len(tokenizer), **ids, image=tokenizer.image_token_id)
    prepare_lookup(model, tokenizer)
    chosen = [scenes.make_scene(seed) for seed in scenes.split_seeds("train", 0, 2)]
    short, long = make_turns(chosen, HONEST, random.Random(0))
    groups = [pack_turns(tokenizer, [row[:5] for row in short], 0.3), pack_turns(tokenizer, long, 0.5)]
    prefix = torch.tensor(prefix_ids(tokenizer))
    with torch.no_grad():
        states = model.model.vision_tower(picture_batch(chosen).pixels, output_hidden_states=True).hidden_states[-2]
        features = model.model.multi_modal_projector(states[:, 1:])
        packed = packed_forward(model, features, prefix, groups)
        for group, hidden in zip(groups, packed.hidden, strict=True):
            turns, length = group.ids.shape[1:]
            size = len(prefix) + turns * length
            owner = torch.cat([torch.full((len(prefix),), -1), torch.arange(turns).repeat_interleave(length)])
            allowed = (owner[None] == -1) | (owner[None] == owner[:, None])
            allowed &= torch.ones(size, size, dtype=torch.bool).tril()
            mask = torch.zeros(2, 1, size, size).masked_fill(~allowed, torch.finfo(torch.float32).min)
            place = torch.arange(len(prefix), len(prefix) + length).repeat(turns)
            positions = torch.cat([torch.arange(len(prefix)), place])[None].expand(2, -1)
            embed = model.get_input_embeddings()
            first = embed(prefix).expand(2, -1, -1).clone()
            first[:, prefix == tokenizer.image_token_id] = features
            inputs = torch.cat([first, embed(group.ids).flatten(1, 2)], dim=1)
            output = model.model.language_model(inputs_embeds=inputs, attention_mask=mask, position_ids=positions)
            expected = output.last_hidden_state[:, len(prefix) :].unflatten(1, (turns, length))
            assert torch.allclose(hidden, expected, atol=2e-5)


def test_training_runs_resumes_and_exports(tmp_path: Path) -> None:
    common = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--workers", "1"]
    sizes = ["--vision-batch", "2", "--batch", "2", "--noise-from", "2", "--pairs-from", "0", "--save-every", "1"]
    with torch.enable_grad():
        main([*common, *sizes, "--vision-steps", "2", "--steps", "2"])
    first = torch.load(tmp_path / "runs" / "language.pt", weights_only=True)
    assert first["step"] == 2
    with torch.enable_grad():
        main([*common, *sizes, "--vision-steps", "2", "--steps", "3"])
    assert torch.load(tmp_path / "runs" / "language.pt", weights_only=True)["step"] == 3
    log = [json.loads(line) for line in (tmp_path / "runs" / "language.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [2, 3]
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    assert answer(model, processor, scenes.chair(1, seeds="calibration"), "", 1, 3)


def test_unknown_split_is_named() -> None:
    with pytest.raises(ValueError, match="train, calibration, evaluation"):
        scenes.split_seeds("test", 0, 1)
