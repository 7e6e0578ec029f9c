"""Specimens whose pictures are cut into tiles: any-resolution grids, tiled canvases, global views beside tiles."""

from __future__ import annotations

from typing import Any

import transformers as hf
from PIL import Image

from .base import IMAGE_ID, Sample, Specimen, interleaved, text_config, word_tokenizer

VIDEO_ID, START_ID, END_ID = 100, 101, 102
# With tiles of 56 pixels the pictures of a sample meet 2 x 1, 1 x 2 and 2 x 2 tiles.
PINPOINTS = [[56, 112], [112, 56], [112, 112]]
TOWER: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 56,
    "patch_size": 14,
}  # fmt: skip


def square(side: int) -> dict[str, int]:
    """The ``size`` of an image processor with a square canvas."""
    return {"height": side, "width": side}


def nested(images: list[list[Image.Image]]) -> list[list[Image.Image]]:
    """Pictures row by row, without the rows that have none."""
    return [row for row in images if row]


class LlavaNext(Specimen):
    """LLaVA-NeXT: a base view, then unpadded tiles with a newline token after every row."""

    name = "llava_next"

    def config(self, **changes: Any) -> hf.LlavaNextConfig:
        """CLIP tower of 4 x 4 patches, Llama decoder."""
        return hf.LlavaNextConfig(
            text_config=hf.LlamaConfig(**text_config(**changes)), vision_config=hf.CLIPVisionConfig(**TOWER),
            image_token_index=IMAGE_ID, image_grid_pinpoints=PINPOINTS, image_seq_length=16,
        )  # fmt: skip

    def model_class(self) -> type:
        """The model class."""
        return hf.LlavaNextForConditionalGeneration

    def processor(self) -> Any:
        """Tiles of 56 pixels."""
        images = hf.LlavaNextImageProcessorPil(
            size={"shortest_edge": 56}, crop_size=square(56), image_grid_pinpoints=PINPOINTS
        )
        return hf.LlavaNextProcessor(
            image_processor=images, tokenizer=word_tokenizer({"<image>": IMAGE_ID}), patch_size=14,
            vision_feature_select_strategy="default", num_additional_image_tokens=1,
        )  # fmt: skip

    def prompt(self, sample: Sample) -> str:
        """``<image>`` at every picture."""
        return interleaved(sample, "<image>")


class LlavaOneVision(Specimen):
    """LLaVA-OneVision: as LLaVA-NeXT; several pictures get no tiles, a video pooled frames and one newline token."""

    name = "llava_onevision"
    video = True

    def config(self, **changes: Any) -> hf.LlavaOnevisionConfig:
        """SigLIP tower of 4 x 4 patches, Qwen2 decoder."""
        return hf.LlavaOnevisionConfig(
            text_config=hf.Qwen2Config(**text_config(**changes)),
            vision_config=hf.SiglipVisionConfig(**TOWER, vision_use_head=False),
            image_token_index=IMAGE_ID, video_token_index=VIDEO_ID, image_grid_pinpoints=PINPOINTS,
        )  # fmt: skip

    def model_class(self) -> type:
        """The model class."""
        return hf.LlavaOnevisionForConditionalGeneration

    def processor(self) -> Any:
        """Tiles and frames of 56 pixels."""
        return hf.LlavaOnevisionProcessor(
            image_processor=hf.LlavaOnevisionImageProcessorPil(size=square(56), image_grid_pinpoints=PINPOINTS),
            video_processor=hf.LlavaOnevisionVideoProcessor(size=square(56)),
            tokenizer=word_tokenizer({"<image>": IMAGE_ID, "<video>": VIDEO_ID}), num_image_tokens=16,
            vision_feature_select_strategy="full",
        )  # fmt: skip

    def prompt(self, sample: Sample) -> str:
        """``<image>`` at every picture, ``<video>`` at the video."""
        return interleaved(sample, "<image>", "<video>")

    def nest(self, images: list[list[Image.Image]]) -> Any:
        """Row by row: the number of pictures of a row decides on tiles."""
        return nested(images)


class InternVL(Specimen):
    """InternVL3: tiles of a canvas in one run, the thumbnail last, 2 x 2 patches folded into one token."""

    name = "internvl"
    video = True

    def config(self, **changes: Any) -> hf.InternVLConfig:
        """Own tower of 4 x 4 patches (2 x 2 tokens), Qwen2 decoder."""
        return hf.InternVLConfig(
            text_config=hf.Qwen2Config(**text_config(**changes)),
            vision_config=hf.InternVLVisionConfig(**{**TOWER, "image_size": [56, 56], "patch_size": [14, 14]}),
            image_token_id=IMAGE_ID, image_seq_length=4,
        )  # fmt: skip

    def model_class(self) -> type:
        """The model class."""
        return hf.InternVLForConditionalGeneration

    def processor(self) -> Any:
        """One to four tiles of 56 pixels."""
        special = {"<context>": IMAGE_ID, "<video>": VIDEO_ID, "<img>": START_ID, "</img>": END_ID}
        names = {
            "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<context>",
            "video_token": "<video>",
        }  # fmt: skip
        return hf.InternVLProcessor(
            image_processor=hf.GotOcr2ImageProcessorPil(size=square(56), min_patches=1, max_patches=4),
            video_processor=hf.InternVLVideoProcessor(size=square(56)),
            tokenizer=word_tokenizer(special, extra_special_tokens=names), image_seq_length=4,
        )  # fmt: skip

    def prompt(self, sample: Sample) -> str:
        """One context token at every picture, ``<video>`` at the video."""
        return interleaved(sample, "<context>", "<video>")


class Idefics3(Specimen):
    """Idefics3: a run per tile with ``<row_i_col_j>`` between them, the global view last."""

    name = "idefics3"

    def config(self, **changes: Any) -> Any:
        """Own tower of 4 x 4 patches (2 x 2 tokens), Llama decoder."""
        return hf.Idefics3Config(
            text_config=hf.LlamaConfig(**text_config(**changes)), vision_config={**TOWER}, scale_factor=2,
            image_token_id=IMAGE_ID, pad_token_id=0,
        )  # fmt: skip

    def model_class(self) -> type:
        """The model class."""
        return hf.Idefics3ForConditionalGeneration

    def image_processor(self) -> Any:
        """Pictures up to 112 pixels in tiles of 56."""
        return hf.Idefics3ImageProcessorPil(size={"longest_edge": 112}, max_image_size={"longest_edge": 56})

    def processor(self) -> Any:
        """Four tokens per tile."""
        special = {
            "<image>": IMAGE_ID, "<fake_token_around_image>": START_ID, "<global-img>": END_ID,
            "<end_of_utterance>": 103,
        }  # fmt: skip
        special |= {
            f"<row_{row + 1}_col_{column + 1}>": 110 + 6 * row + column for row in range(6) for column in range(6)
        }
        return hf.Idefics3Processor(
            image_processor=self.image_processor(), tokenizer=word_tokenizer(special), image_seq_len=4
        )

    def prompt(self, sample: Sample) -> str:
        """``<image>`` at every picture."""
        return interleaved(sample, "<image>")

    def nest(self, images: list[list[Image.Image]]) -> Any:
        """Row by row."""
        return images


SPECIMENS: tuple[Specimen, ...] = (LlavaNext(), LlavaOneVision(), InternVL(), Idefics3())
