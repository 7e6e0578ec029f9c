"""BLIP-2 and InstructBLIP: queries in front of the prompt, which stand for no place in the picture."""

from __future__ import annotations

from transformers import PreTrainedModel

from ..errors import AttachError
from .base import Family


class Blip(Family):
    """``(Instruct)Blip(2)ForConditionalGeneration`` with a decoder-only language model."""

    output_names = ("o_proj", "out_proj")

    def __init__(self, model: PreTrainedModel):
        if getattr(model.config.get_text_config(), "is_encoder_decoder", False):
            raise AttachError(
                f"{type(model).__name__}: its language model is an encoder-decoder (T5), whose encoder reads the "
                "picture; load a checkpoint with a decoder-only language model (OPT, Vicuna)"
            )
        super().__init__(model)
