"""What every bench stands on: random-weight models, prompts, and timed passes of the language model."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    DynamicCache,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    __version__,
)

from ..families import resolve

CONTROL_TOLERANCE = 0.05
SINK_SHARE = 0.01  # of the visual tokens: the healthy range of published models ends near 5 %
SINK_DIMS = (5, 11)
IMAGE = 999
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Shape:
    """A language model and a prompt: ``visual`` tokens in ``pictures`` square grids, and ``text`` others."""

    name: str
    layers: int
    heads: int
    kv_heads: int
    visual: int
    text: int
    hidden: int = 1024
    inner: int = 2816
    pictures: int = 1
    words: int = 1000

    @property
    def tokens(self) -> int:
        """Prompt length."""
        return self.visual + self.text


_7B = Shape("7b-640", layers=32, heads=32, kv_heads=32, visual=576, text=64, hidden=4096, inner=11008, words=32064)
GPU_SHAPES = {"7b-640": _7B, "7b-2944": replace(_7B, name="7b-2944", visual=2880, pictures=5)}


@dataclass(frozen=True)
class Machine:
    """What a bench runs on.

    Attributes:
        device, dtype: of the model. threads: of torch on the host, None = as many as it takes.
        queued: the device works behind the host's back. Its clock waits for it, and looking at the clock in the middle
            of a prefill would hold it up: stock prefills are taken around what is timed instead of in turn with it.
    """

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    threads: int | None = 1
    queued: bool = False

    def clock(self, name: str) -> Callable[[], float]:
        """A clock of `CLOCKS` that reads when the device has done its work."""
        if self.device != "cuda":
            return CLOCKS[name]

        def now() -> float:
            torch.cuda.synchronize()
            return CLOCKS[name]()

        return now


CPU = Machine()


def machine(gpu: bool) -> Machine:
    """One thread of the processor in fp32, or the CUDA device in bf16.

    Raises:
        ValueError: no CUDA device.
    """
    if not gpu:
        return CPU
    if not torch.cuda.is_available():
        raise ValueError("no CUDA device here: leave out the GPU option, or run this on a machine with a GPU")
    return Machine("cuda", torch.bfloat16, None, queued=True)


def build(shape: Shape, seed: int = 0, place: Machine = CPU) -> LlavaForConditionalGeneration:
    """Random-weight LLaVA of this shape, sdpa, with a two-layer vision tower that is only there to give features."""
    each = shape.visual // shape.pictures
    side = round(each**0.5)
    if side * side * shape.pictures != shape.visual:
        raise ValueError(f"{shape.name}: {shape.visual} visual tokens are no {shape.pictures} square grids")
    text = LlamaConfig(
        vocab_size=shape.words, hidden_size=shape.hidden, intermediate_size=shape.inner,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        max_position_embeddings=8192, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=14 * side,
        patch_size=14, projection_dim=32,
    )  # fmt: skip
    config = LlavaConfig(
        text_config=text, vision_config=vision, image_token_id=IMAGE, vision_feature_layer=-1, image_seq_length=each,
    )  # fmt: skip
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(place.dtype)
    try:
        with torch.device(place.device):
            model = LlavaForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    model.set_attn_implementation("sdpa")
    # The random answer must not end early.
    model.generation_config.eos_token_id = None
    return model.eval().requires_grad_(False)


@dataclass
class Request:
    """A prompt with its pictures, their features, and the tokens of the decode steps.

    Attributes:
        pixels: None in a prompt without pictures.
        features: None where the model takes pixels only (transformers 5.17): every prefill then encodes them.
    """

    ids: Tensor
    pixels: Tensor | None
    features: Any
    next_ids: list[int] = field(default_factory=lambda: list(range(11, 43)))

    @property
    def text_ids(self) -> Tensor:
        """The prompt without its pictures."""
        return self.ids[self.ids != IMAGE][None]


def request(model: LlavaForConditionalGeneration, shape: Shape) -> Request:
    """BOS, half of the text, the pictures, the other half."""
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(3, 900, (shape.text - 1,), generator=generator)
    half = shape.text // 2
    pictures = torch.full((shape.visual,), IMAGE)
    ids = torch.cat([torch.tensor([1]), words[: half - 1], pictures, words[half - 1 :]])[None].to(model.device)
    size = model.config.vision_config.image_size
    pixels = torch.randn((shape.pictures, 3, size, size), generator=generator).to(model.device, model.dtype)
    features = model.base_model.get_image_features(pixel_values=pixels, return_dict=True)
    # Unit scale, like word embeddings after the first layers of a trained model: the tiny tower gives almost nothing.
    scale = 0.02 / float(torch.cat(list(features.pooler_output)).float().std())
    features.pooler_output = [f * scale for f in features.pooler_output]
    last = model.base_model.multi_modal_projector.linear_2
    last.weight.mul_(scale)
    last.bias.mul_(scale)
    # Asked once: a look at the signature has no place in what is timed.
    return Request(ids, pixels, features if resolve(model).takes_features else None)


def words(model: LlavaForConditionalGeneration, tokens: int) -> Request:
    """A prompt of text alone."""
    ids = torch.randint(3, 900, (1, tokens), generator=torch.Generator().manual_seed(1))
    return Request(ids.to(model.device), None, None)


def prefill(
    model: LlavaForConditionalGeneration,
    job: Request,
    *,
    text_only: bool = False,
    encode: bool = False,
    **extra: Any,
) -> DynamicCache:
    """The prompt through the language model, one logit row asked for.

    Args:
        text_only: without the pictures.
        encode: run the vision tower too, instead of handing over its features (if there are any).
    """
    text_only = text_only or job.pixels is None
    ids = job.text_ids if text_only else job.ids
    if (encode or job.features is None) and not text_only:
        extra["pixel_values"] = job.pixels
    elif not text_only:
        extra["mm_encoder_outputs"] = {"image": job.features}
    cache = DynamicCache(config=model.config.get_text_config())
    position = torch.arange(ids.shape[1], device=ids.device)[None]
    model(input_ids=ids, position_ids=position, past_key_values=cache, use_cache=True, logits_to_keep=1, **extra)
    return cache


def decode(model: LlavaForConditionalGeneration, job: Request, cache: DynamicCache, steps: int, **extra: Any) -> None:
    """``steps`` new tokens behind a filled cache."""
    start = cache.get_seq_length()
    for step in range(steps):
        model(
            input_ids=torch.tensor([[job.next_ids[step % len(job.next_ids)]]], device=job.ids.device),
            position_ids=torch.tensor([[start + step]], device=job.ids.device), past_key_values=cache, use_cache=True,
            logits_to_keep=1, **extra,
        )  # fmt: skip


def sink_threshold(model: LlavaForConditionalGeneration, job: Request) -> float:
    """The `tau` above which at least a `SINK_SHARE` of the visual tokens are sinks, in each of the layers 2 .. L-2."""
    visual = job.ids[0] == IMAGE
    seen: list[Tensor] = []

    def look(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0][0, visual].float()
        seen.append(x[:, list(SINK_DIMS)].abs().amax(-1) / (x.pow(2).mean(-1) + 1e-6).sqrt())

    hooks = [layer.register_forward_pre_hook(look) for layer in model.get_decoder().layers[2:-1]]
    try:
        prefill(model, job)
    finally:
        for hook in hooks:
            hook.remove()
    return min(float(phi.quantile(1 - SINK_SHARE)) for phi in seen)


@contextmanager
def quiet(threads: int | None) -> Iterator[None]:
    """No gradients, and this many torch threads (None = as it is)."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        with torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        torch.set_num_threads(before)


def check(shapes: Sequence[str], known: Sequence[str], clock: str, **counts: int) -> None:
    """Refuses a protocol that cannot be run.

    Args:
        counts: numbers that must be at least 1, by name.

    Raises:
        ValueError: unknown shape or clock, or a number below 1.
    """
    for name in shapes:
        if name not in known:
            raise ValueError(f"unknown bench shape {name!r}: choose from {', '.join(known)}")
    if clock not in CLOCKS:
        raise ValueError(f"unknown clock {clock!r}: choose from {', '.join(CLOCKS)}")
    if min(counts.values()) < 1:
        *most, last = (f"{name}={value}" for name, value in counts.items())
        raise ValueError(f"{', '.join(most)} and {last} must {'all' if most[1:] else 'both'} be at least 1")


def spread(values: Sequence[float], stock: Sequence[float]) -> dict[str, float]:
    """Median, minimum and ratios to stock's times of the same rounds."""
    return {
        "median_s": statistics.median(values),
        "min_s": min(values),
        "ratio": statistics.median(v / s for v, s in zip(values, stock, strict=True)),
        "ratio_of_min": min(values) / min(stock),
    }


def environment(place: Machine = CPU) -> dict[str, Any]:
    """What ran where."""
    return {
        "torch": torch.__version__,
        "transformers": __version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if place.device == "cuda" else None,
        "load_before_1min": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "dtype": str(place.dtype).removeprefix("torch."),
        "attention": "sdpa",
    }
