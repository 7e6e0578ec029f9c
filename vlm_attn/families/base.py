"""The adapter contract: what the core asks of a model family, answered by asking the model itself.

``Family`` serves every family whose parts can be found through transformers' own accessors (decoder, decoder layers,
image features, placeholder ids). A family file overrides only what truly differs.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import AttachError
from ..geometry import ImageGeometry, fixed_canvas
from ..stages import ModelInfo
from ..tokens import Grid, Layout, TokenMap, build_token_map

if TYPE_CHECKING:
    from ..request import PruneStage, Request

KINDS = ("image", "video")
Shadow = tuple[Any, str, Callable[..., Any]]


@dataclass(frozen=True, eq=False)
class Media:
    """One call of the model's feature function.

    Attributes:
        kind: ``"image"`` or ``"video"``.
        arguments: what went in, by name; empty where the caller brought finished features.
        output: what came out (``pooler_output`` holds the features).
        seconds: how long it took.
        prompt: int64 ``[B, N]``, the tokens that the features belong to (every prompt once, padding -1); for families
            that tell only in words which tiles make up a picture. Filled in when the roles of the tokens are asked.
        lengths: visual tokens of each entry of the features; read at once, since ``generate`` repeats the features of
            beams inside ``output``.
    """

    kind: str
    arguments: Mapping[str, Any]
    output: Any
    seconds: float = 0.0
    prompt: Tensor | None = None
    lengths: Sequence[int] = ()

    def __post_init__(self) -> None:
        if not self.lengths:
            lengths = tuple(math.prod(f.shape[:-1]) for f in self.output.pooler_output)
            object.__setattr__(self, "lengths", lengths)


class Family:
    """Adapter of one model object; built (and validated) at attach time.

    Class attributes:
        attention_names, output_names: names under which a decoder layer may hold its attention, and that its output
            projection; the first one found counts.
        sequence_arguments: arguments of a decoder layer that run along the sequence and shrink with it.
        refused: stage -> why this family cannot have it.
        structure: names of config entries with ids of tokens that frame a picture (start, end, separators); they
            leave with the picture in the text-only stream.
    """

    attention_names: ClassVar[tuple[str, ...]] = ("self_attn",)
    output_names: ClassVar[tuple[str, ...]] = ("o_proj",)
    sequence_arguments: ClassVar[tuple[str, ...]] = ("position_embeddings", "position_ids")
    refused: ClassVar[Mapping[str, str]] = {}
    structure: ClassVar[tuple[str, ...]] = ()

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.name = str(model.config.model_type)
        self.base: nn.Module = model.base_model
        self.lm: Any = self._need(self._decoder(), "a decoder (get_decoder())")
        self.layers: nn.ModuleList = self._need(getattr(self.lm, "layers", None), "decoder layers (decoder.layers)")
        self.head: Any = self._need(model.get_output_embeddings(), "an output head (get_output_embeddings())")
        self.text_config: Any = model.config.get_text_config()
        self.placeholders: dict[str, int] = self._placeholders()
        self._check_features()
        self._attentions = [self._attention(number, layer) for number, layer in enumerate(self.layers)]
        self._need(next(iter(self.attentions()), None), "a decoder layer with attention")

    def _decoder(self) -> Any:
        """The stack of decoder layers; some models answer with a language model that wraps it."""
        decoder: Any = self.model.get_decoder()
        return decoder if decoder is None or hasattr(decoder, "layers") else decoder.get_decoder()

    def _check_features(self) -> None:
        self._need(self.features("image"), "get_image_features() on its base model")

    def _who(self) -> str:
        return f"{type(self.model).__name__} (family {self.name})"

    def _need(self, part: Any, what: str) -> Any:
        if part is None:
            raise AttachError(f"{self._who()} lacks {what}: vlm_attn needs an unmodified transformers model")
        return part

    def _placeholders(self) -> dict[str, int]:
        found = {}
        for kind in KINDS:
            for key in (f"{kind}_token_id", f"{kind}_token_index"):
                value = getattr(self.model.config, key, None)
                if isinstance(value, int):
                    found[kind] = value
                    break
        self._need(found.get("image"), "config.image_token_id (the image placeholder)")
        return found

    def _attention(self, number: int, layer: nn.Module) -> Any:
        """The self-attention of a layer; None in layers that mix tokens otherwise (convolution, recurrence)."""
        attention = _first(layer, self.attention_names)
        if attention is None:
            if not self.hybrid:
                self._need(None, f"{' or '.join(self.attention_names)} in decoder layer {number}")
            return None
        self._need(
            _first(attention, self.output_names),
            f"{self.attention_names[0]}.{self.output_names[0]} in decoder layer {number}",
        )
        if getattr(attention, "layer_idx", None) != number:
            raise AttachError(f"{self._who()}: decoder layer {number} does not know its index (layer_idx)")
        return attention

    # ------------------------------------------------------------------------------------------------- structure

    joined: ClassVar[str] = ""
    """Why there is nothing between the pictures of a prompt to open; empty where a picture cannot see later ones."""

    hybrid: ClassVar[bool] = False
    """Whether some decoder layers have no attention."""

    def attention(self, layer: int) -> Any:
        """Self-attention module of a decoder layer (None in a layer without attention)."""
        return self._attentions[layer]

    def attentions(self) -> Iterator[tuple[int, Any]]:
        """(layer, attention module) of every layer that has one."""
        return ((n, a) for n, a in enumerate(self._attentions) if a is not None)

    def output_projection(self, attention: nn.Module) -> Any:
        """The module that receives the head outputs ``[B, Q, H * d]``."""
        return _first(attention, self.output_names)

    def features(self, kind: str) -> Any:
        """The bound feature function of images or videos, or None."""
        return getattr(self.base, f"get_{kind}_features", None)

    def info(self) -> ModelInfo:
        """Shape of the language model."""
        config = self.text_config
        heads = int(config.num_attention_heads)
        _, attention = next(self.attentions())
        head_dim = getattr(attention, "head_dim", None) or getattr(config, "head_dim", None)
        return ModelInfo(
            checkpoint=str(getattr(self.model.config, "_name_or_path", "") or ""),
            family=self.name,
            layers=len(self.layers),
            heads=heads,
            kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
            head_dim=int(head_dim or config.hidden_size // heads),
            hidden=int(config.hidden_size),
            joined=self.joined,
        )

    def window(self, layer: int) -> int | None:
        """Sliding window of a layer's attention in tokens, or None."""
        kinds = getattr(self.text_config, "layer_types", None)
        if kinds is not None:
            sliding = "sliding" in kinds[layer]
        else:
            sliding = bool(getattr(self.text_config, "use_sliding_window", True))
        size = getattr(self.text_config, "sliding_window", None)
        return int(size) if sliding and size else None

    # ---------------------------------------------------------------------------------------------- token roles

    def layout(self, length: int) -> Layout:
        """How ``length`` visual tokens of one picture lie; by default nothing is claimed about their places."""
        return Layout.without_grid(length)

    def layouts(self, media: Media) -> list[Layout]:
        """The layout of every picture (or video) of the batch, in placeholder order."""
        return [self.layout(length) for length in media.lengths]

    def placed(self, media: Media, input_ids: Tensor, attention_mask: Tensor | None) -> Media:
        """The media with the prompts ``[B, N]`` that they belong to (beams repeat prompts: each is kept once)."""
        if attention_mask is not None:
            input_ids = input_ids.masked_fill(attention_mask == 0, -1)
        slots = int((input_ids == self.placeholders.get(media.kind, -2)).sum())
        times = max(slots // max(sum(media.lengths), 1), 1)
        return replace(media, prompt=input_ids[::times])

    def token_map(self, input_ids: Tensor, attention_mask: Tensor | None, media: Sequence[Media]) -> TokenMap:
        """Roles of the prompt's tokens.

        Args:
            input_ids: ``[B, N]`` with placeholders already expanded.
            attention_mask: ``[B, N]`` or None.
            media: the features that go with the prompt.

        Raises:
            ValueError: the placeholders do not match the features.
        """
        valid = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if valid.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask {tuple(valid.shape)} does not match input_ids {tuple(input_ids.shape)}: pass the 2-D "
                "mask that the processor made"
            )
        valid = valid.to(torch.bool)
        kinds = torch.full_like(input_ids, -1)
        for number, kind in enumerate(KINDS):
            if kind in self.placeholders:
                kinds[(input_ids == self.placeholders[kind]) & valid] = number
        found = {m.kind: self.layouts(self.placed(m, input_ids, valid)) for m in media}
        rows = assign(kinds, [found.get(kind, []) for kind in KINDS])
        return build_token_map(kinds >= 0, valid, rows)

    def text_only(self, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """The prompt without its pictures: left-padded ids [B, n] and mask [B, n]."""
        valid = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        gone = torch.tensor(list(self.placeholders.values()), device=input_ids.device)
        keep = valid.to(torch.bool) & ~torch.isin(input_ids, gone) & ~self.framing(input_ids)
        width = max(int(keep.sum(1).max()), 1)
        ids = input_ids.new_zeros(input_ids.shape[0], width)
        mask = torch.zeros_like(ids)
        for row in range(input_ids.shape[0]):
            text = input_ids[row][keep[row]]
            if text.numel():
                ids[row, -text.numel() :] = text
                mask[row, -text.numel() :] = 1
        return ids, mask

    def framing(self, input_ids: Tensor) -> Tensor:
        """bool ``[B, N]``: start tokens, end tokens and separators, which leave with the picture."""
        ids: list[int] = []
        for name in self.structure:
            value = getattr(self.model.config, name, None)
            ids += [value] if isinstance(value, int) else value or []
        return torch.isin(input_ids, torch.tensor(ids, dtype=input_ids.dtype, device=input_ids.device))

    def read_text(self, ids: Tensor, mask: Tensor) -> None:
        """Runs a left-padded prompt without pictures through the decoder."""
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        embeds = self.model.get_input_embeddings()(ids)
        self.lm(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False)

    # -------------------------------------------------------------------------------------------------- pruning

    def shadows(self, running: Callable[[], Request | None]) -> Iterable[Shadow]:
        """Methods to replace on the instance while a session is attached: (owner, name, wrapper).

        The wrapper receives the original method and its arguments; ``running()`` is the request in flight.
        """
        return ()

    def prune_inputs(self, stage: PruneStage, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Decoder arguments after tokens left before layer 0, beyond embeddings, positions and masks."""
        return kwargs

    # ----------------------------------------------------------------------------------------- arguments of calls

    @property
    def takes_features(self) -> bool:
        """Whether the model's forward pass takes finished features; transformers 5.17 encodes pixels there itself."""
        return "mm_encoder_outputs" in inspect.signature(type(self.model).forward).parameters

    def announced(self, kwargs: Mapping[str, Any]) -> dict[str, Media]:
        """Media in the arguments of ``generate``, for models whose ``generate`` never calls the feature function."""
        return {}

    def prompt_arguments(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of the forward pass that runs the prompt, from what the model was called with."""
        return dict(kwargs)

    def branch_arguments(self, kwargs: Mapping[str, Any], encoded: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of one forward pass of a second branch whose pictures were ``encoded`` (by kind) before."""
        return dict(kwargs)

    # --------------------------------------------------------------------------------------------------- pixels

    def geometry(self, image_processor: Any, size: tuple[int, int], layout: Layout) -> list[ImageGeometry]:
        """How an original picture of ``size`` (width, height) lies under each view of its layout."""
        return [fixed_canvas(image_processor, size, grid) for grid in layout.views]

    def encode(self, media: Media, pixels: Mapping[str, Tensor]) -> Any:
        """Features of other pixels (by argument name), everything else as in ``media``."""
        arguments = {**media.arguments, **pixels, "return_dict": True}
        return self.features(media.kind)(**arguments)

    def pictures(self, media: Media, pixels: Tensor) -> list[Tensor]:
        """The pixels of each picture, as views of ``pixels``; what pads a batch is in none of them."""
        sizes, seen = media.arguments.get("image_sizes"), media.arguments.get("pixel_attention_mask")
        if seen is not None:
            extents = [(int(m.any(1).sum()), int(m.any(0).sum())) for m in seen.flatten(0, -3)]
            return [p[..., :h, :w] for p, (h, w) in zip(pixels.flatten(0, -4), extents, strict=True) if h and w]
        if sizes is not None and pixels.dim() == 4 and len(sizes) == len(pixels):
            return [p[..., : int(h), : int(w)] for p, (h, w) in zip(pixels, sizes, strict=True)]
        lengths = [len(lay) for lay in self.layouts(media)]
        if len(pixels) == len(lengths):
            return list(pixels)
        entries = [n * len(pixels) / sum(lengths) for n in lengths]  # tiles or patches, in proportion to the tokens
        if any(entry != int(entry) for entry in entries):
            raise AttachError(f"{self._who()} does not say which pixels belong to which picture")
        return list(pixels.split([int(entry) for entry in entries]))

    def pixel_arguments(self, media: Media) -> list[str]:
        """Names of the arguments that hold pixels; two towers have one each."""
        names = [name for name in media.arguments if "pixel_values" in name]
        if not names:
            raise ValueError("finished features have no pixels: pass pixel_values to the model instead")
        return names

    def bind(self, kind: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of a feature call by name."""
        signature = inspect.signature(getattr(type(self.base), f"get_{kind}_features"))
        bound = signature.bind(self.base, *args, **kwargs)
        out = dict(bound.arguments)
        out.pop("self", None)
        extra = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), None)
        out.update(out.pop(extra, {}) if extra else {})
        return out

    def repeat_features(self, output: Any, per_row: list[int], times: int) -> Any:
        """Features for ``times`` adjacent copies of every row (``per_row`` visual tokens each).

        Feature functions return a list or a tensor; models flatten either before they lay the features into the
        sequence, so flat features serve all of them.
        """
        if times == 1:
            return output

        def repeat(features: Any) -> Any:
            flat = features if isinstance(features, Tensor) else torch.cat([f.flatten(0, -2) for f in features])
            parts = flat.flatten(0, -2).split(per_row)
            joined = torch.cat([part for part in parts for _ in range(times)])
            return joined if isinstance(features, Tensor) else [joined]

        copy = type(output)(**dict(output))
        copy.pooler_output = repeat(output.pooler_output)
        if getattr(output, "deepstack_features", None) is not None:
            copy.deepstack_features = [repeat(depth) for depth in output.deepstack_features]
        return copy


class SquareGrid(Family):
    """Families whose pictures give one square grid each, row by row."""

    def layout(self, length: int) -> Layout:
        """The square grid; none where the count is no square (a class token among them)."""
        side = math.isqrt(length)
        return Layout.of_views((side, side)) if side * side == length else Layout.without_grid(length)


def assign(kinds: Tensor, layouts: list[list[Layout]]) -> list[list[Layout]]:
    """Deals the layouts of a batch out to its rows.

    Args:
        kinds: int64 ``[B, N]``, kind of the placeholder at each slot, -1 elsewhere.
        layouts: per kind, the layouts of the batch in order. Rows may be repeated (beams, several return
            sequences): then every layout serves ``times`` adjacent rows.
    """
    expected = sum(len(lay) for kind in layouts for lay in kind)
    slots = int((kinds >= 0).sum())
    times = slots // expected if expected and slots % expected == 0 else 1
    if slots != expected * times or kinds.shape[0] % times:
        raise ValueError(
            f"the prompt has {slots} image placeholders but its images give {expected} visual tokens: build the "
            "inputs with the processor that belongs to the model, one image per placeholder"
        )
    waiting = [iter(kind) for kind in layouts]
    rows: list[list[Layout]] = []
    for row in range(0, kinds.shape[0], times):
        present = kinds[row][kinds[row] >= 0].tolist()
        mine: list[Layout] = []
        start = 0
        while start < len(present):
            lay = next(waiting[present[start]], None)
            end = start + (len(lay) if lay is not None else 0)
            if lay is None or end > len(present) or set(present[start:end]) != {present[start]}:
                raise ValueError(
                    f"the image placeholders of sample {row} do not match its images: build the inputs with the "
                    "processor that belongs to the model, one image per placeholder"
                )
            mine.append(lay)
            start = end
        rows += [mine] * times
    return rows


def beside(picture: Tensor) -> Tensor:
    """bool ``[B, N]``: the slots next to a run of ``picture`` slots, on either side."""
    padded = torch.nn.functional.pad(picture, (1, 1))
    return (padded[:, 2:] | padded[:, :-2]) & ~picture


def _first(owner: Any, names: Sequence[str]) -> Any:
    return next((part for name in names if (part := getattr(owner, name, None)) is not None), None)


__all__ = ["KINDS", "Family", "Grid", "Layout", "Media", "Shadow", "SquareGrid", "assign", "beside"]
