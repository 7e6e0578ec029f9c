"""The contracts of attention edits: each kind says what changes in a row of attention, the engine decides how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor

from .contract import Method, ModelInfo

if TYPE_CHECKING:
    from .ops import Mix
    from .tokens import TokenMap

Rows = Literal["last", "sees_image", "all"]
"""Query rows an edit acts in: the last row of each forward, text rows that see the image, or every row. The first two
leave samples without an image alone. In decoding all three mean the new row."""


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
        tokens: roles of the keys of this layer in the prefill, ``[B, N]``: one object for all steps of a request.
        hidden: layer input ``[B, N, D]`` (residual stream before the input norm), prefill only, if asked for.
        columns: fp32 ``[B, H, N]`` mean weight that each key receives from the rows that see it, if asked for.
        prompt: roles of the whole prompt, nothing pruned; ``x.gather(1, tokens.index)`` takes prompt values to this
            layer's slots.
        encoder: asked-for readings of the vision encoder, fp32 over the whole prompt, 0 at text.
        words: roles that need the tokenizer, over the whole prompt, if asked for.
    """

    layer: int
    tokens: TokenMap
    prompt: TokenMap
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
        """The map of the prompt keys ``view.tokens``, in the prefill; layers with the same keys share the first one's,
        so it depends on nothing else of a layer."""
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


@dataclass(frozen=True)
class Draft:
    """What a draft showed, in positions of the prompt.

    Attributes:
        steps: per layer, fp32 ``[T, B, N]`` what :meth:`RowEdit.glance` kept of each draft step.
        rows: per layer, fp32 ``[B, R, N]`` head-mean weights of the prompt's text rows behind the first visual token.
        index: int64 ``[R]``, positions of these rows.
        counted: bool ``[T, B]``, steps before the end of each sample's draft.
    """

    steps: Mapping[int, Tensor]
    rows: Mapping[int, Tensor]
    index: Tensor
    counted: Tensor


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

    def read(self, view: EditView, weights: Tensor, rows: Tensor) -> Any:
        """What the edit must remember of the prompt, ``[B, ...]``.

        Args:
            weights: fp32 ``[B, H, R, N]`` weights of the prompt rows ``rows [R]`` (the union over the batch).
        """
        raise TypeError(f"{type(self).__name__} does not implement read()")

    @property
    def draft_tokens(self) -> int:
        """Tokens to draft before the answer, with everything switched off; 0 = no draft."""
        return 0

    def glance(self, weights: Tensor, vis: Tensor) -> Tensor:
        """fp32 ``[B, N]``: what to keep of one draft step and layer, from weights ``[B, H, N]`` on the prompt."""
        raise TypeError(f"{type(self).__name__} does not implement glance()")

    def read_draft(self, view: EditView, draft: Draft) -> Any:
        """What the edit must remember of the draft; it may be updated by :meth:`edit`."""
        raise TypeError(f"{type(self).__name__} does not implement read_draft()")

    def edit(self, weights: Tensor, view: EditView, memory: Any) -> Tensor:
        """fp32 ``[B, H, n]`` weights of the last row after the edit; samples without an image are left alone.

        Args:
            weights: fp32 ``[B, H, n]``; keys behind those of ``view.tokens`` are those of generated tokens.
        """
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

    def mix(self, counts: Tensor) -> tuple[Mix, Tensor] | None:
        """The same edit as a mix over labels 0..3, for kernels, and the samples that it may change, bool ``[B]``.

        None (the default) where a mix cannot say what :meth:`scales` says.
        """
        return None


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
