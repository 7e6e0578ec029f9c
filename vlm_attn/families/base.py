"""The adapter contract: what the core asks of a model family, answered by asking the model itself.

``Family`` serves every family whose parts can be found through transformers' own accessors (decoder, decoder layers
with ``self_attn.o_proj``, image features, image token id). A family file overrides only what truly differs.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import AttachError
from ..geometry import ImageGeometry, fixed_canvas
from ..stages import ModelInfo
from ..tokens import TokenMap, build_token_map

Grid = tuple[int, int] | None


class Family:
    """Adapter of one model object; built (and validated) at attach time."""

    name: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]]
    executed: ClassVar[bool] = True
    refused: ClassVar[Mapping[str, str]] = {}

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.base: nn.Module = model.base_model
        self.lm: Any = self._need(model.get_decoder(), "a decoder (get_decoder())")
        self.layers: nn.ModuleList = self._need(getattr(self.lm, "layers", None), "decoder layers (decoder.layers)")
        self.head: Any = self._need(model.get_output_embeddings(), "an output head (get_output_embeddings())")
        self.text_config: Any = model.config.get_text_config()
        self.image_token_id = int(
            self._need(getattr(model.config, "image_token_id", None), "config.image_token_id (the image placeholder)")
        )
        self._need(getattr(self.base, "get_image_features", None), "get_image_features() on its base model")
        for number, layer in enumerate(self.layers):
            attention = getattr(layer, "self_attn", None)
            self._need(attention, f"self_attn in decoder layer {number}")
            self._need(getattr(attention, "o_proj", None), f"self_attn.o_proj in decoder layer {number}")
            if getattr(attention, "layer_idx", None) != number:
                raise AttachError(f"{self._who()}: decoder layer {number} does not know its index (layer_idx)")
        if self.text_config is not self.lm.config:
            raise AttachError(
                f"{self._who()}: its decoder does not share config.get_text_config(); load it unmodified"
            )

    def _who(self) -> str:
        return f"{type(self.model).__name__} (family {self.name})"

    def _need(self, part: Any, what: str) -> Any:
        if part is None:
            raise AttachError(f"{self._who()} lacks {what}: vlm_attn needs an unmodified transformers model")
        return part

    def attention(self, layer: int) -> Any:
        """Self-attention module of a decoder layer."""
        return self.layers[layer].self_attn

    def info(self) -> ModelInfo:
        """Shape of the language model."""
        config = self.text_config
        heads = int(config.num_attention_heads)
        return ModelInfo(
            checkpoint=str(getattr(self.model.config, "_name_or_path", "") or ""),
            family=self.name,
            layers=len(self.layers),
            heads=heads,
            kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
            head_dim=int(self.attention(0).head_dim),
            hidden=int(config.hidden_size),
        )

    # ---------------------------------------------------------------------------------------------- token roles

    def image_grid(self, length: int, features: Any) -> Grid:
        """(rows, columns) of an image of ``length`` visual tokens, or None where there is no grid."""
        raise AttachError(f"{self._who()} does not say how its visual tokens lie on the picture")

    def tokens_per_image(self, input_ids: Tensor) -> int | None:
        """Visual tokens per image when every image has the same number; None when it varies."""
        return None

    def token_map(self, input_ids: Tensor, attention_mask: Tensor | None) -> TokenMap:
        """Roles of the prompt's tokens; ``input_ids`` [B, N] with placeholders already expanded."""
        image_mask = input_ids == self.image_token_id
        valid = torch.ones_like(image_mask) if attention_mask is None else attention_mask.to(torch.bool)
        if valid.dim() != 2 or valid.shape != image_mask.shape:
            raise ValueError(
                f"attention_mask {tuple(valid.shape)} does not match input_ids {tuple(input_ids.shape)}: pass the 2-D "
                "mask that the processor made"
            )
        per_image = self.tokens_per_image(input_ids)
        lengths, grids = [], []
        for row in range(input_ids.shape[0]):
            count = int((image_mask[row] & valid[row]).sum())
            if per_image is not None and count % per_image:
                raise ValueError(
                    f"sample {row} has {count} image placeholders, which is no multiple of the {per_image} visual "
                    f"tokens of one image: build the inputs with the model's own processor"
                )
            spans = (per_image,) * (count // per_image) if per_image else ((count,) if count else ())
            lengths.append(spans)
            grids.append(tuple(self.image_grid(n, None) for n in spans))
        return build_token_map(image_mask, valid, tuple(grids), tuple(lengths))

    def text_only(self, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """The prompt without its image placeholders: left-padded ids [B, n] and mask [B, n]."""
        valid = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        keep = valid.to(torch.bool) & (input_ids != self.image_token_id)
        width = max(int(keep.sum(1).max()), 1)
        ids = input_ids.new_zeros(input_ids.shape[0], width)
        mask = torch.zeros_like(ids)
        for row in range(input_ids.shape[0]):
            text = input_ids[row][keep[row]]
            if text.numel():
                ids[row, -text.numel() :] = text
                mask[row, -text.numel() :] = 1
        return ids, mask

    # --------------------------------------------------------------------------------------------------- pixels

    def geometry(self, image_processor: Any, size: tuple[int, int], grid: tuple[int, int]) -> ImageGeometry:
        """How an original picture of ``size`` (width, height) lies under the visual grid."""
        return fixed_canvas(image_processor, size, grid)

    def encode(self, arguments: Mapping[str, Any]) -> Any:
        """Image features of explicit arguments of ``get_image_features``, as the model's forward expects them."""
        return self.base.get_image_features(**{**arguments, "return_dict": True})  # type: ignore[operator]

    def bind_image_arguments(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of a ``get_image_features`` call by name."""
        kind: Any = type(self.base)
        signature = inspect.signature(kind.get_image_features)
        bound = signature.bind(self.base, *args, **kwargs)
        out = dict(bound.arguments)
        out.pop("self", None)
        extra = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), None)
        out.update(out.pop(extra, {}) if extra else {})
        return out

    def image_count(self, output: Any) -> int:
        """Number of images in encoder output."""
        return len(output.pooler_output)

    def repeat_features(self, output: Any, per_row: list[int], times: int) -> Any:
        """Image features for ``times`` adjacent copies of every row (``per_row`` images each)."""
        if times == 1:
            return output
        features, repeated, start = list(output.pooler_output), [], 0
        for count in per_row:
            repeated += features[start : start + count] * times
            start += count
        copy = type(output)(**dict(output))
        copy.pooler_output = repeated
        return copy
