"""Edits of the last row that need several heads: GIFT."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.reference.llava import Dense


def top_heads(values: list[float], fraction: float) -> tuple[list[int], float]:
    """The heads with the largest values, and the relative gap at the cut."""
    count = max(1, int(fraction * len(values)))
    order = sorted(range(len(values)), key=lambda h: -values[h])
    gap = 1.0 if count == len(values) else (values[order[count - 1]] - values[order[count]]) / max(max(values), 1e-12)
    return order[:count], gap


def normalised(values: Tensor, sigma: float) -> Tensor:
    """Clamp at `sigma` standard deviations, then 0 to 1."""
    mean, std = values.mean(), values.std(unbiased=True)
    clamped = torch.stack([min(max(v, mean - sigma * std), mean + sigma * std) for v in values])
    if clamped.max() == clamped.min():
        return torch.zeros_like(values)
    return (clamped - clamped.min()) / (clamped.max() - clamped.min())


class Map(Dense):
    """An unedited prompt: attention `[H, n, n]` of one layer."""

    def __init__(self, model: nn.Module, layer: int) -> None:
        super().__init__(model)
        self.layer = layer

    def edit_weights(self, layer: int, weights: Tensor, prefill: bool) -> Tensor:
        """Reads only."""
        if prefill and layer == self.layer:
            self.map = weights.clone()
        return weights


class Gift(Dense):
    """Visual keys by saliency, question keys by the pooled gain, last row renormalised."""

    def __init__(self, model: nn.Module, saliency_layer: int, enhance_layers: Any, alpha: float = 5.0,
                 beta: float | None = 1.0, head_fraction: float = 0.5, clamp_sigma: float = 3.0,
                 content_only: bool = False, suffix_tokens: int = 1, content: list[int] | None = None,
                 question: list[int] | None = None) -> None:  # fmt: skip
        super().__init__(model)
        self.source, self.layers = saliency_layer, set(enhance_layers)
        self.alpha, self.beta, self.fraction, self.sigma = alpha, beta, head_fraction, clamp_sigma
        self.suffix, self.given, self.given_question = suffix_tokens, content, question

    def run(self, ids: Tensor, features: Tensor | None, forced: list[int] | Tensor = ()) -> Tensor:
        """See `Dense.run`; the map comes from a pass of its own without the last prompt token."""
        self.margin = 1.0
        visual = self.find_visual(ids)
        end = int(visual.nonzero()[-1, 0]) + 1
        default = list(range(end, len(ids) - self.suffix))
        self.question = default if self.given_question is None else self.given_question
        content = self.question if self.given is None else self.given
        plain = Map(self.model, self.source)
        plain.run(ids[:-1], features)
        shift = torch.stack([
            (plain.map[:, i][:, visual[:-1]] - plain.map[:, i - 1][:, visual[:-1]]).clamp(min=0) for i in content
        ])  # fmt: skip
        heads, gap = top_heads([float(shift[:, h].sum()) for h in range(self.heads)], self.fraction)
        self.margin = min(self.margin, gap)
        self.saliency = normalised(shift[:, heads].mean((0, 1)), self.sigma)
        return super().run(ids, features, forced)

    def edit_weights(self, layer: int, weights: Tensor, prefill: bool) -> Tensor:
        """Only the last row."""
        if layer not in self.layers:
            return weights
        out = weights.clone()
        row = weights[:, -1]
        visual = self.visual.nonzero()[:, 0].tolist()
        looking, gap = top_heads([float(row[h, visual].sum()) for h in range(self.heads)], self.fraction)
        self.margin = min(self.margin, gap)
        before = after = 0.0
        for h in looking:
            before += float(row[h, visual].sum())
            out[h, -1, visual] = row[h, visual] * torch.exp(self.alpha * self.saliency)
            after += float(out[h, -1, visual].sum())
        if self.beta is not None:
            reading, gap = top_heads([float(row[h, self.question].sum()) for h in range(self.heads)], self.fraction)
            self.margin = min(self.margin, gap)
            for h in reading:
                out[h, -1, self.question] = row[h, self.question] * self.beta * after / before
        out[:, -1] /= out[:, -1].sum(-1, keepdim=True)
        return out
