"""Specimens whose pictures keep their shape: patches merged 2 x 2, grids of any size, often a 3-D rotary table."""

from __future__ import annotations

from typing import Any, ClassVar

import transformers

from .base import IMAGE_ID, Sample, Specimen, interleaved, text_config, word_tokenizer

PATCH = 7
"""Pixels per patch; merged 2 x 2, a picture of 56 x 56 gives 16 visual tokens."""

VIDEO_ID, START_ID, END_ID, VIDEO_START_ID, VIDEO_END_ID = 100, 101, 102, 103, 104


class Merged(Specimen):
    """A tower of 7-pixel patches merged 2 x 2, a Qwen2-VL-like processor, and classes found by their names."""

    video = True
    stem: ClassVar[str]
    """Beginning of the names of the family's classes."""

    image: ClassVar[str] = "<|vision_start|><|image_pad|><|vision_end|>"
    clip: ClassVar[str] = "<|vision_start|><|video_pad|><|vision_end|>"
    special: ClassVar[dict[str, int]] = {
        "<|image_pad|>": IMAGE_ID, "<|video_pad|>": VIDEO_ID, "<|vision_start|>": START_ID, "<|vision_end|>": END_ID,
    }  # fmt: skip
    parts: ClassVar[tuple[str, str, str]] = ("Qwen2VLProcessor", "Qwen2VLImageProcessor", "Qwen2VLVideoProcessor")
    """Processor, image processor, video processor."""

    def config(self, **changes: Any) -> Any:
        """The family's text and vision configs under its top config."""
        return getattr(transformers, f"{self.stem}Config")(
            text_config=self.text(**changes), vision_config=self.vision(), **self.ids()
        )

    def text(self, **changes: Any) -> Any:
        """The decoder's config: sections of a 3-D rotary table over heads of 8 channels."""
        rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
        return self.part("Text")(**text_config(**{"rope_parameters": rope, **changes}))

    def vision(self, **changes: Any) -> Any:
        """The tower's config."""
        shared: dict[str, Any] = {
            "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "patch_size": PATCH,
            "out_hidden_size": 64,
        }  # fmt: skip
        return self.part("Vision")(**{**shared, **changes})

    def part(self, kind: str) -> Any:
        """Class of the text or vision config."""
        return getattr(transformers, f"{self.stem}{kind}Config")

    def ids(self) -> dict[str, int]:
        """Placeholder ids of the top config."""
        return {
            "image_token_id": IMAGE_ID, "video_token_id": VIDEO_ID,
            "vision_start_token_id": START_ID, "vision_end_token_id": END_ID,
        }  # fmt: skip

    def model_class(self) -> type:
        """The model class."""
        kind: type = getattr(transformers, f"{self.stem}ForConditionalGeneration")
        return kind

    def processor(self) -> Any:
        """Sides rounded to multiples of 14 pixels; every frame of a video is kept."""
        processor, images, videos = (getattr(transformers, name) for name in self.parts)
        return processor(
            image_processor=images(patch_size=PATCH, size={"shortest_edge": 28 * 28, "longest_edge": 112 * 112}),
            tokenizer=word_tokenizer(self.special),
            video_processor=videos(
                patch_size=PATCH, size={"shortest_edge": 2 * 28 * 28, "longest_edge": 8 * 112 * 112},
                do_sample_frames=False,
            ),
        )  # fmt: skip

    def prompt(self, sample: Sample) -> str:
        """The family's placeholder, between its marks, at every picture."""
        return interleaved(sample, self.image, self.clip)


class Qwen2VL(Merged):
    """Qwen2-VL."""

    name = "qwen2_vl"
    stem = "Qwen2VL"

    def vision(self, **changes: Any) -> Any:
        """This tower names its width ``embed_dim`` and the decoder's ``hidden_size``."""
        return self.part("Vision")(depth=2, embed_dim=32, hidden_size=64, mlp_ratio=2, num_heads=4, patch_size=PATCH)


class Qwen25VL(Merged):
    """Qwen2.5-VL: windows of 2 x 2 visual tokens in the first tower layer, so that their order is undone behind it."""

    name = "qwen2_5_vl"
    stem = "Qwen2_5_VL"
    parts = ("Qwen2_5_VLProcessor", "Qwen2VLImageProcessor", "Qwen2VLVideoProcessor")

    def vision(self, **changes: Any) -> Any:
        """Two layers: one windowed, one over the whole picture."""
        return super().vision(window_size=4 * PATCH, fullatt_block_indexes=[1], **changes)


class Qwen3VL(Merged):
    """Qwen3-VL: DeepStack features of three tower layers enter the first three decoder layers; timed frames."""

    name = "qwen3_vl"
    stem = "Qwen3VL"
    clip = "<|video_pad|>"
    parts = ("Qwen3VLProcessor", "Qwen2VLImageProcessor", "Qwen3VLVideoProcessor")

    def text(self, **changes: Any) -> Any:
        """Interleaved sections of the 3-D rotary table."""
        rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
        return super().text(**{"rope_parameters": rope, **changes})

    def vision(self, **changes: Any) -> Any:
        """Three layers, each with a DeepStack branch."""
        return super().vision(depth=3, num_position_embeddings=64, deepstack_visual_indexes=[0, 1, 2], **changes)


class Qwen3VLMoe(Qwen3VL):
    """Qwen3-VL with a mixture of four experts in every layer."""

    name = "qwen3_vl_moe"
    stem = "Qwen3VLMoe"

    def text(self, **changes: Any) -> Any:
        """Two of four experts per token."""
        return super().text(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48, **changes)


class Glm4v(Merged):
    """GLM-4.1V: a rotary table over half of every head; video frames carry the image placeholder and a time.

    The model cannot tell pictures from frames: a batch holds the ones or the others.
    """

    name = "glm4v"
    stem = "Glm4v"
    image = "<|begin_of_image|><|image|><|end_of_image|>"
    clip = "<|begin_of_video|><|video|><|end_of_video|>"
    special: ClassVar[dict[str, int]] = {
        "<|image|>": IMAGE_ID, "<|video|>": VIDEO_ID, "<|begin_of_image|>": START_ID, "<|end_of_image|>": END_ID,
        "<|begin_of_video|>": VIDEO_START_ID, "<|end_of_video|>": VIDEO_END_ID,
    }  # fmt: skip
    parts = ("Glm4vProcessor", "Glm4vImageProcessor", "Glm4vVideoProcessor")

    def text(self, **changes: Any) -> Any:
        """Six of the twelve channels of a head are rotated."""
        rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 1], "partial_rotary_factor": 0.5}
        return super().text(**{"rope_parameters": rope, "head_dim": 12, **changes})

    def vision(self, **changes: Any) -> Any:
        """Position embeddings of an 8 x 8 grid, interpolated."""
        return super().vision(image_size=8 * PATCH, **changes)

    def ids(self) -> dict[str, int]:
        """Placeholder ids of the top config."""
        return {
            "image_token_id": IMAGE_ID, "video_token_id": VIDEO_ID, "image_start_token_id": START_ID,
            "image_end_token_id": END_ID, "video_start_token_id": VIDEO_START_ID, "video_end_token_id": VIDEO_END_ID,
        }  # fmt: skip


class Glm46V(Glm4v):
    """GLM-4.6V: GLM-4.1V's parts under a config of its own."""

    name = "glm46v"
    stem = "Glm46V"
    parts = ("Glm46VProcessor", "Glm46VImageProcessor", "Glm46VVideoProcessor")

    def part(self, kind: str) -> Any:
        """The text and vision configs are those of GLM-4.1V."""
        return getattr(transformers, f"Glm4v{kind}Config")


class Glm4vMoe(Glm4v):
    """GLM-4.5V: a dense first layer, then a mixture of four experts and a shared one."""

    name = "glm4v_moe"
    stem = "Glm4vMoe"

    def text(self, **changes: Any) -> Any:
        """Two of four experts per token behind the first layer."""
        return super().text(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=48, **changes)


class GlmOcr(Glm4v):
    """GLM-OCR: GLM-4.1V with norms inside the tower's attention."""

    name = "glm_ocr"
    stem = "GlmOcr"


SPECIMENS: tuple[Specimen, ...] = (
    Qwen2VL(), Qwen25VL(), Qwen3VL(), Qwen3VLMoe(), Glm4v(), Glm46V(), Glm4vMoe(), GlmOcr()
)  # fmt: skip
