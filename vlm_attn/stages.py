"""The contracts a method may fill. A method says *what*, as data; the engine decides *how*.

One method is one frozen dataclass made with :func:`method_dataclass`. It names its stage by the class it derives
from: :class:`Refine`, :class:`Prune`, :class:`Contrast`, :class:`Noop`, or one of the kinds of :class:`Edit`
(:class:`LogitMap`, :class:`KeyBias`, :class:`SoftMask`, :class:`RowEdit`, :class:`SegmentEdit`, :class:`HeadScale`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self, TypeVar, dataclass_transform

import numpy as np
import pydantic
from PIL import Image
from torch import Tensor

from .sites import Merged, PruneView, Site
from .sites import RowScore as RowScore

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


class Prune(Method):
    """Drops visual tokens during prefill.

    ``positions``: ``keep`` leaves the survivors at their positions; ``renumber`` closes the gaps (refused by name
    where a position is more than one number).
    """

    stage = "prune"
    wants_padding: bool = False
    positions: str | None = "keep"

    def sites(self) -> tuple[Site, ...]:
        """Sites in ascending layer order."""
        raise TypeError(f"{type(self).__name__} does not implement sites()")

    def rows(self, name: str, tokens: TokenMap, embeds: Tensor) -> Tensor:
        """bool ``[B, N]``: a set of query rows of the prompt, from its input embeddings ``[B, N, D]``."""
        raise ValueError(f"{self.name} knows no rows '{name}'; choose last, text, visual or all")

    def keep_mask(self, view: PruneView) -> Tensor | Merged:
        """bool ``[B, N]``: the visual tokens to keep (text is never dropped, whatever the mask says)."""
        raise TypeError(f"{type(self).__name__} does not implement keep_mask()")


# --------------------------------------------------------------------------------------------------------- edit

Rows = Literal["last", "sees_image", "all"]
"""Query rows an edit acts in: the last row of each forward, text rows that see the image, or every row. The first two
leave samples without an image alone. In decoding all three mean the new row."""

Heads = Mapping[int, Sequence[int]]
"""Decoder layer -> query heads."""


@dataclass(frozen=True)
class Words:
    """Roles of prompt tokens that need the tokenizer.

    Attributes:
        question: bool ``[B, N]``, tokens of the user's question: text after the last visual token, without leading
            special tokens and white space and without the turn markers that open the answer.
        content: bool ``[B, N]``, those that belong to a content word.
    """

    question: Tensor
    content: Tensor


@dataclass(frozen=True)
class EncoderScore:
    """A reading of the vision encoder's attention: head-mean weight that each patch receives at one of its layers.

    ``rows="summary"``: from the class token, or from all patches where the encoder has none [unverified stand-in];
    ``rows="patches"``: from all patches. ``layer`` may count from the end.
    """

    layer: int
    rows: Literal["summary", "patches"] = "summary"


@dataclass(frozen=True)
class EditView:
    """What an Edit sees at one layer.

    Attributes:
        layer: 0-based decoder layer.
        tokens: roles of the keys of this layer in the prefill, ``[B, N]`` (for :meth:`RowEdit.edit` also those of
            the tokens generated so far).
        hidden: layer input ``[B, N, D]`` (residual stream before the input norm), prefill only, if asked for.
        columns: fp32 ``[B, H, N]`` mean weight that each key receives from the rows that see it, if asked for.
        encoder: asked-for readings of the vision encoder, fp32 ``[B, N]`` at visual tokens.
        words: roles that need the tokenizer, if asked for.
    """

    layer: int
    tokens: TokenMap
    hidden: Tensor | None = None
    columns: Tensor | None = None
    encoder: Mapping[EncoderScore, Tensor] = field(default_factory=dict)
    words: Words | None = None


class Edit(Method):
    """Changes attention inside the language model."""

    stage = "edit"
    wants_hidden: ClassVar[bool] = False

    def edit_layers(self, model: ModelInfo) -> frozenset[int]:
        """The layers this edit acts in."""
        return frozenset(range(model.layers))

    def heads_at(self, layer: int) -> Sequence[int] | None:
        """Query heads this edit acts in (None = all); the engine leaves the others alone."""
        return None

    @property
    def encoder_scores(self) -> tuple[EncoderScore, ...]:
        """Readings of the vision encoder that the view must hold."""
        return ()

    @property
    def wants_words(self) -> bool:
        """Whether the view must hold :class:`Words`."""
        return False


@dataclass(frozen=True)
class KeyMap:
    """``z' = scale_j z + boost_j |z|`` on the logits of key j; fp32 ``[B, N]`` each, None = 1 and 0."""

    scale: Tensor | None = None
    boost: Tensor | None = None


class LogitMap(Edit):
    """Maps the attention logits of chosen keys before the mask is added; generated tokens are never mapped."""

    rows: ClassVar[Rows] = "last"

    def key_map(self, view: EditView) -> KeyMap:
        """The map of one layer's prompt keys; called once per request and layer, in the prefill."""
        raise TypeError(f"{type(self).__name__} does not implement key_map()")


class KeyBias(Edit):
    """Adds a bias to the attention logits of chosen keys, before the softmax, in every row."""

    def bias(self, view: EditView) -> Tensor:
        """fp32 ``[B, H or 1, N]`` bias of the prefill's keys; generated tokens get 0."""
        raise TypeError(f"{type(self).__name__} does not implement bias()")


class SoftMask(Edit):
    """Lets rows of the prefill see some keys that the model's mask hides, with a weight.

    ``mode="weight"``: ``A_ij ~ sigma exp(z_ij)`` on those pairs, 1 on visible ones; ``mode="output"``:
    ``(1 - sigma) O + sigma O'`` with O' the output when the pairs are fully visible.
    """

    sigma: float
    mode: Literal["weight", "output"]

    def pairs(self, rows: Tensor, keys: Tensor) -> Tensor:
        """bool ``[B, R, N]`` of pairs to soften, from the image ids (-1 text) of rows ``[B, R]`` and keys ``[B, N]``;
        the engine adds that the key lies behind the row and is hidden so far.
        """
        raise TypeError(f"{type(self).__name__} does not implement pairs()")


class RowEdit(Edit):
    """Rewrites the weights of the last row of every forward, all heads of a layer at once, after the softmax.

    What needs several heads (a scalar pooled over heads, a choice of heads) and weights that differ from key to key
    is said here; everything else is said more cheaply by the other kinds.
    """

    @property
    def source(self) -> int | None:
        """Layer whose prompt rows :meth:`read` must see before the first edit; None = nothing is read."""
        return None

    def read_rows(self, view: EditView) -> Tensor:
        """bool ``[B, N]``: the prompt rows that :meth:`read` needs."""
        raise TypeError(f"{type(self).__name__} does not implement read_rows()")

    def read(self, view: EditView, weights: Tensor, rows: Tensor) -> Tensor:
        """What the edit must remember of the prompt, ``[B, ...]``.

        Args:
            weights: fp32 ``[B, H, R, N]`` weights of the prompt rows ``rows [R]`` (the union over the batch).
        """
        raise TypeError(f"{type(self).__name__} does not implement read()")

    def edit(self, weights: Tensor, view: EditView, memory: Tensor | None) -> Tensor:
        """fp32 ``[B, H, N]`` weights of the last row after the edit; samples without an image are left alone."""
        raise TypeError(f"{type(self).__name__} does not implement edit()")


class SegmentEdit(Edit):
    """Multiplies the attention weights of labelled key segments, row by row, after the softmax.

    The keys of a layer carry labels ``0..G-1``; generated tokens carry ``generated``. For each head and row the
    engine hands over the mass of every segment and multiplies the weights of segment ``g`` by ``scales[..., g]``.
    The engine does not renormalise: a method that wants row sum 1 chooses scales that give it.

    Attributes:
        segments: number of labels G. generated: label of generated tokens.
        rows: the rows that are edited.
        redistributes: moves mass between segments; at most one such method fits into a pipeline.
        wants_columns: labels depend on the column means of the layer's own attention.
    """

    segments: ClassVar[int]
    generated: ClassVar[int] = 0
    rows: ClassVar[Rows] = "sees_image"
    redistributes: ClassVar[bool] = True
    wants_columns: ClassVar[bool] = False

    def labels(self, view: EditView) -> Tensor:
        """uint8 ``[B, N]`` or ``[B, H, N]`` labels of one layer's keys; once per request and layer, in the prefill."""
        raise TypeError(f"{type(self).__name__} does not implement labels()")

    def scales(self, masses: Tensor, counts: Tensor) -> Tensor:
        """fp32 ``[B, H, R, G]`` factors from masses ``[B, H, R, G]`` and prompt keys per segment ``counts [B, G]``
        (``[B, H, G]`` with labels per head).
        """
        raise TypeError(f"{type(self).__name__} does not implement scales()")


class HeadScale(Edit):
    """Multiplies whole head outputs before ``o_proj``, in all rows, with factors fixed during the prefill.

    ``wants_text_stream``: the factors need the head outputs of the prompt without its image; ``paired``: that stream
    is scaled with the same factors, layer by layer.
    """

    wants_text_stream: ClassVar[bool] = False

    @property
    def paired(self) -> bool:
        """Whether the text-only stream is scaled as well."""
        return False

    def scale_layers(self, model: ModelInfo) -> frozenset[int]:
        """The layers whose heads are scaled."""
        return self.edit_layers(model)

    def factors(self, layer: int, last: Tensor, text_last: Tensor | None) -> Tensor:
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
