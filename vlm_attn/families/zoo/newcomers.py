"""Specimens of families that combine the tower of one known family with the decoder of another."""

from __future__ import annotations

from typing import Any, ClassVar

import transformers as hf

from .base import IMAGE_ID, Sample, Specimen, interleaved, text_config, word_tokenizer
from .mrope import VIDEO_ID, Qwen25VL


class LightOnOcr(Specimen):
    """LightOnOCR: a Pixtral tower at the picture's own size, merged 2 x 2 without separators, Qwen3 decoder."""

    name = "lighton_ocr"

    def config(self, **changes: Any) -> Any:
        """Patches of 14 pixels."""
        vision = hf.PixtralVisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
            image_size=112, patch_size=14,
        )  # fmt: skip
        return hf.LightOnOcrConfig(
            text_config=hf.Qwen3Config(**text_config(**changes)), vision_config=vision, image_token_id=IMAGE_ID,
            spatial_merge_size=2,
        )  # fmt: skip

    def model_class(self) -> type:
        """The model class."""
        return hf.LightOnOcrForConditionalGeneration

    def processor(self) -> Any:
        """Keeps the aspect ratio, longest edge at most 112 pixels, sides of whole patches."""
        names = {"image_token": "<image>", "image_break_token": "<break>", "image_end_token": "<end>"}
        special = {"<image>": IMAGE_ID, "<break>": 101, "<end>": 102}
        images = hf.PixtralImageProcessor(size={"longest_edge": 112}, patch_size={"height": 14, "width": 14})
        return hf.LightOnOcrProcessor(
            image_processor=images, tokenizer=word_tokenizer(special, extra_special_tokens=names), patch_size=14,
            spatial_merge_size=2,
        )  # fmt: skip

    def prompt(self, sample: Sample) -> str:
        """``<image>`` at every picture."""
        return interleaved(sample, "<image>")


class HyperClovaXVision(Qwen25VL):
    """HyperCLOVA X Vision V2: the tower of Qwen2.5-VL, 1-D positions, post-normalised decoder."""

    name = "hyperclovax_vision_v2"

    since = "5.19"
    stem = "HyperCLOVAXVisionV2"
    parts = ("HyperCLOVAXVisionV2Processor", "Qwen2VLImageProcessor", "Qwen2VLVideoProcessor")
    ids: ClassVar[dict[str, Any]] = {"image_token_id": IMAGE_ID, "video_token_id": VIDEO_ID}
    decoder: ClassVar[dict[str, Any]] = {}

    def config_class(self, part: str) -> Any:
        """The decoder is a plain HyperCLOVA X, the tower a plain Qwen2.5-VL one."""
        known = {"Text": "HyperCLOVAXConfig", "Vision": "Qwen2_5_VLVisionConfig"}
        return getattr(hf, known[part]) if part in known else super().config_class(part)


SPECIMENS: tuple[Specimen, ...] = (LightOnOcr(), HyperClovaXVision())
