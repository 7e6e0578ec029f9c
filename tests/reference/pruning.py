"""Masking forms of token pruning: a dropped token stays in the sequence, and nobody attends to it from layer K on."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tests.reference.llava import Dense, visual_runs


def budget(keep: float | str, count: int, scores: Sequence[float] = ()) -> int:
    """Tokens to keep of `count`: an int is a number per image, a float a share; one survives at least.

    `auto` adds up the largest scores until they hold 99 % of the sum, or the share behind the colon.
    """
    if isinstance(keep, str):
        share, mass = float(keep[5:] or 0.99), 0.0
        for number, score in enumerate(sorted(scores, reverse=True), 1):
            mass += score
            if mass >= share * sum(scores):
                return number
        return count
    wanted = keep if isinstance(keep, int) else round(count * keep)
    return max(1, min(count, wanted))


def exp_trend(count: int, sigma: float) -> Tensor:
    """`w_i = exp(-sigma x_i)`, `x_i = i / (count - 1)`, zero for a single token."""
    if count == 1:
        return torch.ones(1)
    return torch.tensor([math.exp(-sigma * i / (count - 1)) for i in range(count)])


class Masked(Dense):
    """Hides given visual tokens from layer K on; `kept` holds the surviving positions per image."""

    def __init__(self, model: nn.Module, layer: int, kept: list[Tensor] | None = None) -> None:
        super().__init__(model)
        self.layer = layer
        self.kept = kept
        self.dropped: Tensor | None = None

    def run(self, ids: Tensor, features: Tensor | None, forced: list[int] | Tensor = ()) -> Tensor:
        """See `Dense.run`."""
        self.dropped = None
        if self.kept is not None:
            self._drop(ids == self.image_id, self.kept)
        return super().run(ids, features, forced)

    def _drop(self, visual: Tensor, kept: list[Tensor]) -> None:
        self.dropped = visual.clone()
        self.dropped[torch.cat(kept)] = False

    def hidden_keys(self, layer: int, keys: int) -> Tensor | None:
        """Dropped tokens, in layers K and above; generated tokens are never dropped."""
        if self.dropped is None or layer < self.layer:
            return None
        hidden = torch.zeros(keys, dtype=torch.bool)
        hidden[: len(self.dropped)] = self.dropped
        return hidden


class FastV(Masked):
    """Keeps per image the visual tokens which the last prompt row attends to most in layer K - 1 (head mean)."""

    def __init__(
        self,
        model: nn.Module,
        layer: int,
        keep: float | str,
        sigma: float | None = None,
        visible: list[Tensor] | None = None,
        mean: Sequence[float] | None = None,
    ) -> None:
        super().__init__(model, layer)
        self.keep = keep
        self.sigma = sigma
        self.visible = visible
        self.mean = mean
        self.margin = math.inf

    def run(self, ids: Tensor, features: Tensor | None, forced: list[int] | Tensor = ()) -> Tensor:
        """See `Dense.run`."""
        self.kept = None
        return super().run(ids, features, forced)

    def edit_weights(self, layer: int, weights: Tensor, prefill: bool) -> Tensor:
        """Reads the scores in layer K - 1; changes nothing."""
        if prefill and layer == self.layer - 1:
            self.select(weights[:, -1].mean(dim=0))
        return weights

    def select(self, row: Tensor) -> None:
        """Fills `kept` from the last row's head-mean attention `[n]`; `margin` = smallest gap at a cut."""
        kept = []
        for image, positions in enumerate(visual_runs(self.visual)):
            scores = row[positions].clone()
            if self.sigma is not None:
                scores = scores * exp_trend(len(positions), self.sigma)
            if self.mean is not None:
                scores = torch.tensor([float(s) / (m + 1e-7) for s, m in zip(scores, self.mean, strict=True)])
            count = budget(self.keep, len(positions), scores.tolist())
            if self.visible is not None:
                scores = scores * self.visible[image]
                count = min(count, int(self.visible[image].sum()))
            order = sorted(range(len(positions)), key=lambda i: (-float(scores[i]), i))
            if count < len(order):
                gap = float(scores[order[count - 1]] - scores[order[count]])
                self.margin = min(self.margin, gap / max(float(scores.max()), 1e-12))
            kept.append(positions[sorted(order[:count])])
        self.kept = kept
        self._drop(self.visual, kept)


def pad_visible(width: int, height: int, side: int, grid: int, tau: float) -> Tensor:
    """Cells `[grid * grid]` of a picture padded to a square canvas of `side` pixels: 0 where padding exceeds `tau`."""
    cell = side / grid
    longest = max(width, height)
    x0, y0 = (longest - width) / 2 * side / longest, (longest - height) / 2 * side / longest
    x1, y1 = side - x0, side - y0
    flags = []
    for row in range(grid):
        for column in range(grid):
            wide = max(0.0, min((column + 1) * cell, x1) - max(column * cell, x0))
            high = max(0.0, min((row + 1) * cell, y1) - max(row * cell, y0))
            flags.append(float(not 1 - wide * high / cell**2 > tau))
    return torch.tensor(flags)
