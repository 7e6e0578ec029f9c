"""Attention readings for pruning: chosen rows at chosen layers, reduced to one number per key. No matrix is held."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import ops
from .attention.call import Call
from .attention.rows import chunks
from .errors import UnsupportedError
from .kit.selectors import by_rank
from .request import Request
from .stages import Prune, RowScore, Site
from .tokens import TokenMap

Tables = tuple[Tensor, Tensor]
FLOOR = 0.1  # lower clamp of the all-ones gain, which changes sign at long distances
HIDE = -1e30
TABLES = "rotary tables"


class Readings:
    """The sites of a pruning method and what they read. Holds no request state."""

    def __init__(self, prune: Prune | None):
        self.prune = prune
        self.sites: dict[int, Site] = {s.layer: s for s in prune.sites()} if prune else {}
        self.scores = tuple(dict.fromkeys(s.score for s in self.sites.values() if s.score is not None))

    def begin(self, request: Request, embeds: Tensor | None) -> None:
        """Row sets of the prompt that enters the decoder with input embeddings ``[B, N, D]``."""
        for name in dict.fromkeys(score.rows for score in self.scores):
            request.rows[name] = self._rows(name, request.tokens, embeds)

    def _rows(self, name: str, tokens: TokenMap, embeds: Tensor | None) -> Tensor:
        if name == "last":
            last = torch.zeros_like(tokens.valid)
            last[:, -1] = True
            return last
        if name in ("text", "visual", "all"):
            return {"text": tokens.sees_image, "visual": tokens.vis, "all": tokens.valid}[name]
        if self.prune is None or embeds is None:
            raise UnsupportedError(f"the rows '{name}' need the input embeddings, which this model does not show")
        return self.prune.rows(name, tokens, embeds)

    def own(self, layer: int) -> list[RowScore]:
        """The score of a layer that its own site asks for: read off the layer's input before tokens leave there."""
        site = self.sites.get(layer)
        return [site.score] if site is not None and site.score is not None and site.score.layer == layer else []

    def bare(self, layer: int) -> list[RowScore]:
        """Scores without rotary embedding that later sites ask for: read off the input the layer runs on."""
        return [s for s in self.scores if s.layer == layer and s.rope == "free" and s not in self.own(layer)]

    def ahead(self) -> list[int]:
        """The layers that run dry."""
        return [layer for layer in sorted({s.layer for s in self.scores}) if self.own(layer) or self.bare(layer)]

    def passing(self, layer: int) -> list[RowScore]:
        """Scores of a layer that are read while it runs."""
        return [s for s in self.scores if s.layer == layer and s.rope != "free" and s not in self.own(layer)]

    def wants_tables(self, layer: int) -> bool:
        """Whether a score of this layer needs the rotary tables."""
        return any(s.layer == layer and s.rope == "ones" for s in self.scores)

    def take(self, scores: Sequence[RowScore], call: Call, request: Request, tables: Any = None) -> None:
        """Reads scores off one attention call over the whole prompt."""
        for score in scores:
            rows = self._counted(score, request)
            request.scores[score] = read(score, call, rows, request.tokens_at(score.layer).vis, tables)

    def index(self, score: RowScore, request: Request) -> Tensor:
        """The query rows ``[R]`` that a score needs of some sample."""
        return self._counted(score, request).any(0).nonzero()[:, 0]

    @staticmethod
    def _counted(score: RowScore, request: Request) -> Tensor:
        tokens = request.tokens_at(score.layer)
        return request.rows[score.rows].gather(1, tokens.index) & tokens.valid


def read(score: RowScore, call: Call, rows: Tensor, visual: Tensor, tables: Any = None) -> Tensor:
    """One reading, fp32 ``[B, N]``, or ``[B, H, N]`` with heads apart.

    Args:
        call: attention of the layer, prefill.
        rows: bool ``[B, N]``, the query rows that count in each sample.
        visual: bool ``[B, N]``.
        tables: rotary (cos, sin) ``[B or 1, N, d]`` of the slots, for ``rope="ones"``.
    """
    index, heads = rows.any(0).nonzero()[:, 0], call.query.shape[1]
    free = score.rope == "free"
    if call.plain and score.rope != "ones" and call.query.dtype in ops.DTYPES:
        lse, shown = (None, visual) if free else (call.lse, None)
        total = ops.key_mass(call.query, call.key, index, call.scaling, lse, shown, gate=rows[:, index])
    else:
        if free:
            hidden = torch.zeros(visual.shape, device=visual.device).masked_fill_(~visual, HIDE)[:, None]
            call = replace(call, bias=hidden if call.bias is None else call.bias + hidden)
        total = _summed(score, call, rows, index, tables)
    if score.heads is not None and score.heads < heads:
        best = by_rank((total * visual[:, None]).sum(-1))[:, : score.heads]
        total = total.gather(1, best[..., None].expand(*best.shape, total.shape[-1]))
    if score.over == "mean":
        total = total / rows.sum(1).clamp(min=1)[:, None, None]
    return total if score.per_head else total.mean(1)


def _summed(score: RowScore, call: Call, rows: Tensor, index: Tensor, tables: Any) -> Tensor:
    """Weights of the counted rows, each over its gain, summed per head: fp32 ``[B, H, N]``."""
    batch, heads = call.query.shape[:2]
    total = torch.zeros(batch, heads, call.keys, device=rows.device)
    for part in chunks(index, batch, heads, call.keys):
        weights = call.weights(part)
        if score.rope == "ones":
            weights = weights / _gain(tables, part)[:, None]
        total += (rows[:, None, None, part].float() @ weights)[:, :, 0]
    return total


def _gain(tables: Any, rows: Tensor) -> Tensor:
    """``R(q - s) / R(0)`` clamped from below, fp32 ``[B or 1, R, N]``, from the rotary tables of the slots.

    ``sum_j cos((q - s) theta_j)`` is the inner product of the table rows of q and s, whatever the base and scaling.
    """
    if not isinstance(tables, tuple) or tables[0].dim() != 3:
        raise UnsupportedError("rope_ones needs one rotary position per token: it is not defined for this family")
    cos, sin = (t.float() for t in tables)
    inner = cos[:, rows] @ cos.transpose(1, 2) + sin[:, rows] @ sin.transpose(1, 2)
    return (inner / (cos[:, :1].square() + sin[:, :1].square()).sum(-1, keepdim=True)).clamp(min=FLOOR)
