"""Specimens whose pictures are cut into tiles: any-resolution grids, tiled canvases, global views beside tiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import transformers as hf
from PIL import Image
from torch import Tensor

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


class SmolVLM(Idefics3):
    """SmolVLM: as Idefics3; a video is a run of global views."""

    name = "smolvlm"
    video = True
    handmade = "its processor needs num2words; text and tiles are laid out by Idefics3's, which follows the same rule"

    def config(self, **changes: Any) -> Any:
        """Own tower of 4 x 4 patches (2 x 2 tokens), Llama decoder."""
        return hf.SmolVLMConfig(
            text_config=hf.LlamaConfig(**text_config(**changes)), vision_config={**TOWER}, scale_factor=2,
            image_token_id=IMAGE_ID, pad_token_id=0,
        )  # fmt: skip

    def model_class(self) -> type:
        """The model class."""
        return hf.SmolVLMForConditionalGeneration

    def image_processor(self) -> Any:
        """Pictures up to 112 pixels in tiles of 56."""
        return hf.SmolVLMImageProcessorPil(size={"longest_edge": 112}, max_image_size={"longest_edge": 56})

    def inputs(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Frames stand as pictures that are not split, as the video processor makes them."""
        if not any(s.frames for s in samples):
            return super().inputs(samples)
        if any(s.pictures and not s.frames for s in samples):
            raise ValueError("videos and pictures cannot share a batch: only pictures are split")
        frames = [[Image.fromarray(f) for f in s.video()] if s.frames else [] for s in samples]
        text = [self.prompt(s) for s in samples]
        processor = self.processor()
        return dict(processor(text=text, images=frames, do_image_splitting=False, padding=True, return_tensors="pt"))

    def prompt(self, sample: Sample) -> str:
        """``<image>`` at every picture and at every frame."""
        return interleaved(sample, "<image>", " ".join(["<image>"] * sample.frames))


class LlavaNextVideo(LlavaNext):
    """LLaVA-NeXT-Video: LLaVA-NeXT for pictures; the frames of a video are pooled 2 x 2 and have no newline tokens."""

    name = "llava_next_video"
    video = True

    def config(self, **changes: Any) -> Any:
        """CLIP tower of 4 x 4 patches, Llama decoder."""
        return hf.LlavaNextVideoConfig(
            text_config=hf.LlamaConfig(**text_config(**changes)), vision_config=hf.CLIPVisionConfig(**TOWER),
            image_token_index=IMAGE_ID, video_token_index=VIDEO_ID, image_grid_pinpoints=PINPOINTS,
        )  # fmt: skip

    def model_class(self) -> type:
        """The model class."""
        return hf.LlavaNextVideoForConditionalGeneration

    def processor(self) -> Any:
        """Tiles and frames of 56 pixels."""
        return hf.LlavaNextVideoProcessor(
            image_processor=super().processor().image_processor,
            video_processor=hf.LlavaNextVideoVideoProcessor(size={"shortest_edge": 56}, crop_size=square(56)),
            tokenizer=word_tokenizer({"<image>": IMAGE_ID, "<video>": VIDEO_ID}), patch_size=14,
            vision_feature_select_strategy="default", num_additional_image_tokens=1,
        )  # fmt: skip

    def prompt(self, sample: Sample) -> str:
        """``<image>`` at every picture, ``<video>`` at the video."""
        return interleaved(sample, "<image>", "<video>")


class Idefics2(Specimen):
    """Idefics2: pictures of any shape, resampled by a perceiver to a fixed number of latents without a grid."""

    name = "idefics2"

    def config(self, **changes: Any) -> Any:
        """Own tower, six latents per tile, Mistral decoder."""
        return hf.Idefics2Config(
            text_config=hf.MistralConfig(**{"sliding_window": None, **text_config(**changes)}),
            vision_config={**TOWER},
            perceiver_config={
                "hidden_size": 64, "resampler_n_latents": 6, "resampler_depth": 2, "resampler_n_heads": 4,
                "resampler_head_dim": 16, "num_key_value_heads": 2,
            }, image_token_id=IMAGE_ID,
        )  # fmt: skip

    def model_class(self) -> type:
        """The model class."""
        return hf.Idefics2ForConditionalGeneration

    def processor(self) -> Any:
        """Pictures of 28 to 56 pixels, no splitting."""
        special = {"<image>": IMAGE_ID, "<fake_token_around_image>": START_ID, "<end_of_utterance>": 103}
        return hf.Idefics2Processor(
            image_processor=hf.Idefics2ImageProcessorPil(
                size={"shortest_edge": 28, "longest_edge": 56}, do_image_splitting=False
            ),
            tokenizer=word_tokenizer(special), image_seq_len=6,
        )  # fmt: skip

    def prompt(self, sample: Sample) -> str:
        """``<image>`` at every picture."""
        return interleaved(sample, "<image>")

    def nest(self, images: list[list[Image.Image]]) -> Any:
        """Row by row."""
        return images


class AyaVision(Specimen):
    """Aya Vision: numbered tiles, the global view last, 2 x 2 patches folded; sliding and full layers alternate."""

    name = "aya_vision"

    def config(self, **changes: Any) -> Any:
        """SigLIP tower of 4 x 4 patches (2 x 2 tokens), Cohere2 decoder."""
        return hf.AyaVisionConfig(
            text_config=hf.Cohere2Config(**{"sliding_window": 4096, "logit_scale": 1.0, **text_config(**changes)}),
            vision_config=hf.SiglipVisionConfig(**TOWER, vision_use_head=False), image_token_index=IMAGE_ID,
        )  # fmt: skip

    def model_class(self) -> type:
        """The model class."""
        return hf.AyaVisionForConditionalGeneration

    def processor(self) -> Any:
        """One to four tiles of 56 pixels."""
        special = {
            "<image>": 109, "<|IMG_PATCH|>": IMAGE_ID, "<|START_OF_IMG|>": START_ID, "<|END_OF_IMG|>": END_ID,
            "<|IMG_LINE_BREAK|>": 104, "TILE_GLOBAL": 105, "TILE_1": 110, "TILE_2": 111, "TILE_3": 112, "TILE_4": 113,
        }  # fmt: skip
        return hf.AyaVisionProcessor(
            image_processor=hf.GotOcr2ImageProcessorPil(size=square(56), min_patches=1, max_patches=4),
            tokenizer=word_tokenizer(special), patch_size=14, img_size=56, downsample_factor=2,
        )  # fmt: skip

    def prompt(self, sample: Sample) -> str:
        """``<image>`` at every picture."""
        return interleaved(sample, "<image>")


class Cohere2Vision(AyaVision):
    """Command A Vision: tiles of one canvas with a line break token after each, the thumbnail last."""

    name = "cohere2_vision"

    def config(self, **changes: Any) -> Any:
        """SigLIP tower of 4 x 4 patches (2 x 2 tokens), Cohere2 decoder."""
        return hf.Cohere2VisionConfig(
            text_config=hf.Cohere2Config(**{"sliding_window": 4096, "logit_scale": 1.0, **text_config(**changes)}),
            vision_config=hf.SiglipVisionConfig(**TOWER, vision_use_head=False), image_token_id=IMAGE_ID,
            alignment_intermediate_size=64,
        )  # fmt: skip

    def model_class(self) -> type:
        """The model class."""
        return hf.Cohere2VisionForConditionalGeneration

    def processor(self) -> Any:
        """One to four tiles of 56 pixels; ``patch_size`` is the side of a tile in tokens."""
        special = {"<image>": IMAGE_ID, "<boi>": START_ID, "<eoi>": END_ID, "<break>": 104}
        names = {
            "boi_token": "<boi>", "eoi_token": "<eoi>", "image_token": "<image>", "img_line_break_token": "<break>"
        }  # fmt: skip
        return hf.Cohere2VisionProcessor(
            image_processor=hf.Cohere2VisionImageProcessor(
                size=square(56), min_patches=1, max_patches=4, patch_size=2, crop_to_patches=True
            ),
            tokenizer=word_tokenizer(special, extra_special_tokens=names),
        )  # fmt: skip


class PerceptionLM(Specimen):
    """Perception LM: the thumbnail first, then the tiles of a canvas, pooled 2 x 2; pixels of one row per picture."""

    name = "perception_lm"
    video = True

    def config(self, **changes: Any) -> Any:
        """Perception Encoder of 4 x 4 patches and a class token (timm), 2 x 2 tokens, Llama decoder."""
        tower = {
            "model_type": "timm_wrapper", "architecture": "vit_pe_core_tiny_patch16_384", "do_pooling": False,
            "model_args": {"img_size": 56, "patch_size": 14, "embed_dim": 32, "depth": 2, "num_heads": 4},
            "hidden_size": 32,
        }  # fmt: skip
        return hf.PerceptionLMConfig(
            text_config=hf.LlamaConfig(**text_config(**changes)), vision_config=tower, vision_use_cls_token=True,
            projector_pooling_ratio=2, image_token_id=IMAGE_ID, video_token_id=VIDEO_ID,
        )  # fmt: skip

    def model_class(self) -> type:
        """The model class."""
        return hf.PerceptionLMForConditionalGeneration

    def processor(self) -> Any:
        """One tile of 56 pixels beside the thumbnail: the processor cannot stack pictures with unequal tile counts."""
        names = {"image_token": "<image>", "video_token": "<video>"}
        return hf.PerceptionLMProcessor(
            image_processor=hf.PerceptionLMImageProcessor(tile_size=56, max_num_tiles=1),
            video_processor=hf.PerceptionLMVideoProcessor(size=square(56)),
            tokenizer=word_tokenizer({"<image>": IMAGE_ID, "<video>": VIDEO_ID}, extra_special_tokens=names),
            patch_size=14, pooling_ratio=2,
        )  # fmt: skip

    def prompt(self, sample: Sample) -> str:
        """``<image>`` at every picture, ``<video>`` at the video."""
        return interleaved(sample, "<image>", "<video>")


SPECIMENS: tuple[Specimen, ...] = (
    LlavaNext(),
    LlavaOneVision(),
    LlavaNextVideo(),
    InternVL(),
    Idefics2(),
    Idefics3(),
    SmolVLM(),
    AyaVision(),
    Cohere2Vision(),
    PerceptionLM(),
)
