"""What a tiny model of a family is: a real config class with small numbers, random weights, inputs to match.

A specimen is built from configuration alone, so that every family can be executed without a download. Its inputs come
from the family's real processor wherever that can be built offline; a specimen with hand-made inputs says why.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

PAD, BOS, EOS, UNKNOWN, IMAGE_ID = 0, 1, 2, 98, 99
VOCAB = 160
FIRST_WORD, LAST_WORD = 3, 89
# Ids 100..159 are free for the special tokens of a family (video, tile separators, start and end of an image).


@dataclass(frozen=True)
class Sample:
    """One row of a batch: words, pictures (or one video), words. The same sample gives the same tokens and pixels.

    Attributes:
        pictures: original (width, height) of each picture.
        frames: above 0, a video of that many frames of the first picture's size stands in place of the pictures.
        before: words in front of the first picture.
        between: words between two pictures.
        after: words behind the last picture.
        seed: draws the words and the pixels.
    """

    pictures: tuple[tuple[int, int], ...] = ((56, 56),)
    frames: int = 0
    before: int = 3
    between: int = 2
    after: int = 6
    seed: int = 0

    def words(self) -> list[list[int]]:
        """Word ids: before the first picture, between each two, behind the last."""
        draw = np.random.default_rng(self.seed)
        media = 1 if self.frames else len(self.pictures)
        counts = [self.before, *[self.between] * (media - 1), self.after] if media else [self.before + self.after]
        return [draw.integers(FIRST_WORD, LAST_WORD + 1, n).tolist() for n in counts]

    def images(self) -> list[Image.Image]:
        """Noisy RGB pictures, each with a colour of its own."""
        draw = np.random.default_rng(1000 + self.seed)
        return [_noise(draw, size) for size in self.pictures]

    def video(self) -> np.ndarray:
        """uint8 frames ``[frames, height, width, 3]``."""
        draw = np.random.default_rng(2000 + self.seed)
        return np.stack([np.asarray(_noise(draw, self.pictures[0])) for _ in range(self.frames)])


def _noise(draw: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    width, height = size
    tint = draw.integers(0, 160, (1, 1, 3))
    return Image.fromarray((tint + draw.integers(0, 96, (height, width, 3))).astype(np.uint8))


class Specimen(abc.ABC):
    """A tiny random-weight model of one family and its inputs."""

    name: ClassVar[str]
    """transformers' ``model_type``."""

    handmade: ClassVar[str] = ""
    """Why the inputs do not come from the real processor; empty where they do."""

    since: ClassVar[str] = ""
    """Oldest transformers with which this tiny model runs; empty where that is the oldest supported one."""

    video: ClassVar[bool] = False
    """Whether samples with ``frames`` can be built."""

    several: ClassVar[bool] = True
    """Whether a prompt may hold several pictures."""

    @abc.abstractmethod
    def config(self, **changes: Any) -> Any:
        """The family's config; ``changes`` go to the text config (heads, layers ...)."""

    @abc.abstractmethod
    def model_class(self) -> type:
        """The ``...ForConditionalGeneration`` class."""

    @abc.abstractmethod
    def processor(self) -> Any:
        """The family's processor, built offline; None where it cannot be."""

    @abc.abstractmethod
    def prompt(self, sample: Sample) -> str:
        """The sample's text with the family's placeholders, as its processor expects it."""

    def build(
        self, *, backend: str = "sdpa", dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any
    ) -> Any:
        """A fresh model in eval mode; ``backend`` is the attention implementation of the language model."""
        torch.manual_seed(seed)
        model = self.model_class()(self.config(**changes))
        sharpen(model)
        model.get_decoder().set_attn_implementation(backend)
        generation = model.generation_config
        generation.pad_token_id, generation.bos_token_id, generation.eos_token_id = PAD, BOS, None
        return model.to(dtype).eval().requires_grad_(False)

    def inputs(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Keyword arguments of ``model(...)`` and ``model.generate(...)`` for the left-padded batch."""
        processor = self.processor()
        arguments: dict[str, Any] = {"text": [self.prompt(s) for s in samples]}
        if any(s.frames for s in samples):
            arguments["videos"] = [s.video() for s in samples if s.frames]
        if any(s.pictures and not s.frames for s in samples):
            arguments["images"] = self.nest([s.images() for s in samples if not s.frames])
        batch = processor(**arguments, padding=True, return_tensors="pt")
        return {key: value for key, value in batch.items() if isinstance(value, Tensor)}

    def nest(self, images: list[list[Image.Image]]) -> Any:
        """Pictures of all samples as the processor wants them: flat unless a family says otherwise."""
        return [image for row in images for image in row]


def text_config(**changes: Any) -> dict[str, Any]:
    """Numbers that every tiny decoder shares."""
    shared: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 4096,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "initializer_range": 0.2,
    }
    return {**shared, **changes}


@torch.no_grad()
def sharpen(model: Any) -> None:
    """Peaked attention and visible images.

    With the default initialisation every softmax row is nearly uniform and pictures hardly reach the logits: a method
    that does nothing would pass every comparison.
    """
    decoder = model.get_decoder()
    decoder = decoder if hasattr(decoder, "layers") else decoder.get_decoder()
    of_decoder = {id(p) for p in decoder.parameters()}
    for layer in decoder.layers:
        attention = getattr(layer, "self_attn", None)
        for name in ("q_proj", "k_proj"):
            if hasattr(attention, name):
                getattr(attention, name).weight.mul_(1.6)
    head = model.get_output_embeddings()
    for weight in model.parameters():
        if id(weight) not in of_decoder and weight.dim() > 1 and (head is None or weight is not head.weight):
            weight.normal_(0.0, 1.4 / weight[0].numel() ** 0.5)


def word_tokenizer(special: dict[str, int] | None = None, **extra: Any) -> Any:
    """A tokenizer whose word ``w17`` is token 17; ``special`` names further tokens by id."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    named = {"<pad>": PAD, "<s>": BOS, "</s>": EOS, "<unk>": UNKNOWN, **(special or {})}
    words = {f"w{i}": i for i in range(VOCAB) if i not in named.values()} | named
    core = Tokenizer(WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        additional_special_tokens=[name for name in named if name not in ("<pad>", "<s>", "</s>", "<unk>")],
        **extra,
    )


def spoken(words: Sequence[int]) -> str:
    """Words as the tiny tokenizer reads them."""
    return " ".join(f"w{i}" for i in words)


def interleaved(sample: Sample, placeholder: str, video: str = "") -> str:
    """The sample's words with a placeholder at every picture (or at the video)."""
    words = sample.words()
    media = [video] if sample.frames else [placeholder] * len(sample.pictures)
    parts = [spoken(words[0])]
    for token, run in zip(media, words[1:], strict=True):
        parts += [token, spoken(run)]
    return " ".join(part for part in parts if part)


def with_sizes(sample: Sample, *sizes: tuple[int, int]) -> Sample:
    """The sample with other pictures."""
    return dataclasses.replace(sample, pictures=sizes)
