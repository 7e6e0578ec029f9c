"""Records attention rows at chosen layers while the model runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..attention.call import Call


class Recorder:
    """Head-mean post-softmax weights of the newest query row (or the mean over given rows), one entry per forward.

    Attributes:
        layers: decoder layers to read.
        query_rows: query rows ``[R]`` to average instead of the newest one (single forwards only).
        rows: per layer, a list over forwards of fp32 ``[B, N]`` weights on all keys of that forward.
        media: features that the model computed meanwhile, by kind.
    """

    def __init__(self, layers: Iterable[int], rows: Tensor | None = None):
        self.layers = frozenset(layers)
        self.query_rows = rows
        self.rows: dict[int, list[Tensor]] = {layer: [] for layer in sorted(self.layers)}
        self.media: dict[str, Any] = {}

    def take(self, layer: int, call: Call) -> None:
        """Called by the engine after each attention call of a recorded layer."""
        rows = self.query_rows
        if rows is None:
            rows = torch.tensor([call.queries - 1], device=call.query.device)
        self.rows[layer].append(call.weights(rows).mean((1, 2)))

    def on(self, slots: Tensor, row: int = 0) -> Tensor:
        """Weights of one sample on the key positions ``slots [n]``: fp32 ``[steps, layers, n]``."""
        layers = [torch.stack([step[row, slots] for step in self.rows[layer]]) for layer in sorted(self.layers)]
        return torch.stack(layers, dim=1)
