"""Llama 3.2 Vision: pictures enter through cross-attention; only a second branch makes sense beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
import transformers
from packaging.version import Version
from torch import Tensor

from ..errors import UnsupportedError
from ..tokens import TokenMap
from .base import Family, Media

_ABSENT = "its pictures enter through cross-attention and are no tokens of the sequence; use a contrastive method"


class Mllama(Family):
    """``MllamaForConditionalGeneration``: one token stands for each picture, and shows none of it."""

    hybrid = True
    refused: ClassVar[Mapping[str, str]] = dict.fromkeys(("refine", "select", "prune", "edit", "cache"), _ABSENT)

    _PIXELS = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask", "cross_attention_mask")

    def _check_features(self) -> None:
        """There is no feature function: the model encodes in its forward pass."""

    def token_map(self, input_ids: Tensor, attention_mask: Tensor | None, media: Sequence[Media]) -> TokenMap:
        """One visual token per picture, whatever is known about its features."""
        present = input_ids == self.placeholders["image"]
        if attention_mask is not None:
            present &= attention_mask.to(torch.bool)
        return super().token_map(input_ids, attention_mask, [Media("image", {}, _unknown(int(present.sum())))])

    def announced(self, kwargs: Mapping[str, Any]) -> dict[str, Media]:
        """The pixels and what says where they belong."""
        arguments = {name: kwargs[name] for name in self._PIXELS if kwargs.get(name) is not None}
        if "pixel_values" not in arguments:
            return {}
        return {"image": Media("image", arguments, _unknown(int((arguments["aspect_ratio_ids"] > 0).sum())))}

    def pictures(self, media: Media, pixels: Tensor) -> list[Tensor]:
        """All tiles of each picture; pictures that pad a row of the batch are left out."""
        return [pixels[row, at] for row, at in (media.arguments["aspect_ratio_ids"] > 0).nonzero().tolist()]

    def encode(self, media: Media, pixels: Mapping[str, Tensor]) -> Any:
        """The pixels themselves: the branch's first forward pass encodes them."""
        return SimpleNamespace(arguments={**media.arguments, **pixels}, pooler_output=media.output.pooler_output)

    @property
    def takes_features(self) -> bool:
        """In place of features it takes what :meth:`encode` hands over."""
        return True

    def branch_arguments(self, kwargs: Mapping[str, Any], encoded: Mapping[str, Any]) -> dict[str, Any]:
        """Pixels with the prompt; later tokens see the tiles that the prompt's last token sees."""
        if Version(transformers.__version__) < Version("5.18"):
            raise UnsupportedError(
                f"{self.name}: a second branch needs transformers 5.18 or newer, where a step takes its own part of "
                f"the cross-attention mask; this is {transformers.__version__}"
            )
        arguments = dict(kwargs)
        given = encoded["image"].arguments
        if arguments.pop("mm_encoder_outputs", None) is not None:
            return arguments | given
        return arguments | {"cross_attention_mask": given["cross_attention_mask"][:, -1:]}


def _unknown(pictures: int) -> SimpleNamespace:
    """Output that tells nothing but the number of pictures."""
    return SimpleNamespace(pooler_output=torch.empty(pictures, 1, 0, device="meta"))
