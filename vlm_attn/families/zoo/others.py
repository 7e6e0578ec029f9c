"""Specimens of the families that share neither tiles nor three-axis positions: prefixes, blocks, separators."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import SiglipVisionConfig

from .base import IMAGE_ID, VOCAB, Sample, Specimen, interleaved, spoken, text_config, word_tokenizer

START, END, BREAK = 100, 101, 102


def siglip(**changes: Any) -> SiglipVisionConfig:
    """A tower of 4 x 4 patches on 56 pixels."""
    numbers = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 56,
        "patch_size": 14, "vision_use_head": False,
    }  # fmt: skip
    return SiglipVisionConfig(**{**numbers, **changes})


def named_tokenizer() -> Any:
    """The word tokenizer with named image tokens."""
    return word_tokenizer(
        {"<image>": IMAGE_ID, "<start>": START, "<end>": END},
        extra_special_tokens={"image_token": "<image>", "boi_token": "<start>", "eoi_token": "<end>"},
    )


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
        with warnings.catch_warnings():
            # The processor makes its labels from tensors in a way that NumPy 2 announces as deprecated.
            warnings.simplefilter("ignore", DeprecationWarning)
            batch = super().inputs(samples)
        batch.pop("labels")
        return batch


class Gemma3(Specimen):
    """Gemma 3: picture blocks attended in both directions, sliding and full layers in turn."""

    name = "gemma3"

    def config(self, **changes: Any) -> Any:
        """SigLIP tower of 8 x 8 patches, pooled to 4 x 4."""
        from transformers import Gemma3Config, Gemma3TextConfig

        layers = ["sliding_attention", "full_attention"] * 2
        text = text_config(**{"layer_types": layers, "sliding_window": 512, "query_pre_attn_scalar": 8, **changes})
        return Gemma3Config(
            text_config=Gemma3TextConfig(**text), vision_config=siglip(patch_size=7), image_token_id=IMAGE_ID,
            boi_token_index=START, eoi_token_index=END, mm_tokens_per_image=16,
        )  # fmt: skip

    def model_class(self) -> type:
        """The model class."""
        from transformers import Gemma3ForConditionalGeneration

        return Gemma3ForConditionalGeneration

    def processor(self) -> Any:
        """Stretches every picture to 56 x 56."""
        from transformers import Gemma3ImageProcessorPil, Gemma3Processor

        images = Gemma3ImageProcessorPil(size={"height": 56, "width": 56})
        return Gemma3Processor(image_processor=images, tokenizer=named_tokenizer(), image_seq_length=16)

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


class Ovis2(Specimen):
    """Ovis2: an overview, then the tiles, each a run of "visual words", with indicator tokens between them."""

    name = "ovis2"

    def config(self, **changes: Any) -> Any:
        """Tiles of 4 x 4 patches merged 2 x 2, Qwen2 decoder."""
        from transformers import Ovis2Config, Ovis2VisionConfig, Qwen2Config

        vision = Ovis2VisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=56,
            patch_size=14, vocab_size=64, hidden_stride=2,
        )  # fmt: skip
        return Ovis2Config(
            text_config=Qwen2Config(**text_config(**changes)), vision_config=vision, image_token_id=IMAGE_ID,
            visual_indicator_token_ids=[START, 103, 104, 105, END], vocab_size=VOCAB, hidden_size=64,
        )  # fmt: skip

    def model_class(self) -> type:
        """The model class."""
        from transformers import Ovis2ForConditionalGeneration

        return Ovis2ForConditionalGeneration

    def processor(self) -> Any:
        """Cuts a picture into up to four tiles of 56 x 56."""
        from transformers import Ovis2ImageProcessorPil, Ovis2Processor

        names = ("<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>")
        special = {"<IMG_ATOM>": IMAGE_ID, "<image>": BREAK, **dict(zip(names, [START, 103, 104, 105, END]))}
        images = Ovis2ImageProcessorPil(size={"height": 56, "width": 56}, crop_to_patches=True, max_patches=4)
        return Ovis2Processor(image_processor=images, tokenizer=word_tokenizer(special), image_seq_length=4)

    def prompt(self, sample: Sample) -> str:
        """``<image>`` at every picture."""
        return interleaved(sample, "<image>")


class DeepseekVL(Specimen):
    """DeepSeek-VL: one square grid per picture, padded to a square."""

    name = "deepseek_vl"

    def config(self, **changes: Any) -> Any:
        """SigLIP tower of 4 x 4 patches, Llama decoder."""
        from transformers import DeepseekVLConfig, LlamaConfig

        return DeepseekVLConfig(
            text_config=LlamaConfig(**text_config(**changes)), vision_config=siglip(), image_token_id=IMAGE_ID
        )

    def model_class(self) -> type:
        """The model class."""
        from transformers import DeepseekVLForConditionalGeneration

        return DeepseekVLForConditionalGeneration

    def processor(self) -> Any:
        """Longest edge to 56 pixels, padded to a square."""
        from transformers import DeepseekVLImageProcessorPil, DeepseekVLProcessor

        images = DeepseekVLImageProcessorPil(size={"height": 56, "width": 56})
        return DeepseekVLProcessor(images, named_tokenizer(), num_image_tokens=16)

    def prompt(self, sample: Sample) -> str:
        """``<image>`` at every picture."""
        return interleaved(sample, "<image>")


class DeepseekVLHybrid(DeepseekVL):
    """DeepSeek-VL 7B: a second, high-resolution tower adds its features to the same grid."""

    name = "deepseek_vl_hybrid"

    def config(self, **changes: Any) -> Any:
        """SigLIP and SAM towers, Llama decoder."""
        from transformers import DeepseekVLHybridConfig, LlamaConfig, SamVisionConfig

        sam = SamVisionConfig(
            hidden_size=32, output_channels=32, num_hidden_layers=2, num_attention_heads=4, mlp_dim=64, image_size=64,
            patch_size=16, window_size=2, global_attn_indexes=[1], num_pos_feats=16,
        )  # fmt: skip
        return DeepseekVLHybridConfig(
            text_config=LlamaConfig(**text_config(**changes)), vision_config=siglip(), high_res_vision_config=sam,
            image_token_id=IMAGE_ID,
        )  # fmt: skip

    def model_class(self) -> type:
        """The model class."""
        from transformers import DeepseekVLHybridForConditionalGeneration

        return DeepseekVLHybridForConditionalGeneration

    def processor(self) -> Any:
        """Longest edge to 56 and to 64 pixels, padded to squares."""
        from transformers import DeepseekVLHybridImageProcessorPil, DeepseekVLHybridProcessor

        low, high = {"height": 56, "width": 56}, {"height": 64, "width": 64}
        images = DeepseekVLHybridImageProcessorPil(size=low, high_res_size=high)
        return DeepseekVLHybridProcessor(images, named_tokenizer(), num_image_tokens=16)


class Janus(Specimen):
    """Janus: DeepSeek's grid between start and end tokens; the picture generator beside it is not used."""

    name = "janus"

    def config(self, **changes: Any) -> Any:
        """4 x 4 patches, Llama decoder, the smallest picture generator."""
        from transformers import JanusConfig, JanusVisionConfig, JanusVQVAEConfig, LlamaConfig

        vision = JanusVisionConfig(
            hidden_size=32, mlp_ratio=2, num_hidden_layers=2, num_attention_heads=4, image_size=56, patch_size=14,
            projection_dim=64, num_image_tokens=16,
        )  # fmt: skip
        generator = JanusVQVAEConfig(
            base_channels=32, latent_channels=32, channel_multiplier=[1], num_res_blocks=1, num_embeddings=16,
            projection_dim=64, image_token_embed_dim=64,
        )  # fmt: skip
        return JanusConfig(
            text_config=LlamaConfig(**text_config(**changes)), vision_config=vision, vq_config=generator,
            image_token_id=IMAGE_ID,
        )  # fmt: skip

    def model_class(self) -> type:
        """The model class."""
        from transformers import JanusForConditionalGeneration

        return JanusForConditionalGeneration

    def processor(self) -> Any:
        """Longest edge to 56 pixels, padded to a square."""
        from transformers import JanusImageProcessorPil, JanusProcessor

        images = JanusImageProcessorPil(size={"height": 56, "width": 56})
        return JanusProcessor(images, named_tokenizer(), num_image_tokens=16)

    def prompt(self, sample: Sample) -> str:
        """``<image>`` at every picture."""
        return interleaved(sample, "<image>")


class Lfm2VL(Specimen):
    """LFM2-VL: tiles or the picture's own shape, short convolutions around attention layers."""

    name = "lfm2_vl"

    def config(self, **changes: Any) -> Any:
        """SigLIP 2 tower, patches of 14 pixels merged 2 x 2, LFM2 decoder."""
        from transformers import Lfm2Config, Lfm2VlConfig, Siglip2VisionConfig

        vision = Siglip2VisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, patch_size=14,
            num_patches=16, vision_use_head=False,
        )  # fmt: skip
        layers = ["conv", "full_attention", "full_attention", "conv"]
        text = text_config(**{"layer_types": layers, **changes})
        return Lfm2VlConfig(
            text_config=Lfm2Config(**text), vision_config=vision, image_token_id=IMAGE_ID, projector_hidden_size=64,
        )  # fmt: skip

    def model_class(self) -> type:
        """The model class."""
        from transformers import Lfm2VlForConditionalGeneration

        return Lfm2VlForConditionalGeneration

    def processor(self) -> Any:
        """A picture of up to 56 x 56 as it is, a larger one as tiles and an overview."""
        from transformers import Lfm2VlImageProcessor, Lfm2VlProcessor

        tiles = {f"<|img_row_{r}_col_{c}|>": 110 + 4 * r + c for r in range(1, 5) for c in range(1, 5)}
        special = {"<image>": IMAGE_ID, "<|image_start|>": START, "<|image_end|>": END, "<|img_thumbnail|>": BREAK}
        images = Lfm2VlImageProcessor(
            encoder_patch_size=14, tile_size=56, min_image_tokens=1, max_image_tokens=4, max_tiles=4,
            max_pixels_tolerance=1.0,
        )  # fmt: skip
        return Lfm2VlProcessor(images, word_tokenizer({**special, **tiles}))

    def prompt(self, sample: Sample) -> str:
        """``<image>`` at every picture."""
        return interleaved(sample, "<image>")

    def nest(self, images: list[list[Any]]) -> Any:
        """One list per sample."""
        return images


class Molmo2(Specimen):
    """Molmo2: a small view and a canvas of overlapping crops, all pictures of a prompt attending to each other."""

    name = "molmo2"

    since = "5.21"

    def config(self, **changes: Any) -> Any:
        """Crops of 4 x 4 patches pooled 2 x 2."""
        from transformers import Molmo2AdapterConfig, Molmo2Config, Molmo2TextConfig, Molmo2VisionConfig

        tower = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4}
        vision = Molmo2VisionConfig(**tower, head_dim=8, num_hidden_layers=2, image_size=[56, 56], patch_size=14)
        adapter = Molmo2AdapterConfig(**tower, head_dim=8, vision_feature_layer=[1, 0], text_hidden_size=64)
        return Molmo2Config(
            text_config=Molmo2TextConfig(**text_config(**changes)), vision_config=vision, adapter_config=adapter,
            image_patch_id=IMAGE_ID, image_start_token_id=START, image_end_token_id=END,
            low_res_image_start_token_id=103, frame_start_token_id=104, frame_end_token_id=105,
        )  # fmt: skip

    def model_class(self) -> type:
        """The model class."""
        from transformers import Molmo2ForConditionalGeneration

        return Molmo2ForConditionalGeneration

    def processor(self) -> Any:
        """The picture stretched to one crop, and to a canvas of up to four crops that overlap by half."""
        from transformers import Molmo2ImageProcessor, Molmo2Processor, Molmo2VideoProcessor

        special = {
            "<im_patch>": IMAGE_ID, "<im_start>": START, "<im_end>": END, "<im_col>": BREAK, "<low_res_im_start>": 103,
            "<frame_start>": 104, "<frame_end>": 105, "<im_low>": 106, "<|image|>": 107, "<|video|>": 108,
        }  # fmt: skip
        images = Molmo2ImageProcessor(
            size={"height": 56, "width": 56}, max_crops=4, overlap_margins=[1, 1], pooling_size=[2, 2]
        )
        return Molmo2Processor(images, Molmo2VideoProcessor(), word_tokenizer(special))

    def prompt(self, sample: Sample) -> str:
        """``<|image|>`` at every picture."""
        return interleaved(sample, "<|image|>")


class Mllama(Specimen):
    """Llama 3.2 Vision: pictures enter through two cross-attention layers."""

    name = "mllama"

    def config(self, **changes: Any) -> Any:
        """Tiles of 4 x 4 patches, cross-attention in the layers 1 and 3."""
        from transformers import MllamaConfig, MllamaTextConfig, MllamaVisionConfig

        vision = MllamaVisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_global_layers=1, attention_heads=4,
            image_size=56, patch_size=14, vision_output_dim=64, intermediate_layers_indices=[0],
        )  # fmt: skip
        text = MllamaTextConfig(**text_config(**{"cross_attention_layers": [1, 3], **changes}))
        return MllamaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE_ID)

    def model_class(self) -> type:
        """The model class."""
        from transformers import MllamaForConditionalGeneration

        return MllamaForConditionalGeneration

    def build(self, **arguments: Any) -> Any:
        """With open gates: fresh ones are closed, and the model blind."""
        model = super().build(**arguments)
        for name, gate in model.named_parameters():
            if name.endswith(("attn_gate", "mlp_gate")):
                gate.fill_(0.5)
        return model

    def processor(self) -> Any:
        """Up to four tiles of 56 x 56, padded."""
        from transformers import MllamaImageProcessorPil, MllamaProcessor

        images = MllamaImageProcessorPil(size={"height": 56, "width": 56}, max_image_tiles=4)
        return MllamaProcessor(images, word_tokenizer({"<|image|>": IMAGE_ID, "<|python_tag|>": BREAK}))

    def prompt(self, sample: Sample) -> str:
        """Pictures first: a word in front of them attends to every slot of the batch, padding pictures too."""
        return "<|image|>" * len(sample.pictures) + " ".join(spoken(run) for run in sample.words())

    def nest(self, images: list[list[Any]]) -> Any:
        """One list per sample."""
        return images


SPECIMENS: tuple[Specimen, ...] = (
    PaliGemma(),
    Gemma3(),
    Mistral3(),
    Ovis2(),
    DeepseekVL(),
    DeepseekVLHybrid(),
    Janus(),
    Lfm2VL(),
    Molmo2(),
    Mllama(),
)
