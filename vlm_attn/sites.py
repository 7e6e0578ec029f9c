"""What a Prune method says and sees: readings, sites, the view at a site, merged hidden states."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

if TYPE_CHECKING:
    from .encoder_view import EncoderView, Picture
    from .latency import Latency
    from .tokens import TokenMap


@dataclass(frozen=True)
class RowScore:
    """An attention reading that the engine takes on the way: head-mean weights of chosen rows at one layer.

    A score of the layer before which tokens leave is read ahead: the layer runs dry up to its attention.

    Attributes:
        layer: decoder layer, 0-based.
        rows: the query rows: ``last`` of the prompt, ``text`` with a picture before it, ``visual``, ``all``, or a set
            of that name from :meth:`vlm_attn.stages.Prune.rows`.
        over: mean or sum over the rows.
        heads: only this many heads, those whose rows put most mass on the picture; None = all.
        rope: ``on``; ``free``: before the rotary embedding, softmax over visual keys alone; ``ones``: weights divided
            by what RoPE leaves of all-ones vectors at their distance, clamped at 0.1.
        per_head: leave the heads apart, ``[B, H, N]``.
    """

    layer: int
    rows: str = "last"
    over: Literal["mean", "sum"] = "mean"
    heads: int | None = None
    rope: Literal["on", "free", "ones"] = "on"
    per_head: bool = False

    @property
    def id(self) -> str:
        """Name of the reading in profiles."""
        parts = [f"{self.rows}_row@{self.layer}"]
        parts += ["sum"] if self.over == "sum" else []
        parts += [f"{self.heads}_heads"] if self.heads is not None else []
        parts += [f"rope_{self.rope}"] if self.rope != "on" else []
        parts += ["per_head"] if self.per_head else []
        return "-".join(parts)


@dataclass(frozen=True)
class Site:
    """Where visual tokens leave: before decoder layer ``layer`` (0 = at the language model's input).

    ``score`` is a reading to take, ``hidden`` asks for the hidden states that arrive there.
    """

    layer: int
    score: RowScore | None = None
    hidden: bool = False


@dataclass(frozen=True)
class PruneView:
    """What a Prune method sees at one site.

    Attributes:
        site: the site that is being decided.
        tokens: roles of the slots that reached it, ``[B, N]``.
        scores: fp32 ``[B, N]`` reading asked for by the site (``[B, H, N]`` with heads apart), or None.
        visible: bool ``[B, N]``, False at visual tokens that show only padding (None when nobody asked).
        encoder: the vision encoder at the layer that :attr:`vlm_attn.stages.Prune.encoder_layer` names, or None.
        hidden: ``[B, N, D]`` hidden states that arrive (at layer 0: projected features and text embeddings), or None.
        heads: bool ``[B, H]``, the heads that were live in the layer that was read; None = all.
        questions: the user's question of each sample as text, for methods that asked for it.
        latency: prefill times measured when the method was attached, for budgets in time.
        memory: the method's own notes about this request, for methods that add up over stages.
    """

    site: Site
    tokens: TokenMap
    scores: Tensor | None
    visible: Tensor | None
    hidden: Tensor | None = None
    encoder: EncoderView | None = None
    heads: Tensor | None = None
    questions: tuple[str, ...] = ()
    latency: Latency | None = None
    memory: dict[str, Any] = field(default_factory=dict)

    @property
    def vision(self) -> EncoderView:
        """``encoder``, for methods that asked for it."""
        if self.encoder is None:
            raise ValueError("the vision encoder was not asked for: set encoder_layer")
        return self.encoder

    @property
    def features(self) -> Tensor:
        """``hidden``, for sites that asked for it."""
        if self.hidden is None:
            raise ValueError("hidden states were not asked for: Site(layer, hidden=True)")
        return self.hidden


@dataclass(frozen=True)
class EncoderStep:
    """One picture after the attention of one layer of the vision encoder.

    Attributes:
        layer: encoder layer, 0-based.
        layers: layers up to and with the one whose output are the features.
        total: patches that the picture had.
        picture: queries, keys and values of this layer over the ``n`` patches left; its features are their hidden
            states ``[n, d_v]``.
        sizes: patches that each one stands for, fp32 ``[n]``.
        memory: the method's own notes about this picture.
    """

    layer: int
    layers: int
    total: int
    picture: Picture
    sizes: Tensor
    memory: dict[str, Any]


@dataclass(frozen=True)
class Shrunk:
    """Patches that stay: ascending indices ``[k]``, hidden states ``[n, d_v]`` that they shall hold and the patches
    they stand for ``[n]`` (None = as they were). A size other than 1 adds its logarithm to the patch's logits.
    """

    keep: Tensor
    hidden: Tensor | None = None
    sizes: Tensor | None = None


@dataclass(frozen=True)
class Merged:
    """A keep mask together with the hidden states that the kept slots shall hold (None = as they were)."""

    keep: Tensor
    hidden: Tensor | None
