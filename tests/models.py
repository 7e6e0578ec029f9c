"""Tiny random LLaVA models, a matching processor and ready-made inputs, built from configuration alone.

Weights are drawn wide enough for attention to be peaked: with the default initialisation every softmax row is almost
uniform, and a method that does nothing passes every comparison.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers import LlavaImageProcessorPil as LlavaImageProcessor

PAD, BOS, EOS = 0, 1, 2
IMAGE_ID = 99
VOCAB = 128
IMAGE_SIZE, PATCH = 56, 14
GRID = IMAGE_SIZE // PATCH
N_VISUAL = GRID * GRID
HEADS = {1: (4, 4), 4: (8, 2), 7: (7, 1)}  # GQA ratio -> (query heads, key/value heads)
HEAD_DIM = 8


def build_llava(
    ratio: int = 4,
    *,
    layers: int = 4,
    backend: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    head_dim: int = HEAD_DIM,
) -> LlavaForConditionalGeneration:
    """A fresh random LLaVA: `ratio` query heads per key/value head, `backend` for the language model."""
    heads, kv_heads = HEADS[ratio]
    text = LlamaConfig(
        vocab_size=VOCAB, hidden_size=heads * head_dim, intermediate_size=96, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim, max_position_embeddings=1024,
        pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS, initializer_range=0.2,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=IMAGE_SIZE,
        patch_size=PATCH, projection_dim=32,
    )  # fmt: skip
    config = LlavaConfig(
        text_config=text, vision_config=vision, image_token_id=IMAGE_ID, vision_feature_layer=-2,
        vision_feature_select_strategy="default", image_seq_length=N_VISUAL,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    _sharpen(model)
    model.set_attn_implementation({"text_config": backend})
    model.generation_config.pad_token_id = PAD
    model.generation_config.bos_token_id = BOS
    model.generation_config.eos_token_id = None  # runs have a fixed length unless a test says otherwise
    return model.to(dtype).eval().requires_grad_(False)


@torch.no_grad()
def _sharpen(model: LlavaForConditionalGeneration) -> None:
    """Peaked attention, visible images: queries and keys x1.6, patch embedding and projector of unit scale."""
    for layer in model.get_decoder().layers:
        layer.self_attn.q_proj.weight.mul_(1.6)
        layer.self_attn.k_proj.weight.mul_(1.6)
    for name, weight in model.named_parameters():
        if ("vision_tower" in name or "multi_modal_projector" in name) and weight.dim() > 1:
            fan_in = weight[0].numel()
            weight.normal_(0.0, 1.4 / fan_in**0.5)


@functools.cache
def llava(ratio: int = 4, backend: str = "sdpa", layers: int = 4) -> LlavaForConditionalGeneration:
    """Shared instance; tests that leave a mark on a model must build their own."""
    return build_llava(ratio, backend=backend, layers=layers)


@dataclass
class Sample:
    """One unpadded prompt: token ids `[n]` and pixels `[images, 3, S, S]`."""

    ids: torch.Tensor
    pixels: torch.Tensor

    @property
    def visual(self) -> torch.Tensor:
        """Bool `[n]`: image placeholders."""
        return self.ids == IMAGE_ID

    def inputs(self, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
        """Keyword arguments of `model(...)` and `model.generate(...)` for this prompt alone."""
        ids = self.ids[None]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": self.pixels.to(dtype)}


@dataclass
class Batch:
    """Left-padded samples."""

    samples: list[Sample] = field(default_factory=list)

    def inputs(self, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
        """Keyword arguments of `model(...)` and `model.generate(...)` for the padded batch."""
        width = max(len(s.ids) for s in self.samples)
        ids = torch.full((len(self.samples), width), PAD)
        mask = torch.zeros_like(ids)
        for row, sample in enumerate(self.samples):
            ids[row, width - len(sample.ids) :] = sample.ids
            mask[row, width - len(sample.ids) :] = 1
        pixels = torch.cat([s.pixels for s in self.samples])
        return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels.to(dtype)}


def _words(generator: torch.Generator, count: int) -> torch.Tensor:
    return torch.randint(3, 90, (count,), generator=generator)


def sample(before: int = 3, after: int = 6, *, images: int = 1, between: int = 2, seed: int = 0) -> Sample:
    """BOS, `before` words, then `images` runs of placeholders with `between` words in between, then `after` words."""
    generator = torch.Generator().manual_seed(1000 + seed)
    parts = [torch.tensor([BOS]), _words(generator, before)]
    for image in range(images):
        if image:
            parts.append(_words(generator, between))
        parts.append(torch.full((N_VISUAL,), IMAGE_ID))
    parts.append(_words(generator, after))
    pixels = torch.randn((images, 3, IMAGE_SIZE, IMAGE_SIZE), generator=generator)
    return Sample(torch.cat(parts), pixels)


def single() -> Batch:
    """One prompt with one image."""
    return Batch([sample(seed=1)])


def padded() -> Batch:
    """Two prompts of unequal length, so that the second row starts with padding."""
    return Batch([sample(4, 9, seed=2), sample(2, 5, seed=3)])


def two_images() -> Batch:
    """One prompt with two images and words between them."""
    return Batch([sample(3, 6, images=2, seed=8)])


def mixed() -> Batch:
    """Two images in one row, one image and padding in the other."""
    return Batch([sample(3, 6, images=2, seed=5), sample(3, 7, seed=6)])


def pairs() -> Batch:
    """Two prompts of unequal length, two images each."""
    return Batch([sample(4, 7, images=2, seed=13), sample(2, 5, images=2, seed=14)])


BATCHES = {"single": single, "padded": padded, "two_images": two_images}


def tiny_processor() -> LlavaProcessor:
    """Word-level processor for the tiny models: every token id is the word `w<id>`."""
    words = {f"w{i}": i for i in range(VOCAB)}
    for word, index in (("<pad>", PAD), ("<s>", BOS), ("</s>", EOS), ("<image>", IMAGE_ID), ("<unk>", 98)):
        words = {w: i for w, i in words.items() if i != index} | {word: index}
    core = Tokenizer(WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        padding_side="left", extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip
    image_processor = LlavaImageProcessor(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    )
    template = (
        "{% for m in messages %}{% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }} {% endif %}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}w7{% endif %}"
    )
    return LlavaProcessor(
        image_processor=image_processor, tokenizer=tokenizer, patch_size=PATCH,
        vision_feature_select_strategy="default", image_token="<image>", num_additional_image_tokens=1,
        chat_template=template,
    )  # fmt: skip


def picture(width: int = 80, height: int = 56, seed: int = 0) -> Image.Image:
    """A noisy RGB picture."""
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels, "RGB")
