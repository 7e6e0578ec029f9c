"""Specimens of the families that share neither tiles nor three-axis positions: prefixes, blocks, separators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import SiglipVisionConfig

from .base import IMAGE_ID, Sample, Specimen, interleaved, spoken, text_config, word_tokenizer

START, END, BREAK = 100, 101, 102


def siglip(**changes: Any) -> SiglipVisionConfig:
    """A tower of 4 x 4 patches on 56 pixels."""
    numbers = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 56,
        "patch_size": 14, "vision_use_head": False,
    }  # fmt: skip
    return SiglipVisionConfig(**{**numbers, **changes})


class PaliGemma(Specimen):
    """PaliGemma: pictures first, the whole prompt attended in both directions."""

    name = "paligemma"

    def config(self, **changes: Any) -> Any:
        """SigLIP tower of 4 x 4 patches, Gemma decoder."""
        from transformers import GemmaConfig, PaliGemmaConfig

        text = GemmaConfig(**text_config(**changes))
        return PaliGemmaConfig(
            text_config=text, vision_config=siglip(), image_token_id=IMAGE_ID, projection_dim=64, hidden_size=64,
        )  # fmt: skip

    def model_class(self) -> type:
        """The model class."""
        from transformers import PaliGemmaForConditionalGeneration

        return PaliGemmaForConditionalGeneration

    def processor(self) -> Any:
        """Stretches every picture to 56 x 56."""
        from transformers import PaliGemmaProcessor, SiglipImageProcessorPil

        images = SiglipImageProcessorPil(size={"height": 56, "width": 56})
        images.image_seq_length = 16
        return PaliGemmaProcessor(image_processor=images, tokenizer=word_tokenizer({"<image>": IMAGE_ID}))

    def prompt(self, sample: Sample) -> str:
        """``<image>`` for every picture, then the words."""
        words = " ".join(spoken(run) for run in sample.words())
        return "<image>" * len(sample.pictures) + words

    def inputs(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Without the labels that the processor adds for training; a prompt needs a picture."""
        batch = super().inputs(samples)
        batch.pop("labels")
        return batch


class Gemma3(Specimen):
    """Gemma 3: picture blocks attended in both directions, sliding and full layers in turn."""

    name = "gemma3"

    def config(self, **changes: Any) -> Any:
        """SigLIP tower of 4 x 4 patches, pooled to 2 x 2."""
        from transformers import Gemma3Config, Gemma3TextConfig

        layers = ["sliding_attention", "full_attention"] * 2
        text = text_config(**{"layer_types": layers, "sliding_window": 512, "query_pre_attn_scalar": 8, **changes})
        return Gemma3Config(
            text_config=Gemma3TextConfig(**text), vision_config=siglip(), image_token_id=IMAGE_ID,
            boi_token_index=START, eoi_token_index=END, mm_tokens_per_image=4,
        )  # fmt: skip

    def model_class(self) -> type:
        """The model class."""
        from transformers import Gemma3ForConditionalGeneration

        return Gemma3ForConditionalGeneration

    def processor(self) -> Any:
        """Stretches every picture to 56 x 56."""
        from transformers import Gemma3ImageProcessorPil, Gemma3Processor

        tokenizer = word_tokenizer(
            {"<image>": IMAGE_ID, "<start>": START, "<end>": END},
            extra_special_tokens={"image_token": "<image>", "boi_token": "<start>", "eoi_token": "<end>"},
        )
        images = Gemma3ImageProcessorPil(size={"height": 56, "width": 56})
        return Gemma3Processor(image_processor=images, tokenizer=tokenizer, image_seq_length=4)

    def prompt(self, sample: Sample) -> str:
        """The start-of-image token at every picture."""
        return interleaved(sample, "<start>")

    def nest(self, images: list[list[Any]]) -> Any:
        """One list per sample."""
        return images


class Mistral3(Specimen):
    """Mistral Small 3.1: a Pixtral tower at the picture's own size, a separator behind every row of the grid."""

    name = "mistral3"

    def config(self, **changes: Any) -> Any:
        """Patches of 14 pixels merged 2 x 2, Mistral decoder."""
        from transformers import Mistral3Config, MistralConfig, PixtralVisionConfig

        vision = PixtralVisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
            image_size=112, patch_size=14,
        )  # fmt: skip
        text = MistralConfig(**text_config(**{"sliding_window": None, **changes}))
        return Mistral3Config(
            text_config=text, vision_config=vision, image_token_id=IMAGE_ID, spatial_merge_size=2,
            vision_feature_layer=-1,
        )  # fmt: skip

    def model_class(self) -> type:
        """The model class."""
        from transformers import Mistral3ForConditionalGeneration

        return Mistral3ForConditionalGeneration

    def processor(self) -> Any:
        """Keeps the aspect ratio, longest edge at most 112 pixels."""
        from transformers import PixtralImageProcessor, PixtralProcessor

        special = {"[IMG]": IMAGE_ID, "[IMG_BREAK]": BREAK, "[IMG_END]": END}
        images = PixtralImageProcessor(size={"longest_edge": 112}, patch_size={"height": 14, "width": 14})
        return PixtralProcessor(
            image_processor=images, tokenizer=word_tokenizer(special), patch_size=14, spatial_merge_size=2
        )

    def prompt(self, sample: Sample) -> str:
        """``[IMG]`` at every picture."""
        return interleaved(sample, "[IMG]")


SPECIMENS: tuple[Specimen, ...] = (PaliGemma(), Gemma3(), Mistral3())
