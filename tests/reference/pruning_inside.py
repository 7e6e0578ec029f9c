"""Pruning inside a CLIP encoder, spelled out patch by patch: lists of tokens that shrink from layer to layer.

The encoder is run literally, one picture at a time, on the tokens that are left.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.reference import kit as loops
from tests.reference.kit import Vector
from tests.reference.pruning import budget
from tests.reference.pruning_stages import Staged


@dataclass
class Token:
    """One token on its way: the patch whose place it has (-1 = class token), its state, how many it stands for."""

    place: int
    state: Tensor
    size: float = 1.0
    score: float = math.nan


@dataclass
class Layer:
    """What one layer's attention showed, per head: weights, keys, values over the tokens."""

    weights: Tensor
    keys: Tensor
    values: Tensor


class Inside(Staged):
    """The tower run by hand; `cut(layer, tokens, seen)` says what is left after a layer."""

    between = False
    cuts: tuple[int, ...] = (0,)

    def __init__(self, model: Any, positions: str = "renumber", **params: Any) -> None:
        super().__init__(model, self.cuts)
        self.renumber = positions == "renumber"
        self.params = params
        self.tower = model.base_model.vision_tower
        self.projector = model.base_model.multi_modal_projector
        self.blocks = list(self.tower.encoder.layers)
        self.last = len(self.blocks) + model.config.vision_feature_layer  # its output are the features

    def cut(self, layer: int, tokens: list[Token], seen: Layer) -> list[Token]:
        """Tokens that go on, the class token first."""
        raise NotImplementedError

    def run(self, ids: Tensor, features: Tensor | None, forced: list[int] | Tensor = ()) -> Tensor:
        """See `Dense.run`."""
        with torch.no_grad():
            self.encoded = [self.encode(picture) for picture in self.pixels]
        return super().run(ids, features, forced)

    def encode(self, pixels: Tensor) -> list[Token]:
        """Patches that come out of the encoder."""
        x = self.tower.pre_layrnorm(self.tower.embeddings(pixels[None]))[0]
        tokens = [Token(i - 1, row) for i, row in enumerate(x)]
        self.total = len(tokens) - 1
        for layer in range(self.last + 1):
            block = self.blocks[layer]
            attended, seen = self.attend(block, tokens)
            for token, row in zip(tokens, attended, strict=True):
                token.state = token.state + row
            if self.between:
                tokens = self.cut(layer, tokens, seen)
            for token in tokens:
                token.state = token.state + block.mlp(block.layer_norm2(token.state[None, None]))[0, 0]
            if not self.between:
                tokens = self.cut(layer, tokens, seen)
        return [token for token in tokens if token.place >= 0]

    def attend(self, block: Any, tokens: list[Token]) -> tuple[Tensor, Layer]:
        """Output of the attention with `log(size)` on the logits, and what it showed."""
        attention = block.self_attn
        x = block.layer_norm1(torch.stack([token.state for token in tokens]))
        heads = attention.num_heads

        def split(linear: Any) -> Tensor:
            return linear(x).view(len(tokens), heads, -1).transpose(0, 1)

        q, k, v = split(attention.q_proj), split(attention.k_proj), split(attention.v_proj)
        logits = q @ k.transpose(1, 2) / k.shape[-1] ** 0.5
        weights = (logits + torch.tensor([math.log(token.size) for token in tokens])).softmax(-1)
        out = attention.out_proj((weights @ v).transpose(0, 1).reshape(len(tokens), -1))
        return out, Layer(logits.softmax(-1), k, v)

    def decide(self, layer: int, x: Tensor) -> list[Tensor]:
        """See `Staged.decide`."""
        out = []
        for image, tokens in zip(self.alive, self.encoded, strict=True):
            left = sorted(tokens, key=lambda token: token.place)
            places = image[[token.place for token in left]]
            x[places] = self.projector(torch.stack([token.state for token in left]))
            out.append(places)
        return out

    def near(self, values: Vector, k: int) -> None:
        """Remembers how close the k-th and the next of ranked values are."""
        order = sorted(values, reverse=True)
        if 0 < k < len(order):
            self.margin = min(self.margin, (order[k - 1] - order[k]) / max(abs(order[0]), abs(order[-1]), 1e-12))


class ToMe(Inside):
    """Bipartite soft matching between attention and MLP."""

    between = True

    def cut(self, layer: int, tokens: list[Token], seen: Layer) -> list[Token]:
        """See `Inside.cut`."""
        patches = len(tokens) - 1
        r = self.params.get("r")
        if r is None:
            surplus = patches - budget(self.params.get("keep", 0.2223), self.total)
            r = math.ceil(max(surplus, 0) / (self.last + 1 - layer))
        metric = loops.rows_of(seen.keys.mean(0))
        a, b = range(2, len(tokens), 2), range(1, len(tokens), 2)
        best, likeness = [], {}
        for i in a:
            likeness[i] = [(loops.cosine(metric[i], metric[j]), -j) for j in b]
            best.append((max(likeness[i])[0], -i, -max(likeness[i])[1]))
        best.sort(reverse=True)
        self.near([value for value, _, _ in best], r)
        groups: dict[int, list[int]] = {j: [j] for j in b}
        merged = set()
        for _, minus, j in best[:r]:
            self.near([value for value, _ in likeness[-minus]], 1)
            groups[j].append(-minus)
            merged.add(-minus)
        out = []
        for i, token in enumerate(tokens):
            if i in groups and len(groups[i]) > 1:
                members = [tokens[m] for m in groups[i]]
                size = sum(m.size for m in members)
                token = Token(token.place, sum(m.size * m.state for m in members) / size, size)  # type: ignore[arg-type]
            if i not in merged:
                out.append(token)
        return out


class FlowCut(Inside):
    """Information flow, a running score, more dropped the sharper the class token looks."""

    def cut(self, layer: int, tokens: list[Token], seen: Layer) -> list[Token]:
        """See `Inside.cut`."""
        remaining = self.last - 1 - layer
        if remaining < 0:
            return tokens
        heads, n = seen.weights.shape[0], len(tokens) - 1
        alpha = [loops.mean([float(seen.weights[h, 0, 1 + i]) for h in range(heads)]) for i in range(n)]
        values = seen.values.double()
        betas = [loops.softmax([float(values[h, 0] @ values[h, 1 + i]) for i in range(n)]) for h in range(heads)]
        beta = [loops.mean([row[i] for row in betas]) for i in range(n)]
        for i, token in enumerate(tokens[1:]):
            strength = float(values[:, 1 + i].mean(0).abs().sum())
            s = (alpha[i] / sum(alpha) + beta[i] / sum(beta)) * strength
            token.score = s if math.isnan(token.score) else 0.5 * token.score + 0.5 * s
        target = budget(self.params.get("keep", 0.2223), self.total)
        if n <= target or remaining % 2:
            return tokens
        drop = n - target
        if remaining:
            p = [a / sum(alpha) for a in alpha]
            entropy = -sum(x * math.log(x) for x in p)
            exact = drop / math.sqrt(remaining) * (1 - (entropy / math.log(n)) ** 2)
            self.margin = min(self.margin, abs(exact - math.floor(exact) - 0.5))
            drop = round(exact)
        scores = [token.score for token in tokens[1:]]
        self.near(scores, n - drop)
        kept = sorted(loops.ranked(scores)[: n - drop])
        return [tokens[0], *(tokens[1 + i] for i in kept)]


class ILLaVA(Inside):
    """The lowest fold into one by a ramp: in the encoder by attention received, in the decoder by the last row."""

    def __init__(self, model: Any, layer: int | None = None, **params: Any) -> None:
        self.layer = layer or max(1, round(8 / 28 * len(model.get_decoder().layers)))
        self.cuts = (0, self.layer)
        super().__init__(model, "keep", **params)

    def fold(self, scores: Vector, drop: int) -> tuple[list[int], list[int], Vector]:
        """The lowest, best first, the slot they share, their weights."""
        self.near(scores, len(scores) - drop - 1)
        low = loops.ranked(scores)[len(scores) - drop - 1 :]
        rising = [float(drop + 1 - j) for j in range(drop + 1)]
        return low, [max(low)], [w / sum(rising) for w in rising]

    def cut(self, layer: int, tokens: list[Token], seen: Layer) -> list[Token]:
        """See `Inside.cut`."""
        layers = self.params.get("encoder_layers")
        if layers is None:
            layers = []
            for number in (5, 6, 7, 8):
                carried = round(number / 26 * (self.last + 1))
                while carried in layers:
                    carried += 1
                layers.append(carried)
        given = self.params.get("encoder_drop", 0.1262)
        drop = given if isinstance(given, int) else round(given * self.total)
        drop = min(drop, len(tokens) - 2)
        if layer not in layers or not drop:
            return tokens
        received = seen.weights.double().mean((0, 1))[1:].tolist()
        low, (slot,), weights = self.fold(received, drop)
        state = sum(w * tokens[1 + i].state for i, w in zip(low, weights, strict=True))
        out = [token for i, token in enumerate(tokens[1:]) if i not in low or i == slot]
        tokens[1 + slot].state = state  # type: ignore[assignment]
        return [tokens[0], *out]

    def decide(self, layer: int, x: Tensor) -> list[Tensor]:
        """See `Staged.decide`."""
        if layer == 0:
            return super().decide(layer, x)
        attention = self.weights[layer - 1][:, -1].mean(0)
        out = []
        for image in self.alive:
            drop = len(image) - budget(self.params.get("keep", 0.7), len(image))
            if drop:
                low, (slot,), weights = self.fold([float(attention[p]) for p in image], drop)
                x[image[slot]] = sum(w * x[image[i]] for i, w in zip(low, weights, strict=True))  # type: ignore[assignment]
                image = image[[i for i in range(len(image)) if i not in low or i == slot]]
            out.append(image)
        return out


class SpAtten(Staged):
    """Importance of tokens and heads added up over layers; both leave in cascade."""

    def __init__(
        self,
        model: Any,
        layers: list[int] | None = None,
        keep: int | float = 0.3334,
        keep_heads: float = 0.75,
    ) -> None:
        depth = len(model.get_decoder().layers)
        self.chosen = list(layers or range(2, depth))
        super().__init__(model, self.chosen)
        self.keep, self.keep_heads = keep, keep_heads

    def run(self, ids: Tensor, features: Tensor | None, forced: list[int] | Tensor = ()) -> Tensor:
        """See `Dense.run`."""
        self.mass = torch.zeros(len(ids), dtype=torch.double)
        self.noise = [0.0] * self.heads
        self.live: dict[int, set[int]] = {0: set(range(self.heads))}
        return super().run(ids, features, forced)

    def left(self, keep: int | float, total: int, layer: int) -> int:
        """Count that a layer runs on."""
        done = len([n for n in self.chosen if n <= layer])
        return total - round((total - budget(keep, total)) * done / len(self.chosen))

    def edit_weights(self, layer: int, weights: Tensor, prefill: bool) -> Tensor:
        """Adds up what the live heads give."""
        if prefill:
            rows = ~self.gone
            for head in self.live[layer]:
                self.mass += weights[head].double()[rows].sum(0)
        return super().edit_weights(layer, weights, prefill)

    def edit_heads(self, layer: int, outputs: Tensor, prefill: bool) -> Tensor:
        """Silences heads and adds up what the others say."""
        dead = [h for h in range(self.heads) if h not in self.live[layer]]
        outputs = outputs.clone()
        outputs[dead] = 0
        if prefill:
            rows = ~self.gone
            for head in range(self.heads):
                self.noise[head] += float(outputs[head].double()[rows].abs().sum())
            count = self.left(self.keep_heads, self.heads, layer + 1)
            ordered = sorted(self.noise, reverse=True)
            if count < self.heads:
                self.margin = min(self.margin, (ordered[count - 1] - ordered[count]) / ordered[0])
            self.live[layer + 1] = set(loops.ranked(self.noise)[:count])
        return outputs

    def decide(self, layer: int, x: Tensor) -> list[Tensor]:
        """See `Staged.decide`."""
        return [
            self.top(self.mass, image, min(self.left(self.keep, total, layer), len(image)))
            for image, total in zip(self.alive, self.total, strict=True)
        ]
