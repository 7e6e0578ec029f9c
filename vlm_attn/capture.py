"""The prompt on its way to the decoder: what the model was called with, and the features that were computed for it.

``generate`` encodes pictures ahead of the prompt's forward pass, a plain forward encodes them in its middle, and some
models call their decoder's own ``generate``. All three end in the same state when the decoder starts.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .families import Family, Media
from .families.base import KINDS


@dataclass
class Prompt:
    """What the model was called with."""

    ids: Any
    mask: Any
    kwargs: dict[str, Any] = field(repr=False)

    def repeated(self, batch: int) -> tuple[Tensor, Tensor | None]:
        """Ids and 2-D mask of ``batch`` rows; beams and several return sequences repeat every row."""
        times = batch // max(len(self.ids), 1)
        mask = self.mask if isinstance(self.mask, Tensor) and self.mask.dim() == 2 else None
        if times <= 1:
            return self.ids, mask
        return self.ids.repeat_interleave(times, 0), None if mask is None else mask.repeat_interleave(times, 0)


class Capture:
    """Collects prompt and features until the decoder asks for them with :meth:`take`."""

    def __init__(self, family: Family):
        self.family = family
        self.prompt: Prompt | None = None
        self.media: dict[str, Media] = {}
        self._generating = False
        self._encoding = False

    def clear(self) -> None:
        """Forgets what is on its way."""
        self.prompt, self.media = None, {}

    def take(self) -> tuple[Prompt | None, dict[str, Media]]:
        """Hands prompt and features over and forgets them."""
        prompt, media = self.prompt, self.media
        self.clear()
        return prompt, media

    def generate(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs ``generate``; its own arguments stand in where no forward of the whole model will show them."""
        self.clear()
        ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
        self.prompt, self._generating = Prompt(ids, kwargs.get("attention_mask"), kwargs), True
        self.media = self.family.announced(kwargs)
        try:
            return original(*args, **kwargs)
        finally:
            self._generating = False

    def features(
        self,
        kind: str,
        store: dict[str, Media] | None,
        original: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Runs the feature function and keeps the call in ``store``.

        Some models encode videos with their image function: the outer call counts.
        """
        if self._encoding:
            return original(*args, **kwargs)
        start = time.perf_counter()
        self._encoding = True
        try:
            out = original(*args, **kwargs)
        finally:
            self._encoding = False
        if store is not None and hasattr(out, "pooler_output"):
            store[kind] = Media(kind, self.family.bind(kind, args, kwargs), out, time.perf_counter() - start)
        return out

    def model_prompt(self, bound: dict[str, Any]) -> None:
        """The whole model starts on a prompt."""
        self.prompt = Prompt(bound.get("input_ids"), bound.get("attention_mask"), bound)
        if bound.get("mm_encoder_outputs") is None and not self._generating:
            self.media = {}

    def base_prompt(self, bound: dict[str, Any]) -> None:
        """The base model starts on a prompt; features may already be among its arguments."""
        encoded = bound.get("mm_encoder_outputs") or {}
        for kind in KINDS:
            output, ours = encoded.get(kind), self.media.get(kind)
            # What generate encoded ahead arrives here, perhaps copied to another device on the way.
            if output is not None and (ours is None or not (self._generating or ours.output is output)):
                self.media[kind] = Media(kind, {}, output)  # finished features of the caller
        whole = self.prompt.kwargs if self.prompt is not None else bound
        self.prompt = Prompt(bound.get("input_ids"), bound.get("attention_mask"), whole)


def by_name(module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a forward call by name."""
    if not args:
        return dict(kwargs)
    forward = inspect.unwrap(type(module).forward)
    names = [n for n in inspect.signature(forward).parameters if n != "self"]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def brings_media(bound: dict[str, Any]) -> bool:
    """Whether a call carries pixels or finished features."""
    encoded = bound.get("mm_encoder_outputs") or {}
    pixels = any(bound.get(name) is not None for name in ("pixel_values", "pixel_values_videos"))
    return pixels or any(value is not None for value in encoded.values())
