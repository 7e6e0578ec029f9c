"""Specimens whose pictures reach the decoder through a fixed number of query tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import BlipImageProcessorPil

from .base import IMAGE_ID, PAD, VOCAB, Sample, Specimen, interleaved, spoken, text_config, word_tokenizer

QUERIES = 8


class QFormer(Specimen):
    """One picture per prompt, its queries in front of the words."""

    several = False

    def build(self, **arguments: Any) -> Any:
        """The inner language model generates, by a generation config of its own."""
        model = super().build(**arguments)
        model.language_model.generation_config = model.generation_config
        return model

    def prompt(self, sample: Sample) -> str:
        """The words alone: the processor puts the queries in front."""
        return " ".join(spoken(run) for run in sample.words())

    def inputs(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Rows of the real processor, padded in front of the queries and behind the Q-Former's question.

        The processor itself pads a batch between queries and words (and the question in front, although its positions
        are absolute); the model then gives a row other logits than the sample alone.
        """
        rows = [super(QFormer, self).inputs([sample]) for sample in samples]
        return {key: _stack([row[key] for row in rows], left="qformer" not in key) for key in rows[0]}


def _stack(rows: list[Tensor], left: bool) -> Tensor:
    width = max(row.shape[1] for row in rows)
    if rows[0].dim() != 2:
        return torch.cat(rows)
    gaps = [(width - row.shape[1], 0) if left else (0, width - row.shape[1]) for row in rows]
    return torch.cat([torch.nn.functional.pad(row, gap, value=PAD) for row, gap in zip(rows, gaps, strict=True)])


class InstructBlip(QFormer):
    """InstructBLIP: the Q-Former reads the picture and the question."""

    name = "instructblip"

    def config(self, **changes: Any) -> Any:
        """4 x 4 patches read by 8 queries, Llama decoder."""
        from transformers import InstructBlipConfig, InstructBlipQFormerConfig, InstructBlipVisionConfig, LlamaConfig

        tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        return InstructBlipConfig(
            text_config=LlamaConfig(**text_config(**changes)),
            vision_config=InstructBlipVisionConfig(**tower, image_size=56, patch_size=14),
            qformer_config=InstructBlipQFormerConfig(**tower, vocab_size=VOCAB), num_query_tokens=QUERIES,
            image_token_id=IMAGE_ID,
        )  # fmt: skip

    def model_class(self) -> type:
        """The model class."""
        from transformers import InstructBlipForConditionalGeneration

        return InstructBlipForConditionalGeneration

    def processor(self) -> Any:
        """Stretches every picture to 56 x 56."""
        from transformers import InstructBlipProcessor

        return InstructBlipProcessor(
            image_processor=BlipImageProcessorPil(size={"height": 56, "width": 56}),
            tokenizer=word_tokenizer({"<image>": IMAGE_ID}),
            qformer_tokenizer=word_tokenizer(),
            num_query_tokens=QUERIES,
        )


class Blip2(QFormer):
    """BLIP-2: the Q-Former reads the picture alone; an OPT decoder, whose positions are learned."""

    name = "blip-2"

    def config(self, **changes: Any) -> Any:
        """4 x 4 patches read by 8 queries, OPT decoder (which has no grouped key heads)."""
        from transformers import Blip2Config, Blip2QFormerConfig, Blip2VisionConfig, OPTConfig

        tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        text = {"ffn_dim": 96, "word_embed_proj_dim": 64, "init_std": 0.2, "dropout": 0.0}
        return Blip2Config(
            text_config=OPTConfig(**text_config(**{**text, "max_position_embeddings": 512, **changes})),
            vision_config=Blip2VisionConfig(**tower, image_size=56, patch_size=14),
            qformer_config=Blip2QFormerConfig(**tower, vocab_size=VOCAB), num_query_tokens=QUERIES,
            image_token_id=IMAGE_ID,
        )  # fmt: skip

    def model_class(self) -> type:
        """The model class."""
        from transformers import Blip2ForConditionalGeneration

        return Blip2ForConditionalGeneration

    def processor(self) -> Any:
        """Stretches every picture to 56 x 56."""
        from transformers import Blip2Processor

        images = BlipImageProcessorPil(size={"height": 56, "width": 56})
        return Blip2Processor(images, word_tokenizer({"<image>": IMAGE_ID}), num_query_tokens=QUERIES)


class Aria(Specimen):
    """Aria: queries read the patches of a picture; a decoder with mixed experts."""

    name = "aria"

    since = "5.22"

    def config(self, **changes: Any) -> Any:
        """7 x 7 patches (the processor knows no smaller picture than 490 pixels) read by 8 queries."""
        from transformers import AriaConfig, AriaTextConfig, Idefics3VisionConfig

        vision = Idefics3VisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=490,
            patch_size=70,
        )  # fmt: skip
        text = text_config(**{"moe_num_experts": 4, "moe_num_shared_experts": 1, **changes})
        return AriaConfig(
            text_config=AriaTextConfig(**text), vision_config=vision, image_token_id=IMAGE_ID,
            projector_patch_to_query_dict={49: QUERIES},
        )  # fmt: skip

    def model_class(self) -> type:
        """The model class."""
        from transformers import AriaForConditionalGeneration

        return AriaForConditionalGeneration

    def processor(self) -> Any:
        """Longest edge to 490 pixels, padded on the right and below."""
        from transformers import AriaImageProcessorPil, AriaProcessor

        named = word_tokenizer({"<image>": IMAGE_ID}, extra_special_tokens={"image_token": "<image>"})
        images = AriaImageProcessorPil(max_image_size=490, min_image_size=70)
        processor = AriaProcessor(images, named, size_conversion={490: QUERIES})
        processor.images_kwargs = {"max_image_size": 490}
        return processor

    def prompt(self, sample: Sample) -> str:
        """``<image>`` at every picture."""
        return interleaved(sample, "<image>")


SPECIMENS: tuple[Specimen, ...] = (InstructBlip(), Blip2(), Aria())
