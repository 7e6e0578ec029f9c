"""Question and content tokens from ids: chat-template endings, leading blanks, words that span tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

import vlm_attn
from tests import models
from vlm_attn.errors import UnsupportedError
from vlm_attn.tokens import Layout, build_token_map
from vlm_attn.words import answer_opening, roles

IMAGE = 300


class Processor:
    """A byte-level tokenizer (one token per character) with a chat template that opens the answer."""

    def __init__(self, opening: str) -> None:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        core = Tokenizer(BPE({c: i for i, c in enumerate(alphabet)}, []))
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        core.decoder = decoders.ByteLevel()
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
        self.chat_template, self.opening = "given", opening

    def apply_chat_template(self, turn: Any, add_generation_prompt: bool) -> str:
        """USER: x, then the opening."""
        return "USER: x" + (self.opening if add_generation_prompt else "")


def prompt(processor: Processor, text: str) -> tuple[torch.Tensor, Any]:
    after = processor.tokenizer(text).input_ids
    ids = torch.tensor([[5, IMAGE, IMAGE, *after]])
    return ids, build_token_map(ids == IMAGE, torch.ones_like(ids).bool(), [[Layout.without_grid(2)]])


def spelled(processor: Processor, ids: torch.Tensor, flags: torch.Tensor) -> str:
    return "".join(processor.tokenizer.decode([int(i)]) for i in ids[0][flags[0]])


def test_question_and_content() -> None:
    processor = Processor(" ASSISTANT:")
    ids, tokens = prompt(processor, "\nIs there a red dog's bowl, or 2 cats? ASSISTANT:")
    found = roles(processor, ids, tokens, "gift")
    assert spelled(processor, ids, found.question) == "Is there a red dog's bowl, or 2 cats?"
    assert spelled(processor, ids, found.content) == "reddog'sbowl2cats"


def test_prompt_without_the_template_loses_its_last_token_only() -> None:
    processor = Processor(" ASSISTANT:")
    ids, tokens = prompt(processor, "Is it red?")
    assert spelled(processor, ids, roles(processor, ids, tokens, "gift").question) == "Is it red"
    assert len(answer_opening(processor, processor.tokenizer)) == len(" ASSISTANT:")


def test_words_need_a_tokenizer() -> None:
    model = models.llava(4)
    method = vlm_attn.method("gift", saliency_layer=1, enhance_layers=[2])
    with vlm_attn.attach(model, method), pytest.raises(UnsupportedError, match=r"gift.*processor="):
        model.generate(**models.single().inputs(), max_new_tokens=1)
    with vlm_attn.attach(model, method, models.tiny_processor()) as session:
        model.generate(**models.single().inputs(), max_new_tokens=1, do_sample=False)
        assert bool(session.last.words.question.any())
