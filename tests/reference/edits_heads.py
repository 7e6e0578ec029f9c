"""Edits of single heads and columns on explicit weights: AD-HH, the head gate, ACT; SoFA's union mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.reference.llava import Dense

Heads = Any


class Adhh(Dense):
    """Weights on text after the image become 0 in listed heads of the last row, where they sum to enough."""

    def __init__(self, model: nn.Module, heads: Heads, threshold: float = 0.4, renormalise: bool = False) -> None:
        super().__init__(model)
        self.chosen = {tuple(pair) for pair in heads}
        self.threshold, self.renormalise = threshold, renormalise
        self.margin = 1.0

    def edit_weights(self, layer: int, weights: Tensor, prefill: bool) -> Tensor:
        """One head at a time; generated tokens are text after the image."""
        if not self.visual.any():
            return weights
        out = weights.clone()
        end = int(self.visual.nonzero()[-1, 0])
        for head in range(self.heads):
            if (layer, head) not in self.chosen:
                continue
            row = out[head, -1]
            mass = float(row[end + 1 :].sum())
            self.margin = min(self.margin, abs(mass - self.threshold))
            if mass >= self.threshold:
                row[end + 1 :] = 0
                if self.renormalise:
                    row /= row.sum()
        return out


class HeadGate(Dense):
    """Listed heads lose keys, or have their outputs scaled."""

    def __init__(self, model: nn.Module, heads: Heads, mode: str = "amplify", alpha: float = 2.0,
                 drop: str = "visual", where: str = "last") -> None:  # fmt: skip
        super().__init__(model)
        self.chosen = {tuple(pair) for pair in heads}
        self.mode, self.alpha, self.drop, self.where = mode, alpha, drop, where

    def edit_weights(self, layer: int, weights: Tensor, prefill: bool) -> Tensor:
        """The rest of the row is renormalised."""
        if self.mode != "block" or self.drop == "output" or not self.visual.any():
            return weights
        out = weights.clone()
        first = int(self.visual.nonzero()[0, 0])
        keys = weights.shape[2]
        lost = torch.zeros(keys, dtype=torch.bool)
        if self.drop == "visual":
            lost[: len(self.visual)] = self.visual
        else:
            lost[:first] = True
        rows, past = weights.shape[1], keys - weights.shape[1]
        for head in range(self.heads):
            for row in range(rows):
                position = past + row
                is_text = position > first and not (position < len(self.visual) and self.visual[position])
                if (layer, head) in self.chosen and (row == rows - 1 if self.where == "last" else is_text):
                    out[head, row, lost] = 0
                    out[head, row] /= out[head, row].sum()
        return out

    def edit_heads(self, layer: int, outputs: Tensor, prefill: bool) -> Tensor:
        """Amplified by alpha, or closed."""
        if not self.visual.any() or (self.mode == "block" and self.drop != "output"):
            return outputs
        out = outputs.clone()
        for head in range(self.heads):
            if (layer, head) in self.chosen:
                out[head] = outputs[head] * (self.alpha if self.mode == "amplify" else 0.0)
        return out


class Act(Dense):
    """Sinks from column means of the prompt's own map; weights move from them to the rest of each row."""

    def __init__(self, model: nn.Module, heads: Heads, beta: float = 0.4, theta_mode: str = "alpha_over_n",
                 alpha: float = 5.0, theta: float = 0.1, first_layer: int = 2,
                 scope: str = "all") -> None:  # fmt: skip
        super().__init__(model)
        self.chosen = None if heads == "all" else {tuple(pair) for pair in heads}
        self.beta, self.mode, self.alpha, self.theta, self.scope = beta, theta_mode, alpha, theta, scope
        self.layers = range(first_layer, self.depth - 1)
        self.margin = 1.0
        self.found = 0

    def run(self, ids: Tensor, features: Tensor | None, forced: list[int] | Tensor = ()) -> Tensor:
        """See `Dense.run`."""
        self.sinks: dict[tuple[int, int], list[int]] = {}
        return super().run(ids, features, forced)

    def detect(self, layer: int, head: int, a: Tensor) -> list[int]:
        """Keys with a large column mean, the first one left out; a hidden (pruned) key or row does not count."""
        hidden = self.hidden_keys(layer, len(a))
        alive = [k for k in range(len(a)) if hidden is None or not hidden[k]]
        found = []
        limit = self.alpha / len(alive) if self.mode == "alpha_over_n" else self.theta
        for k in alive[1:]:
            rows = [i for i in alive if i >= k]
            mean = float(sum(a[i, k] for i in rows)) / len(rows)
            self.margin = min(self.margin, abs(mean - limit))
            is_visual = bool(self.visual[k])
            if mean > limit and (self.scope == "all" or is_visual == (self.scope == "visual")):
                found.append(k)
        return found

    def edit_weights(self, layer: int, weights: Tensor, prefill: bool) -> Tensor:
        """Row by row; in decoding the sinks are those of the prompt."""
        if layer not in self.layers:
            return weights
        out = weights.clone()
        for head in range(self.heads):
            if self.chosen is not None and (layer, head) not in self.chosen:
                continue
            if prefill:
                self.sinks[layer, head] = self.detect(layer, head, weights[head])
            sinks = self.sinks[layer, head]
            self.found += len(sinks)
            rest = [k for k in range(weights.shape[2]) if k not in sinks]
            for row in range(weights.shape[1]):
                a = weights[head, row]
                if a[rest].sum() == 0:
                    continue  # nothing could receive the weight
                mass = a[sinks].sum()
                out[head, row, sinks] = self.beta * a[sinks]
                out[head, row, rest] = a[rest] + (1 - self.beta) * mass * a[rest] / a[rest].sum()
        return out


class Sofa(Dense):
    """Image rows see later images: a mask of weights before normalising, or a mix of two softmaxes."""

    def __init__(self, model: nn.Module, sigma: float = 0.5, layer_stride: int = 2, layer_offset: int = 0,
                 mode: str = "weight", intra_image: bool = False) -> None:  # fmt: skip
        super().__init__(model)
        self.layers = range(layer_offset, self.depth, layer_stride)
        self.sigma, self.mode, self.intra = sigma, mode, intra_image

    def image_of(self, keys: int) -> list[int]:
        """Image of each key, -1 for text."""
        image, out = -1, []
        for k in range(keys):
            is_visual = k < len(self.visual) and bool(self.visual[k])
            if is_visual and (k == 0 or not self.visual[k - 1]):
                image += 1
            out.append(image if is_visual else -1)
        return out

    def see(self, layer: int, visible: Tensor, prefill: bool) -> Tensor | None:
        """Factors of `exp(score)`."""
        if layer not in self.layers or not prefill:
            return None
        image = self.image_of(visible.shape[1])
        hidden = self.hidden_keys(layer, visible.shape[1])
        factors = visible.float()
        for i in range(visible.shape[0]):
            for j in range(i + 1, visible.shape[1]):
                later = image[j] > image[i] or (self.intra and image[j] == image[i])
                gone = hidden is not None and bool(hidden[i] | hidden[j])
                if image[i] >= 0 and later and not visible[i, j] and not gone:
                    factors[i, j] = 1.0 if self.mode == "output" else self.sigma
        self.plain = visible
        return factors

    def edit_weights(self, layer: int, weights: Tensor, prefill: bool) -> Tensor:
        """`mode="output"`: the mix of outputs is the mix of weights."""
        if self.mode != "output" or layer not in self.layers or not prefill:
            return weights
        causal = torch.where(self.plain, weights, 0.0)
        causal = causal / causal.sum(-1, keepdim=True)
        return (1 - self.sigma) * causal + self.sigma * weights
