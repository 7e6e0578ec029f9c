"""BLIP-2 and InstructBLIP: queries in front of the prompt, which stand for no place in the picture."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import AttachError
from .base import Family, Media

_NOTHING = SimpleNamespace(pooler_output=torch.empty(0), qformer_outputs=None, vision_outputs=None)


class Blip(Family):
    """``(Instruct)Blip(2)ForConditionalGeneration`` with a decoder-only language model.

    Their ``generate`` hands embeddings to the ``generate`` of the inner language model: no forward of the whole model
    runs, and BLIP-2 does not call its feature function either.
    """

    output_names = ("o_proj", "out_proj")
    joined = "a prompt holds one picture"

    def __init__(self, model: PreTrainedModel):
        if getattr(model.config.get_text_config(), "is_encoder_decoder", False):
            raise AttachError(
                f"{type(model).__name__}: its language model is an encoder-decoder (T5), whose encoder reads the "
                "picture; load a checkpoint with a decoder-only language model (OPT, Vicuna)"
            )
        super().__init__(model)

    def announced(self, kwargs: Mapping[str, Any]) -> dict[str, Media]:
        """The pixels; of the features only their number is known beforehand."""
        pixels = kwargs.get("pixel_values")
        if not isinstance(pixels, Tensor):
            return {}
        names = ("pixel_values", "qformer_input_ids", "qformer_attention_mask", "interpolate_pos_encoding")
        features = torch.empty(len(pixels), self.model.config.num_query_tokens, 0, device="meta")
        arguments = {name: kwargs[name] for name in names if name in kwargs}
        return {"image": Media("image", arguments, SimpleNamespace(pooler_output=features))}

    def prompt_arguments(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Ids, mask and the positions that ``generate`` counts from the mask."""
        ids, mask = kwargs["input_ids"], kwargs.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        positions = (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 0)
        return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}

    def branch_arguments(self, kwargs: Mapping[str, Any], encoded: Mapping[str, Any]) -> dict[str, Any]:
        """The pictures go along in every step: without them the model would encode again, or ask for pixels."""
        expected = inspect.signature(type(self.model).forward).parameters
        absent = {name: None for name in ("pixel_values", "qformer_input_ids") if name in expected}
        return {**kwargs, **absent, "mm_encoder_outputs": {"image": _NOTHING, **encoded}}
