"""Writes the model as an ordinary Hugging Face folder, and finds the one that ships with the package."""

from __future__ import annotations

from pathlib import Path

from transformers import GenerationConfig, LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerBase
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from vlm_attn.scenes.tokenizer import CHAT_TEMPLATE, IMAGE
from vlm_attn.scenes.world import IMAGE_SIZE, PATCH_SIZE

CHECKPOINT = Path(__file__).parent / "checkpoint"
"""Folder of the model that ships with the package."""


def build_processor(tokenizer: PreTrainedTokenizerBase) -> LlavaProcessor:
    """Processor that resizes any picture to 80 x 80, scales it to -1..1 and writes 100 placeholders for it."""
    square = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    images = CLIPImageProcessorPil(
        size=square,
        crop_size=square,
        do_center_crop=False,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE,
        chat_template=CHAT_TEMPLATE,
    )


def write_checkpoint(model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save model, generation settings, tokenizer and processor to a folder.

    Weights are stored in half precision, which halves the files; the config says float32, so they load as that.

    Args:
        model: trained model in float32.
        tokenizer: its tokenizer.
        folder: created if missing; files of the same names are replaced.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
        max_new_tokens=64,
    )
    stored = {name: weight.half() for name, weight in model.state_dict().items() if name != "lm_head.weight"}
    model.save_pretrained(folder, state_dict=stored)
    build_processor(tokenizer).save_pretrained(folder)
