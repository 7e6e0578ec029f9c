"""The contracts a method may fill. A method says *what*, as data; the engine decides *how*.

One method is one frozen dataclass made with :func:`method_dataclass`. It names its stage by the class it derives
from: :class:`Refine`, :class:`Prune`, :class:`SegmentEdit`, :class:`KeyBias`, :class:`HeadScale`, :class:`Contrast`
or :class:`Noop`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self, TypeVar, dataclass_transform

import numpy as np
import pydantic
from PIL import Image
from torch import Tensor

if TYPE_CHECKING:
    from .profiles import Profile
    from .tokens import TokenMap

T = TypeVar("T")

STAGES = ("refine", "prune", "edit", "decode", "read")


@dataclass_transform(kw_only_default=True, frozen_default=True)
def method_dataclass(cls: type[T]) -> type[T]:
    """Frozen keyword-only dataclass whose fields are type- and range-checked (pydantic, strict)."""
    config = pydantic.ConfigDict(strict=True, allow_inf_nan=False, extra="forbid")
    return pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=config)(cls)  # type: ignore[return-value]


@dataclass(frozen=True)
class ModelInfo:
    """Shape of the language model a session is attached to, as methods may see it."""

    checkpoint: str
    family: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int

    @property
    def signature(self) -> dict[str, Any]:
        """What must agree between a profile and a model."""
        keys = ("family", "layers", "heads", "kv_heads", "head_dim", "hidden")
        return {k: getattr(self, k) for k in keys}


class Method:
    """Base of all methods: a name, where it comes from, and how it is checked against a model."""

    name: ClassVar[str]
    stage: ClassVar[str]
    summary: ClassVar[str]
    paper: ClassVar[str] = ""
    needs: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def neutral(cls) -> Self:
        """An instance at the strength that must change nothing, usable on any supported model."""
        return cls()

    def resolve(self, model: ModelInfo, profile: Profile) -> Self:
        """The method with model-dependent values filled in.

        Raises:
            ValueError: a parameter does not fit the model.
            MissingProfileError: per-checkpoint data is missing.
        """
        return self

    def to_dict(self) -> dict[str, Any]:
        """Name and parameters, enough to build the method again."""
        return {"name": self.name, **dataclasses.asdict(self)}  # type: ignore[call-overload]

    def with_values(self, **values: Any) -> Self:
        """A copy with some fields replaced."""
        return dataclasses.replace(self, **values)  # type: ignore[type-var]


def check_layer(method: str, field: str, layer: int, model: ModelInfo, lowest: int = 0) -> None:
    """Raises ValueError unless ``lowest <= layer < model.layers``."""
    if not lowest <= layer < model.layers:
        raise ValueError(
            f"{method}: {field}={layer} is not a layer of this model; choose {lowest}..{model.layers - 1} "
            f"(the model has {model.layers} decoder layers, counted from 0)"
        )


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


@dataclass(frozen=True)
class RowScore:
    """An attention reading that the engine takes on the way: head-mean weights of chosen rows at one layer."""

    layer: int
    rows: Literal["last"] = "last"

    @property
    def id(self) -> str:
        """Name of the reading in profiles."""
        return f"{self.rows}_row@{self.layer}"


@dataclass(frozen=True)
class Site:
    """Where visual tokens leave: before decoder layer ``layer`` (0 = at the language model's input)."""

    layer: int
    score: RowScore | None = None


@dataclass(frozen=True)
class PruneView:
    """What a Prune method sees at one site.

    Attributes:
        site: the site that is being decided.
        tokens: roles of the slots that reached it, ``[B, N]``.
        scores: fp32 ``[B, N]`` reading asked for by the site, or None.
        visible: bool ``[B, N]``, False at visual tokens that show only padding (None when nobody asked).
    """

    site: Site
    tokens: TokenMap
    scores: Tensor | None
    visible: Tensor | None


class Prune(Method):
    """Drops visual tokens during prefill."""

    stage = "prune"
    wants_padding: bool = False

    def sites(self) -> tuple[Site, ...]:
        """Sites in ascending layer order."""
        raise TypeError(f"{type(self).__name__} does not implement sites()")

    def keep_mask(self, view: PruneView) -> Tensor:
        """bool ``[B, N]``: the visual tokens to keep (text is never dropped, whatever the mask says)."""
        raise TypeError(f"{type(self).__name__} does not implement keep_mask()")


# --------------------------------------------------------------------------------------------------------- edit


@dataclass(frozen=True)
class EditView:
    """What an Edit sees at one layer.

    Attributes:
        layer: 0-based decoder layer.
        tokens: roles of the keys of this layer in the prefill, ``[B, N]``.
        hidden: layer input ``[B, N, D]`` (residual stream before the input norm), prefill only, if asked for.
    """

    layer: int
    tokens: TokenMap
    hidden: Tensor | None


class Edit(Method):
    """Changes attention inside the language model."""

    stage = "edit"
    wants_hidden: ClassVar[bool] = False

    def edit_layers(self, model: ModelInfo) -> frozenset[int]:
        """The layers this edit acts in."""
        return frozenset(range(model.layers))


class SegmentEdit(Edit):
    """Multiplies the attention weights of labelled key segments, row by row, after the softmax.

    The keys of a layer carry labels ``0..G-1`` (0 = never touched; generated tokens get 0). For each head and row
    the engine hands over the mass of every segment and multiplies the weights of segment ``g`` by ``scales[..., g]``.
    The engine does not renormalise: a method that wants row sum 1 chooses scales that give it.
    """

    segments: ClassVar[int]
    rows: ClassVar[Literal["sees_image", "last"]] = "sees_image"

    def labels(self, view: EditView) -> Tensor:
        """uint8 ``[B, N]`` labels of the keys of one layer; called once per request and layer, in the prefill."""
        raise TypeError(f"{type(self).__name__} does not implement labels()")

    def scales(self, masses: Tensor, counts: Tensor) -> Tensor:
        """fp32 ``[B, H, R, G]`` factors from masses ``[B, H, R, G]`` and segment sizes ``counts [B, G]``."""
        raise TypeError(f"{type(self).__name__} does not implement scales()")


class KeyBias(Edit):
    """Adds a bias to the attention logits of chosen keys, before the softmax, in every row."""

    def bias(self, view: EditView) -> Tensor:
        """fp32 ``[B, H or 1, N]`` bias of the prefill's keys; generated tokens get 0."""
        raise TypeError(f"{type(self).__name__} does not implement bias()")


class HeadScale(Edit):
    """Multiplies whole head outputs before ``o_proj``, in all rows, with factors fixed during the prefill."""

    wants_text_stream: ClassVar[bool] = False
    paired: bool = False

    def factors(self, last: Tensor, text_last: Tensor | None) -> Tensor:
        """fp32 ``[B, H]`` factors.

        Args:
            last: ``[B, H, d]`` head outputs of the last prompt row.
            text_last: the same in the text-only stream (image removed), if asked for.
        """
        raise TypeError(f"{type(self).__name__} does not implement factors()")


# ------------------------------------------------------------------------------------------------------- decode


class Contrast(Method):
    """Combines the next-token logits with those of a second branch that sees an altered picture."""

    stage = "decode"

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


def field_names(cls: type[Method]) -> tuple[str, ...]:
    """Parameter names of a method class."""
    return tuple(f.name for f in dataclasses.fields(cls))  # type: ignore[arg-type]
