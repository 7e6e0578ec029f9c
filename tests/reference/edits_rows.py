"""Edits of the last row that need several heads: GIFT."""

from __future__ import annotations

import itertools
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
        plain = Map(self.model, self.source)
        plain.run(ids[:-1], features)
        self.prepare(ids, plain.map)
        return super().run(ids, features, forced)

    def prepare(self, ids: Tensor, attention: Tensor) -> None:
        """Saliency from the unedited attention `[H, n, n]` of the source layer."""
        self.margin = 1.0
        visual = self.find_visual(ids)
        end = int(visual.nonzero()[-1, 0]) + 1
        default = list(range(end, len(ids) - self.suffix))
        self.question = default if self.given_question is None else self.given_question
        content = self.question if self.given is None else self.given
        looked = attention[:, :, visual[: attention.shape[2]]]
        shift = torch.stack([(looked[:, i] - looked[:, i - 1]).clamp(min=0) for i in content])
        heads, gap = top_heads([float(shift[:, h].sum()) for h in range(self.heads)], self.fraction)
        self.margin = min(self.margin, gap)
        self.saliency = normalised(shift[:, heads].mean((0, 1)), self.sigma)

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


class Look(Dense):
    """An unedited greedy draft: what the newest row of each step and the prompt's rows look at."""

    def __init__(self, model: nn.Module, layers: range) -> None:
        super().__init__(model)
        self.wanted = layers
        self.prompt: dict[int, Tensor] = {}
        self.steps: list[dict[int, Tensor]] = []

    def edit_weights(self, layer: int, weights: Tensor, prefill: bool) -> Tensor:
        """Reads only."""
        if prefill:
            self.prompt[layer] = weights.mean(0)
        else:
            self.steps[-1][layer] = weights[:, 0]
        return weights

    def draft(self, ids: Tensor, features: Tensor | None, tokens: int) -> None:
        """Greedy."""
        logits = self.run(ids, features)[0]
        for _ in range(tokens - 1):
            self.steps.append({})
            logits = self._forward(self.lm.embed_tokens(logits.argmax()[None]).float(), prefill=False)


class Ilvad(Dense):
    """Evidence from a draft, then visual and text keys of the last row reweighted head by head."""

    def __init__(self, model: nn.Module, alpha: float = 5.0, beta: float = 1.0, text: float = 1.0, draft: int = 10,
                 tau: float = 5.0, first_layer: int = 0, end_layer: int | None = None, head_fraction: float = 0.5,
                 prompt_row: bool = True) -> None:  # fmt: skip
        super().__init__(model)
        self.alpha, self.beta, self.text, self.count, self.tau = alpha, beta, text, draft, tau
        self.layers = range(first_layer, self.depth - 1 if end_layer is None else end_layer)
        self.fraction, self.prompt_row = head_fraction, prompt_row

    def run(self, ids: Tensor, features: Tensor | None, forced: list[int] | Tensor = ()) -> Tensor:
        """See `Dense.run`; the draft is a run of its own."""
        look = Look(self.model, self.layers)
        look.draft(ids, features, self.count)
        self.prepare(ids, look.prompt, look.steps)
        return super().run(ids, features, forced)

    def prepare(self, ids: Tensor, prompt: dict[int, Tensor], steps: list[dict[int, Tensor]]) -> None:
        """Evidence from an unedited draft: head-mean weights of the prompt, weights `[H, keys]` of every step."""
        self.margin = 1.0
        visual = self.find_visual(ids).nonzero()[:, 0].tolist()
        attention = []
        for layer in self.layers:
            total = torch.zeros(len(visual))
            for step in steps:
                row = step[layer]
                heads, gap = top_heads([float(row[h, visual].sum()) for h in range(self.heads)], self.fraction)
                self.margin = min(self.margin, gap)
                total += row[heads][:, visual].mean(0)
            attention.append(total / len(steps))
        evidence = torch.zeros(len(visual))
        for j in range(len(visual)):
            flags = []
            for a in attention:
                self.margin = min(self.margin, abs(float(a[j]) / float(a.mean()) - self.tau))
                flags.append(float(a[j]) > self.tau * float(a.mean()))
            evidence[j] = sum(not one and two for one, two in itertools.pairwise(flags))
            mean = torch.stack(attention).mean(0)
            self.margin = min(self.margin, abs(float(mean[j]) / float(mean.mean()) - 1))
            if mean[j] <= mean.mean():
                evidence[j] = 0
        self.evidence = normalised(evidence, 3.0)
        self.behind = list(range(visual[-1] + 1, len(ids)))
        self.paid = [sum(float(prompt[n][i, visual] @ self.evidence) for n in self.layers) for i in self.behind]
        self.start = len(ids)

    def edit_weights(self, layer: int, weights: Tensor, prefill: bool) -> Tensor:
        """Only the last row."""
        if layer not in self.layers or (prefill and not self.prompt_row):
            return weights
        visual = self.visual.nonzero()[:, 0].tolist()
        row, out = weights[:, -1], weights.clone()
        keys = [*self.behind, *range(self.start, weights.shape[2])]
        self.paid += [0.0] * (len(keys) - len(self.paid))
        if not prefill:
            self.paid[-1] += float((row[:, visual] @ self.evidence).mean())
        low, high = min(self.paid), max(self.paid)
        share = [(p - low) / (high - low) if high > low else 0.0 for p in self.paid]
        ratios = [float(row[h, visual] @ self.evidence) / float(row[h, visual].sum()) for h in range(self.heads)]
        proving, gap = top_heads(ratios, self.fraction)
        if min(ratios[h] for h in proving) > 0:  # a head that sees no evidence is left as it is, chosen or not
            self.margin = min(self.margin, gap)
        for h in proving:
            out[h, -1, visual] = row[h, visual] * torch.exp(self.alpha * self.evidence)
        reading, gap = top_heads([float(row[h, keys].sum()) for h in range(self.heads)], self.fraction)
        self.margin = min(self.margin, gap)
        for h in reading:
            for key, w in zip(keys, share, strict=True):
                out[h, -1, key] = row[h, key] * (self.text * w + self.beta)
        out[:, -1] /= out[:, -1].sum(-1, keepdim=True)
        return out
