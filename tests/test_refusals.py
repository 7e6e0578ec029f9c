"""Generation modes in which a method would be silently wrong are refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import StaticCache

import vlm_attn
from tests import models
from tests.matrix import MATRIX
from tests.runs import greedy
from vlm_attn.errors import UnsupportedError


@pytest.mark.parametrize("name", ["fastv", "var", "vhr", "vcd"])
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"use_cache": False}, "use_cache"),
        ({"prefill_chunk_size": 4}, "prefill_chunk_size"),
        ({"cache_implementation": "static"}, "static"),
        ({"prompt_lookup_num_tokens": 2}, "assisted"),
    ],
)
def test_modes_that_would_be_wrong_are_refused(name: str, kwargs: dict[str, Any], message: str) -> None:
    model = models.llava(4)
    with (
        vlm_attn.attach(model, vlm_attn.method(name, **MATRIX[name].default)),
        pytest.raises(UnsupportedError, match=f"{name}.*{message}"),
    ):
        model.generate(**models.single().inputs(), max_new_tokens=2, **kwargs)


def test_static_cache_object_is_refused() -> None:
    model = models.llava(4)
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=64)
    with vlm_attn.attach(model, "fastv"), pytest.raises(UnsupportedError, match="cache"):
        model.generate(**models.single().inputs(), max_new_tokens=2, past_key_values=cache)


def test_contrast_refuses_beams() -> None:
    model = models.llava(4)
    with vlm_attn.attach(model, "vcd"), pytest.raises(UnsupportedError, match="vcd.*num_beams=1"):
        model.generate(**models.single().inputs(), max_new_tokens=2, num_beams=2)


def test_picture_method_refuses_bare_generate() -> None:
    model = models.llava(4)
    with vlm_attn.attach(model, "carve"), pytest.raises(UnsupportedError, match=r"carve.*vlm\.ask"):
        model.generate(**models.single().inputs(), max_new_tokens=2)


def test_labels_with_pruning_are_refused() -> None:
    model, inputs = models.llava(4), models.single().inputs()
    with vlm_attn.attach(model, "fastv"), pytest.raises(UnsupportedError, match="labels"):
        model(**inputs, labels=inputs["input_ids"])


def test_embeddings_alone_are_refused() -> None:
    model = models.llava(4)
    embeds = model.get_input_embeddings()(models.single().inputs()["input_ids"])
    with vlm_attn.attach(model, "fastv"), pytest.raises(UnsupportedError, match="input_ids"):
        model(inputs_embeds=embeds)


def test_foreign_cache_is_refused() -> None:
    model, inputs = models.llava(4), models.single().inputs()
    before = model(**inputs, use_cache=True).past_key_values
    token = torch.tensor([[5]])
    with vlm_attn.attach(model, "fastv"):
        with pytest.raises(UnsupportedError, match="cache"):
            model(input_ids=token, past_key_values=before, use_cache=True)
        first = model(**inputs, use_cache=True).past_key_values
        model(**models.two_images().inputs(), use_cache=True)
        with pytest.raises(UnsupportedError, match="cache"):
            model(input_ids=token, past_key_values=first, use_cache=True)


@pytest.mark.parametrize("size", [None, [[(80, 60)], [(60, 80)]]])
def test_pad_mask_without_sizes_is_refused(size: Any) -> None:
    """A padding processor and unknown (or too many) picture sizes: no guess."""
    model, processor = models.llava(4), models.tiny_processor()
    processor.image_processor.do_pad = True
    method = vlm_attn.method("fastv", calibrate=["pad_mask"])
    with vlm_attn.attach(model, method, processor) as session:
        session.image_sizes = size
        with pytest.raises(UnsupportedError, match="image_sizes"):
            greedy(model, models.single().inputs(), 1)
    with vlm_attn.attach(model, method), pytest.raises(UnsupportedError, match="processor"):
        greedy(model, models.single().inputs(), 1)
