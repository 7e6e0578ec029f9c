"""Specimens whose pictures keep their shape: patches merged 2 x 2, grids of any size, often a 3-D rotary table.

They differ in data more than in code: every class states its numbers, and :class:`Merged` builds from them.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

import transformers
from torch import Tensor

from .base import IMAGE_ID, Sample, Specimen, interleaved, text_config, word_tokenizer

PATCH = 7
"""Pixels per patch; merged 2 x 2, a picture of 56 x 56 gives 16 visual tokens."""

VIDEO_ID, START_ID, END_ID, VIDEO_START_ID, VIDEO_END_ID = 100, 101, 102, 103, 104
ROLES = {
    IMAGE_ID: "image_token", VIDEO_ID: "video_token", START_ID: "image_start_token", END_ID: "image_end_token",
    VIDEO_START_ID: "video_start_token", VIDEO_END_ID: "video_end_token",
}  # fmt: skip
FRAMED_IDS = {f"{role}_id": number for number, role in ROLES.items()}
VISION_IDS = {
    "image_token_id": IMAGE_ID, "video_token_id": VIDEO_ID, "vision_start_token_id": START_ID,
    "vision_end_token_id": END_ID,
}  # fmt: skip


def rope(*section: int, **extra: Any) -> dict[str, Any]:
    """Parameters of a 3-D rotary table whose frequencies are dealt out as ``section`` says."""
    return {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(section), **extra}


class Merged(Specimen):
    """A tower of small patches merged 2 x 2, and classes of transformers found by their names.

    Class attributes:
        stem: beginning of the names of the family's classes.
        parts: processor, image processor, video processor ("" where the family has none).
        special: special tokens of the family by id.
        image, clip: what stands in the prompt for a picture, for a video.
        ids: entries of the top config.
        decoder, tower: entries of the text config and of the vision config.
        pictures, clips: options of the image processor, of the video processor.
    """

    video = True
    stem: ClassVar[str]
    parts: ClassVar[tuple[str, str, str]] = ("Qwen2VLProcessor", "Qwen2VLImageProcessor", "Qwen2VLVideoProcessor")
    special: ClassVar[dict[str, int]] = {
        "<|image_pad|>": IMAGE_ID, "<|video_pad|>": VIDEO_ID, "<|vision_start|>": START_ID, "<|vision_end|>": END_ID,
    }  # fmt: skip
    image: ClassVar[str] = "<|vision_start|><|image_pad|><|vision_end|>"
    clip: ClassVar[str] = "<|vision_start|><|video_pad|><|vision_end|>"
    ids: ClassVar[dict[str, Any]] = VISION_IDS
    decoder: ClassVar[dict[str, Any]] = {"rope_parameters": rope(2, 1, 1)}
    tower: ClassVar[dict[str, Any]] = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "patch_size": PATCH,
        "out_hidden_size": 64,
    }  # fmt: skip
    pictures: ClassVar[dict[str, Any]] = {
        "patch_size": PATCH, "size": {"shortest_edge": 28 * 28, "longest_edge": 112 * 112},
    }  # fmt: skip
    clips: ClassVar[dict[str, Any]] = {
        "patch_size": PATCH, "size": {"shortest_edge": 2 * 28 * 28, "longest_edge": 8 * 112 * 112},
        "do_sample_frames": False,
    }  # fmt: skip

    def config(self, **changes: Any) -> Any:
        """The family's text and vision configs under its top config."""
        text = self.config_class("Text")(**text_config(**{**self.decoder, **changes}))
        vision = self.config_class("Vision")(**self.tower)
        return self.config_class("")(text_config=text, vision_config=vision, **self.ids)

    def config_class(self, part: str) -> Any:
        """Config class of the text model, of the vision model, or of the whole."""
        return getattr(transformers, f"{self.stem}{part}Config")

    def model_class(self) -> type:
        """The model class."""
        kind: type = getattr(transformers, f"{self.stem}ForConditionalGeneration")
        return kind

    def processor(self) -> Any:
        """Sides rounded to whole merged patches; every frame of a video is kept."""
        processor, images, videos = self.parts
        made = {"image_processor": getattr(transformers, images)(**self.pictures), "tokenizer": self.tokenizer()}
        if videos:
            made["video_processor"] = getattr(transformers, videos)(**self.clips)
        return getattr(transformers, processor)(**made)

    def tokenizer(self) -> Any:
        """Words, and the special tokens under the names by which processors ask for them."""
        roles = {ROLES[number]: token for token, number in self.special.items()}
        return word_tokenizer(self.special, extra_special_tokens=roles)

    def inputs(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Some processors hand tensors to numpy in a way that newer versions of numpy warn about."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
            return super().inputs(samples)

    def prompt(self, sample: Sample) -> str:
        """The family's placeholder, between its marks, at every picture."""
        return interleaved(sample, self.image, self.clip)


class Qwen2VL(Merged):
    """Qwen2-VL: its tower calls its own width ``embed_dim`` and the decoder's ``hidden_size``."""

    name = "qwen2_vl"
    stem = "Qwen2VL"
    tower: ClassVar[dict[str, Any]] = {
        "depth": 2, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2, "num_heads": 4, "patch_size": PATCH,
    }  # fmt: skip


class Qwen25VL(Merged):
    """Qwen2.5-VL: windows of 2 x 2 visual tokens in the first tower layer, whose order is undone behind the last."""

    name = "qwen2_5_vl"
    stem = "Qwen2_5_VL"
    parts = ("Qwen2_5_VLProcessor", "Qwen2VLImageProcessor", "Qwen2VLVideoProcessor")
    tower: ClassVar[dict[str, Any]] = {**Merged.tower, "window_size": 4 * PATCH, "fullatt_block_indexes": [1]}


class Qwen3VL(Merged):
    """Qwen3-VL: DeepStack features of three tower layers enter the first three decoder layers; timed frames."""

    name = "qwen3_vl"
    stem = "Qwen3VL"
    parts = ("Qwen3VLProcessor", "Qwen2VLImageProcessor", "Qwen3VLVideoProcessor")
    clip = "<|video_pad|>"
    decoder: ClassVar[dict[str, Any]] = {"rope_parameters": rope(2, 1, 1, mrope_interleaved=True)}
    tower: ClassVar[dict[str, Any]] = {
        **Merged.tower, "depth": 3, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1, 2],
    }  # fmt: skip


class Qwen3VLMoe(Qwen3VL):
    """Qwen3-VL with two of four experts per token."""

    name = "qwen3_vl_moe"
    stem = "Qwen3VLMoe"
    decoder: ClassVar[dict[str, Any]] = {
        **Qwen3VL.decoder, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48,
    }  # fmt: skip


class Qwen35(Qwen3VL):
    """Qwen3.5: gated linear attention and gated full attention in turn; half of sixteen channels are rotated.

    Six layers, so that the middle ones, where many methods act, hold both kinds.
    """

    name = "qwen3_5"
    stem = "Qwen3_5"
    tower: ClassVar[dict[str, Any]] = {**Merged.tower, "num_position_embeddings": 64}
    decoder: ClassVar[dict[str, Any]] = {
        "rope_parameters": rope(2, 1, 1, mrope_interleaved=True, partial_rotary_factor=0.5), "head_dim": 16,
        "num_hidden_layers": 6, "full_attention_interval": 2, "linear_key_head_dim": 8,
        "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    }  # fmt: skip


class Glm4v(Merged):
    """GLM-4.1V: six of twelve channels are rotated; video frames carry the image placeholder and a time.

    The model cannot tell pictures from frames: a batch holds the ones or the others.
    """

    name = "glm4v"
    stem = "Glm4v"
    parts = ("Glm4vProcessor", "Glm4vImageProcessor", "Glm4vVideoProcessor")
    special: ClassVar[dict[str, int]] = {
        "<|image|>": IMAGE_ID, "<|video|>": VIDEO_ID, "<|begin_of_image|>": START_ID, "<|end_of_image|>": END_ID,
        "<|begin_of_video|>": VIDEO_START_ID, "<|end_of_video|>": VIDEO_END_ID,
    }  # fmt: skip
    image = "<|begin_of_image|><|image|><|end_of_image|>"
    clip = "<|begin_of_video|><|video|><|end_of_video|>"
    ids: ClassVar[dict[str, Any]] = FRAMED_IDS
    decoder: ClassVar[dict[str, Any]] = {"rope_parameters": rope(1, 1, 1, partial_rotary_factor=0.5), "head_dim": 12}
    tower: ClassVar[dict[str, Any]] = {**Merged.tower, "image_size": 8 * PATCH}


class Glm46V(Glm4v):
    """GLM-4.6V: GLM-4.1V's parts under a config of its own."""

    name = "glm46v"
    stem = "Glm46V"
    parts = ("Glm46VProcessor", "Glm46VImageProcessor", "Glm46VVideoProcessor")

    def config_class(self, part: str) -> Any:
        """The text and vision configs are those of GLM-4.1V."""
        return getattr(transformers, f"Glm4v{part}Config") if part else transformers.Glm46VConfig


class Glm4vMoe(Glm4v):
    """GLM-4.5V: behind a dense first layer, two of four experts and a shared one."""

    name = "glm4v_moe"
    stem = "Glm4vMoe"
    decoder: ClassVar[dict[str, Any]] = {
        **Glm4v.decoder, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48,
    }  # fmt: skip


class GlmOcr(Glm4v):
    """GLM-OCR: GLM-4.1V with norms inside the tower's attention."""

    name = "glm_ocr"
    stem = "GlmOcr"


class PaddleOcrVL(Merged):
    """PaddleOCR-VL: a SigLIP tower for any resolution, an Ernie decoder; pictures only."""

    name = "paddleocr_vl"
    stem = "PaddleOCRVL"
    video = False
    parts = ("PaddleOCRVLProcessor", "PaddleOCRVLImageProcessor", "")
    ids: ClassVar[dict[str, Any]] = {**VISION_IDS, "tie_word_embeddings": False}
    decoder: ClassVar[dict[str, Any]] = {**Merged.decoder, "tie_word_embeddings": False}
    tower: ClassVar[dict[str, Any]] = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "patch_size": PATCH, "image_size": 8 * PATCH,
    }  # fmt: skip

    def config_class(self, part: str) -> Any:
        """The text and vision configs drop the ending of the family's name."""
        return getattr(transformers, f"PaddleOCR{part or 'VL'}Config")


class Ernie45VLMoe(Merged):
    """ERNIE 4.5 VL: words and pictures have experts of their own; a resampler joins frames in pairs.

    No time is painted onto the frames: that needs a font file.
    """

    name = "ernie4_5_vl_moe"
    stem = "Ernie4_5_VLMoe"
    parts = ("Ernie4_5_VLMoeProcessor", "Ernie4_5_VLMoeImageProcessor", "Ernie4_5_VLMoeVideoProcessor")
    special: ClassVar[dict[str, int]] = {
        "<|image_pad|>": IMAGE_ID, "<|video_pad|>": VIDEO_ID, "<|image_start|>": START_ID, "<|image_end|>": END_ID,
        "<|video_start|>": VIDEO_START_ID, "<|video_end|>": VIDEO_END_ID,
    }  # fmt: skip
    image = "<|image_start|><|image_pad|><|image_end|>"
    clip = "<|video_start|><|video_pad|><|video_end|>"
    ids: ClassVar[dict[str, Any]] = {**FRAMED_IDS, "tie_word_embeddings": False}
    decoder: ClassVar[dict[str, Any]] = {
        "rope_parameters": rope(1, 1, 2), "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": [48, 32],
        "moe_num_shared_experts": 1, "tie_word_embeddings": False,
    }  # fmt: skip
    clips: ClassVar[dict[str, Any]] = {**Merged.clips, "draw_on_frames": False}


class VideoLlama3(Merged):
    """VideoLLaMA 3: pictures unmerged, frames merged 2 x 2 behind their times and thinned; a Qwen2 decoder."""

    name = "video_llama_3"
    stem = "VideoLlama3"
    parts = ("VideoLlama3Processor", "VideoLlama3ImageProcessor", "VideoLlama3VideoProcessor")
    image = "<|image_pad|>"
    clip = "<|video_pad|>"
    ids: ClassVar[dict[str, Any]] = {"image_token_id": IMAGE_ID, "video_token_id": VIDEO_ID}
    decoder: ClassVar[dict[str, Any]] = {}
    tower: ClassVar[dict[str, Any]] = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "patch_size": 2 * PATCH,
    }  # fmt: skip
    pictures: ClassVar[dict[str, Any]] = {**Merged.pictures, "patch_size": 2 * PATCH}
    clips: ClassVar[dict[str, Any]] = {
        **Merged.clips, "patch_size": 2 * PATCH, "merge_size": 2, "use_token_compression": True,
    }  # fmt: skip

    def config_class(self, part: str) -> Any:
        """The decoder is a plain Qwen2."""
        return transformers.Qwen2Config if part == "Text" else super().config_class(part)


class Exaone45(Merged):
    """EXAONE 4.5: a Qwen2.5-VL tower with grouped heads; an EXAONE 4 decoder, three sliding layers and a full one."""

    name = "exaone4_5"
    stem = "Exaone4_5_"
    parts = ("Exaone4_5_Processor", "Qwen2VLImageProcessor", "Qwen2VLVideoProcessor")
    ids: ClassVar[dict[str, Any]] = {"image_token_id": IMAGE_ID, "video_token_id": VIDEO_ID}
    decoder: ClassVar[dict[str, Any]] = {"sliding_window": 512}
    tower: ClassVar[dict[str, Any]] = {**Qwen25VL.tower, "num_key_value_heads": 2}

    def config_class(self, part: str) -> Any:
        """The decoder is a plain EXAONE 4."""
        return transformers.Exaone4Config if part == "Text" else super().config_class(part)


class MiniCPMV(Merged):
    """MiniCPM-V 4.6: a picture above 64 x 64 pixels is shown whole and in slices; Qwen3.5's decoder; pictures only."""

    name = "minicpmv4_6"

    since = "5.19"
    stem = "MiniCPMV4_6"
    video = False
    parts = ("MiniCPMV4_6Processor", "MiniCPMV4_6ImageProcessor", "MiniCPMV4_6VideoProcessor")
    special: ClassVar[dict[str, int]] = {
        "<|image_pad|>": IMAGE_ID, "<|video_pad|>": VIDEO_ID, "<image>": START_ID, "</image>": END_ID,
    }  # fmt: skip
    slices: ClassVar[dict[str, int]] = {"<slice>": 105, "</slice>": 106, "<image_id>": 107, "</image_id>": 108}
    image = "<|image_pad|>"
    ids: ClassVar[dict[str, Any]] = {"image_token_id": IMAGE_ID, "video_token_id": VIDEO_ID, "insert_layer_id": 0}
    decoder: ClassVar[dict[str, Any]] = Qwen35.decoder
    tower: ClassVar[dict[str, Any]] = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 4,
        "image_size": 64,
    }  # fmt: skip
    pictures: ClassVar[dict[str, Any]] = {"patch_size": 4, "scale_resolution": 64, "max_slice_nums": 4}
    clips: ClassVar[dict[str, Any]] = {"patch_size": 4, "scale_resolution": 64}

    def config_class(self, part: str) -> Any:
        """The decoder is Qwen3.5's."""
        return transformers.Qwen3_5TextConfig if part == "Text" else super().config_class(part)

    def tokenizer(self) -> Any:
        """The tags of slices and picture numbers have names of their own."""
        names = ("slice_start_token", "slice_end_token", "image_id_start_token", "image_id_end_token")
        roles = {ROLES[number]: token for token, number in self.special.items()}
        return word_tokenizer(
            {**self.special, **self.slices},
            extra_special_tokens={**roles, **dict(zip(names, self.slices, strict=True))},
        )


class Qwen25OmniThinker(Qwen25VL):
    """Qwen2.5-Omni's thinker, with words and pictures: a Qwen2.5-VL that could also hear and watch."""

    name = "qwen2_5_omni_thinker"
    stem = "Qwen2_5OmniThinker"
    video = False
    handmade = "its processor needs an audio front end; pictures and words are prepared as for Qwen2.5-VL"
    ids: ClassVar[dict[str, Any]] = {
        "image_token_index": IMAGE_ID, "video_token_index": VIDEO_ID, "audio_token_index": 109,
        "vision_start_token_id": START_ID, "vision_end_token_id": END_ID, "audio_start_token_id": 110,
        "audio_end_token_id": 111,
    }  # fmt: skip
    ears: ClassVar[dict[str, Any]] = {
        "num_mel_bins": 8, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16, "d_model": 16,
        "output_dim": 64,
    }  # fmt: skip

    def config(self, **changes: Any) -> Any:
        """Three parts under the thinker's config."""
        text = text_config(**{**self.decoder, **changes})
        return self.config_class("")(
            text_config=text, vision_config=dict(self.tower), audio_config=dict(self.ears), **self.ids
        )

    def inputs(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """The thinker finds the kinds of its tokens by itself."""
        return {key: value for key, value in super().inputs(samples).items() if key != "mm_token_type_ids"}


class Qwen3OmniThinker(Qwen25OmniThinker):
    """Qwen3-Omni's thinker: a mixture of experts with DeepStack."""

    name = "qwen3_omni_moe_thinker"
    stem = "Qwen3OmniMoeThinker"
    handmade = "its processor needs an audio front end; pictures and words are prepared as for Qwen3-VL"
    parts = Qwen3VL.parts
    ids: ClassVar[dict[str, Any]] = {**Qwen25OmniThinker.ids, "image_token_id": IMAGE_ID, "video_token_id": VIDEO_ID}
    decoder: ClassVar[dict[str, Any]] = Qwen3VLMoe.decoder
    tower: ClassVar[dict[str, Any]] = Qwen3VL.tower
    ears: ClassVar[dict[str, Any]] = {**Qwen25OmniThinker.ears, "downsample_hidden_size": 8, "n_window": 4}


SPECIMENS: tuple[Specimen, ...] = (
    Qwen2VL(), Qwen25VL(), Qwen3VL(), Qwen3VLMoe(), Qwen35(), Glm4v(), Glm46V(), Glm4vMoe(), GlmOcr(), PaddleOcrVL(),
    Ernie45VLMoe(), VideoLlama3(), Exaone45(), MiniCPMV(), Qwen25OmniThinker(), Qwen3OmniThinker(),
)  # fmt: skip
