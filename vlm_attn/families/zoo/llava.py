"""Specimens with one square grid per picture."""

from __future__ import annotations

from typing import Any

from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers import LlavaImageProcessorPil as LlavaImageProcessor

from .base import IMAGE_ID, Sample, Specimen, interleaved, text_config, word_tokenizer


class Llava(Specimen):
    """LLaVA-1.5."""

    name = "llava"

    def config(self, **changes: Any) -> LlavaConfig:
        """CLIP tower of 4 x 4 patches, Llama decoder."""
        vision = CLIPVisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=56,
            patch_size=14, projection_dim=32,
        )  # fmt: skip
        return LlavaConfig(
            text_config=LlamaConfig(**text_config(**changes)), vision_config=vision, image_token_id=IMAGE_ID,
            vision_feature_layer=-2, vision_feature_select_strategy="default", image_seq_length=16,
        )  # fmt: skip

    def model_class(self) -> type:
        """The model class."""
        return LlavaForConditionalGeneration

    def processor(self) -> Any:
        """Shortest edge to 56 pixels, centre crop."""
        images = LlavaImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
        return LlavaProcessor(
            image_processor=images, tokenizer=word_tokenizer({"<image>": IMAGE_ID}), patch_size=14,
            vision_feature_select_strategy="default", image_token="<image>", num_additional_image_tokens=1,
        )  # fmt: skip

    def prompt(self, sample: Sample) -> str:
        """``<image>`` at every picture."""
        return interleaved(sample, "<image>")


SPECIMENS: tuple[Specimen, ...] = (Llava(),)
