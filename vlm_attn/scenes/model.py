"""Architecture of the `scenes` model: a small but genuine LLaVA (CLIP vision, MLP projector, Llama with GQA)."""

from __future__ import annotations

from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from vlm_attn.scenes.world import IMAGE_SIZE, PATCH_SIZE

VISION_WIDTH = 96
HIDDEN = 128


def vision_config() -> CLIPVisionConfig:
    """Vision tower: 6 layers of width 96, 100 patches and CLS."""
    return CLIPVisionConfig(
        hidden_size=VISION_WIDTH,
        intermediate_size=4 * VISION_WIDTH,
        num_hidden_layers=6,
        num_attention_heads=6,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=VISION_WIDTH,
        hidden_act="gelu",
    )


def text_config(vocabulary: int, pad: int, bos: int, eos: int) -> LlamaConfig:
    """Decoder: 6 layers of width 128, 8 query heads over 4 key-value heads."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=HIDDEN,
        intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=16,
        max_position_embeddings=2048,
        # slow rotations leave most of a 16-wide head free to compare contents over a few hundred positions
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=True,
        pad_token_id=pad,
        bos_token_id=bos,
        eos_token_id=eos,
    )


def build_model(vocabulary: int, *, pad: int, bos: int, eos: int, image: int) -> LlavaForConditionalGeneration:
    """Return the untrained model in float32 for a vocabulary of that size and those special token ids."""
    config = LlavaConfig(
        vision_config=vision_config(),
        text_config=text_config(vocabulary, pad, bos, eos),
        image_token_index=image,
        projector_hidden_act="gelu",
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
        tie_word_embeddings=True,
    )
    config.pad_token_id = pad
    return LlavaForConditionalGeneration(config).float()
