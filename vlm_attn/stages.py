"""The contracts a method may fill. A method says *what*, as data; the engine decides *how*.

One method is one frozen dataclass made with :func:`method_dataclass`. It names its stage by the class it derives
from: :class:`Refine`, :class:`Prune`, :class:`Contrast`, :class:`Noop`, or one of the kinds of :class:`Edit`
(:class:`LogitMap`, :class:`KeyBias`, :class:`SoftMask`, :class:`RowEdit`, :class:`SegmentEdit`, :class:`HeadScale`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import numpy as np
from PIL import Image
from torch import Tensor

from .contract import STAGES, Method, ModelInfo, check_layer, field_names, method_dataclass
from .sites import EncoderStep, Merged, PruneView, Shrunk, Site
from .sites import RowScore as RowScore
from .stages_edit import (
    Draft,
    Edit,
    EditView,
    EncoderScore,
    HeadScale,
    KeyBias,
    KeyMap,
    LogitMap,
    RowEdit,
    Rows,
    SegmentEdit,
    SoftMask,
    Words,
)

if TYPE_CHECKING:
    from .tokens import TokenMap


class Noop(Method):
    """A method that occupies no stage: the control that must change nothing."""

    stage = "read"


# ------------------------------------------------------------------------------------------------------- refine


class Probe(Protocol):
    """What a Refine method may ask of the model, everything else switched off."""

    layers: int

    def maps(self, image: Image.Image, text: str, *, layers: Sequence[int], steps: int) -> np.ndarray:
        """Head-mean attention of the newest row on the image's visual tokens, float32 ``[steps, layers, n]``."""

    def to_pixels(self, values: np.ndarray, image: Image.Image, *, stretch: bool = False) -> np.ndarray:
        """Values of the visual tokens ``[n]`` as float32 ``(H, W)`` in original pixels (bilinear)."""


class Refine(Method):
    """Changes the picture or the question before the processor sees them."""

    stage = "refine"

    @property
    def active(self) -> bool:
        """False when the parameters leave every picture as it is."""
        return True

    def refine(self, images: list[Image.Image], text: str, probe: Probe) -> tuple[list[Image.Image], str]:
        """The images and text to ask with."""
        raise TypeError(f"{type(self).__name__} does not implement refine()")


# -------------------------------------------------------------------------------------------------------- prune


class Prune(Method):
    """Drops visual tokens during prefill.

    ``positions``: ``keep`` leaves the survivors at their positions; ``renumber`` closes the gaps (refused by name
    where a position is more than one number). ``encoder_layer``: the layer of the vision encoder (may count from the
    end) whose attention the method wants to see; only where visual tokens are the encoder's patches. ``shrinks``:
    where in an encoder layer patches leave, between its attention and its MLP or at its output; what left there must
    leave the prompt at layer 0 too. ``cuts_heads``: whether :meth:`live_heads` is asked. ``compacts``: what leaves
    before a layer also leaves the caches of the layers before it, once they have read the prompt; one site only.
    """

    stage = "prune"
    wants_padding: bool = False
    positions: str | None = "keep"
    encoder_layer: int | None = None
    shrinks: Literal["attention", "output"] | None = None
    cuts_heads: bool = False

    @property
    def compacts(self) -> bool:
        """See the class."""
        return False

    @property
    def wants_question(self) -> bool:
        """Whether the view must hold the user's question as text, which needs the processor."""
        return False

    @property
    def wants_latency(self) -> bool:
        """Whether the budget is a time, so that prefill times are measured when the method is attached."""
        return str(getattr(self, "keep", "")).endswith("ms")

    def sites(self) -> tuple[Site, ...]:
        """Sites in ascending layer order."""
        raise TypeError(f"{type(self).__name__} does not implement sites()")

    def rows(self, name: str, tokens: TokenMap, embeds: Tensor) -> Tensor:
        """bool ``[B, N]``: a set of query rows of the prompt, from its input embeddings ``[B, N, D]``."""
        raise ValueError(f"{self.name} knows no rows '{name}'; choose last, text, visual or all")

    def keep_mask(self, view: PruneView) -> Tensor | Merged:
        """bool ``[B, N]``: the visual tokens to keep (text is never dropped, whatever the mask says)."""
        raise TypeError(f"{type(self).__name__} does not implement keep_mask()")

    def shrink(self, step: EncoderStep) -> Shrunk | None:
        """What stays of one picture after one encoder layer; None = everything."""
        raise TypeError(f"{type(self).__name__} does not implement shrink()")

    def live_heads(self, layer: int, outputs: Tensor, rows: Tensor, memory: dict[str, Any]) -> Tensor:
        """bool ``[B, H]``: the heads that the layers behind ``layer`` keep.

        Args:
            outputs: ``[B, Q, H, d]`` head outputs of the prompt at this layer, 0 where a head was cut before.
            rows: bool ``[B, Q]``, rows that are no padding.
            memory: the method's own notes about this request.
        """
        raise TypeError(f"{type(self).__name__} does not implement live_heads()")


# ------------------------------------------------------------------------------------------------------- decode


class Contrast(Method):
    """Combines the next-token logits with those of a second branch that sees an altered picture, or none at all.

    ``text_branch``: the branch gets the prompt without its pictures instead of altered ones.
    """

    stage = "decode"
    text_branch: ClassVar[bool] = False

    @property
    def active(self) -> bool:
        """False when the combination leaves the logits as they are, so that no branch need run."""
        return True

    def alter_pixels(self, pixels: Tensor) -> Tensor:
        """The branch's pixels of one picture, in whatever shape the model takes them (same shape and dtype)."""
        raise TypeError(f"{type(self).__name__} does not implement alter_pixels()")

    def combine(self, logits: Tensor, branch: Tensor) -> Tensor:
        """fp32 ``[B, V]`` from the normal and the branch logits."""
        raise TypeError(f"{type(self).__name__} does not implement combine()")


AnyMethod = Refine | Prune | Edit | Contrast | Noop
MethodFactory = Callable[..., Method]

__all__ = [
    "STAGES",
    "AnyMethod",
    "Contrast",
    "Draft",
    "Edit",
    "EditView",
    "EncoderScore",
    "EncoderStep",
    "HeadScale",
    "KeyBias",
    "KeyMap",
    "LogitMap",
    "Merged",
    "Method",
    "MethodFactory",
    "ModelInfo",
    "Noop",
    "Probe",
    "Prune",
    "PruneView",
    "Refine",
    "RowEdit",
    "RowScore",
    "Rows",
    "SegmentEdit",
    "Shrunk",
    "Site",
    "SoftMask",
    "Words",
    "check_layer",
    "field_names",
    "method_dataclass",
]
