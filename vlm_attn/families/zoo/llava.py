"""Specimens with one square grid per picture."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import transformers as hf
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers import LlavaImageProcessorPil as LlavaImageProcessor

from .base import IMAGE_ID, Sample, Specimen, interleaved, text_config, word_tokenizer

VIDEO_ID = 100


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


class VipLlava(Llava):
    """ViP-LLaVA: LLaVA-1.5 with several layers of the tower side by side."""

    name = "vipllava"

    since = "5.22"

    def config(self, **changes: Any) -> Any:
        """CLIP tower of 4 x 4 patches, three of its layers, Llama decoder."""
        return hf.VipLlavaConfig(
            text_config=LlamaConfig(**text_config(**changes)), vision_config=super().config().vision_config,
            image_token_index=IMAGE_ID, vision_feature_layer=[-2, -3, 1], image_seq_length=16,
        )  # fmt: skip

    def model_class(self) -> type:
        """The model class."""
        return hf.VipLlavaForConditionalGeneration


class VideoLlava(Llava):
    """Video-LLaVA: two towers; the frames of a video keep the class token of each frame."""

    name = "video_llava"
    video = True

    def config(self, **changes: Any) -> Any:
        """CLIP towers of 4 x 4 patches, Llama decoder."""
        return hf.VideoLlavaConfig(
            text_config=LlamaConfig(**text_config(**changes)), vision_config=super().config().vision_config,
            image_token_index=IMAGE_ID, video_token_index=VIDEO_ID, image_seq_length=16,
        )  # fmt: skip

    def model_class(self) -> type:
        """The model class."""
        return hf.VideoLlavaForConditionalGeneration

    def processor(self) -> Any:
        """Shortest edge to 56 pixels, centre crop."""
        size: dict[str, Any] = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
        images: Any = hf.VideoLlavaImageProcessor(**size)
        images.preprocess = functools.partial(
            images.preprocess, return_legacy_image_output=False
        )  # names pixel_values
        return hf.VideoLlavaProcessor(
            image_processor=images, video_processor=hf.VideoLlavaVideoProcessor(**size),
            tokenizer=word_tokenizer({"<image>": IMAGE_ID, "<video>": VIDEO_ID}), patch_size=14,
            num_additional_image_tokens=1,
        )  # fmt: skip

    def prompt(self, sample: Sample) -> str:
        """``<image>`` at every picture, ``<video>`` at the video."""
        return interleaved(sample, "<image>", "<video>")


class FastVlm(Llava):
    """FastVLM: LLaVA with a convolutional tower of stride 64."""

    name = "fast_vlm"

    def config(self, **changes: Any) -> Any:
        """FastViT tower of 4 x 4 cells (timm), Qwen2 decoder."""
        tower = {
            "model_type": "timm_wrapper", "architecture": "fastvit_mci3", "hidden_size": 64, "do_pooling": True,
            "model_args": {"inference_mode": True, "layers": [1, 1, 1, 1, 1], "embed_dims": [16, 16, 32, 32, 32]},
        }  # fmt: skip
        return hf.FastVlmConfig(
            text_config=hf.Qwen2Config(**text_config(**changes)), vision_config=tower, image_token_index=IMAGE_ID,
            image_seq_length=16,
        )  # fmt: skip

    def model_class(self) -> type:
        """The model class."""
        return hf.FastVlmForConditionalGeneration

    def processor(self) -> Any:
        """Shortest edge to 256 pixels, centre crop."""
        images = LlavaImageProcessor(size={"shortest_edge": 256}, crop_size={"height": 256, "width": 256})
        return LlavaProcessor(
            image_processor=images, tokenizer=word_tokenizer({"<image>": IMAGE_ID}), patch_size=64,
            vision_feature_select_strategy="full", image_token="<image>", num_additional_image_tokens=0,
        )  # fmt: skip


class GotOcr2(Specimen):
    """GOT-OCR 2: a stretched square picture, a SAM tower, two strided convolutions."""

    name = "got_ocr2"

    def config(self, **changes: Any) -> Any:
        """Tower of 16 x 16 patches (4 x 4 tokens), Qwen2 decoder."""
        tower = {
            "hidden_size": 32, "output_channels": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "mlp_dim": 64,
            "image_size": 64, "patch_size": 4, "window_size": 8, "global_attn_indexes": [1],
        }  # fmt: skip
        return hf.GotOcr2Config(
            text_config=hf.Qwen2Config(**text_config(**changes)), vision_config=tower, image_token_index=IMAGE_ID,
            image_seq_length=16,
        )  # fmt: skip

    def model_class(self) -> type:
        """The model class."""
        return hf.GotOcr2ForConditionalGeneration

    def processor(self) -> Any:
        """Every picture stretched to 64 x 64."""
        special = {"<imgpad>": IMAGE_ID, "<img>": 101, "</img>": 102, "<|im_start|>": 103, "<|im_end|>": 104}
        return hf.GotOcr2Processor(
            image_processor=hf.GotOcr2ImageProcessorPil(size={"height": 64, "width": 64}),
            tokenizer=word_tokenizer(special),
        )  # fmt: skip

    def inputs(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """As the processor makes them; without any picture it refuses, and the tokenizer alone is asked."""
        processor, text = self.processor(), [self.prompt(s) for s in samples]
        images = self.nest([s.images() for s in samples])
        if not images:
            return dict(processor.tokenizer(text, padding=True, return_tensors="pt"))
        return dict(processor(images=images, text=text, num_image_tokens=16, padding=True, return_tensors="pt"))

    def prompt(self, sample: Sample) -> str:
        """The picture token between start and end of the picture."""
        return interleaved(sample, "<img> <imgpad> </img>")


SPECIMENS: tuple[Specimen, ...] = (Llava(), VipLlava(), VideoLlava(), FastVlm(), GotOcr2())
