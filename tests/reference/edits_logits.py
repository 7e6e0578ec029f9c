"""Edits of attention logits, spelled out on dense rows: PAI, PAINT, VAF, the VAS intervention, ZeroTuning, SoFA.

Each class overrides `edit_logits`: scores `[H, rows, keys]` before mask and softmax in, scores out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.reference.llava import Dense


class Logits(Dense):
    """Attributes that several edits share."""

    layers: range | set[int]

    def last_only(self, rows: int) -> list[int]:
        """The last row of a forward."""
        return [rows - 1]

    def key_flags(self, keys: int, flags: Tensor) -> Tensor:
        """Bool `[keys]`: flags of the prompt, False for generated tokens."""
        out = torch.zeros(keys, dtype=torch.bool)
        out[: len(flags)] = flags
        return out


class Pai(Logits):
    """`z + alpha |z|` on visual keys, last row."""

    def __init__(self, model: nn.Module, alpha: float = 0.2, first_layer: int = 2, end_layer: int | None = None,
                 **_: Any) -> None:  # fmt: skip
        super().__init__(model)
        self.alpha = alpha
        self.layers = range(first_layer, end_layer or self.depth)

    def edit_logits(self, layer: int, z: Tensor, prefill: bool) -> Tensor:
        """One number at a time would do: only the last row changes."""
        if layer not in self.layers or not self.visual.any():
            return z
        out = z.clone()
        for key in self.visual.nonzero()[:, 0].tolist():
            out[:, -1, key] = z[:, -1, key] + self.alpha * z[:, -1, key].abs()
        return out


class Vaf(Logits):
    """Visual keys times `enh`, keys before the image times `sup`, rows after the image."""

    def __init__(self, model: nn.Module, enh: float = 1.15, sup: float = 0.95, layers: Any = None) -> None:
        super().__init__(model)
        self.enh, self.sup = enh, sup
        default = {min(round(n * self.depth / 32), self.depth - 1) for n in range(9, 15)}
        self.layers = default if layers is None else set(layers)

    def rows_of(self, rows: int, keys: int) -> list[int]:
        """Text rows with an image before them."""
        past = keys - rows
        first = int(self.visual.nonzero()[0, 0])
        return [
            i for i in range(rows) if past + i > first and not (past + i < len(self.visual) and self.visual[past + i])
        ]

    def edit_logits(self, layer: int, z: Tensor, prefill: bool) -> Tensor:
        """Scores are multiplied, whatever their sign."""
        if layer not in self.layers or not self.visual.any():
            return z
        _, rows, keys = z.shape
        out = z.clone()
        first = int(self.visual.nonzero()[0, 0])
        for row in self.rows_of(rows, keys):
            out[:, row, self.key_flags(keys, self.visual)] *= self.enh
            out[:, row, :first] *= self.sup
        return out


class VasBoost(Vaf):
    """The same form in every row."""

    def __init__(self, model: nn.Module, image: float = 0.15, system: float = 0.05, layers: Any = "all") -> None:
        super().__init__(
            model, 1 + image, 1 - system, range(len(model.get_decoder().layers)) if layers == "all" else layers
        )

    def rows_of(self, rows: int, keys: int) -> list[int]:
        """All of them."""
        return list(range(rows))


class ZeroTuning(Logits):
    """Weight of the first token times gamma, row renormalised, in chosen heads."""

    def __init__(self, model: nn.Module, gamma: float, heads: Any = None, layers: Any = "all") -> None:
        super().__init__(model)
        self.gamma = gamma
        self.chosen = None if heads in (None, "all") else {tuple(pair) for pair in heads}
        self.layers = set(range(self.depth)) if layers == "all" else set(layers)

    def edit_weights(self, layer: int, weights: Tensor, prefill: bool) -> Tensor:
        """`A_0' = gamma A_0 / D`, `A_j' = A_j / D`, `D = 1 + (gamma - 1) A_0`."""
        out = weights.clone()
        for head in range(self.heads):
            if layer in self.layers and (self.chosen is None or (layer, head) in self.chosen):
                d = 1 + (self.gamma - 1) * weights[head, :, 0]
                out[head] = weights[head] / d[:, None]
                out[head, :, 0] = self.gamma * weights[head, :, 0] / d
        return out


def encoder_maps(model: nn.Module, pixels: Tensor) -> list[Tensor]:
    """Attention `[images, heads, 1 + patches, 1 + patches]` of every layer of a CLIP tower, computed by hand."""
    tower = model.get_encoder(modality="image")
    tower = getattr(tower, "vision_model", tower)
    x = tower.pre_layrnorm(tower.embeddings(pixels))
    maps = []
    for layer in tower.encoder.layers:
        y, attention = layer.layer_norm1(x), layer.self_attn
        q, k, v = (
            proj(y).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
            for proj in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        weights = (q @ k.transpose(2, 3) * attention.head_dim**-0.5).softmax(-1)
        maps.append(weights)
        x = x + attention.out_proj((weights @ v).transpose(1, 2).flatten(2))
        x = x + layer.mlp(layer.layer_norm2(x))
    return maps


class Paint(Logits):
    """`z + alpha |z|` on local tokens, `z + beta |z|` on summary tokens of the vision encoder, last row."""

    def __init__(self, model: nn.Module, alpha: float = 0.7, beta: float = 0.4,
                 local_ratio: float = 0.25, spatial_ratio: float = 0.0, iqr_factor: float = 1.5,
                 vit_local_layer: int = 0, vit_summary_layer: int = -2, first_layer: int = 2,
                 end_layer: int | None = None) -> None:  # fmt: skip
        super().__init__(model)
        self.layers = range(first_layer, end_layer or self.depth)
        self.alpha, self.beta, self.iqr = alpha, beta, iqr_factor
        self.ratios = local_ratio, spatial_ratio
        self.encoder_layers = vit_local_layer, vit_summary_layer

    def run(self, ids: Tensor, features: Tensor | None, forced: list[int] | Tensor = ()) -> Tensor:
        """See `Dense.run`; the tokens are chosen before the decoder starts."""
        self.choose(encoder_maps(self.model, self.pixels))
        return super().run(ids, features, forced)

    def choose(self, maps: list[Tensor], class_token: bool = True) -> None:
        """Boosts of the visual tokens from the encoder's attention `[images, heads, n, n]` of every layer; without
        class token, what all patches pay stands in for what it pays."""
        self.margin = 1.0
        first, last = (maps[layer] for layer in self.encoder_layers)
        start = int(class_token)
        per_image = []
        for image in range(len(first)):
            received, late = (m[image].sum(0)[start:, start:].sum(0) for m in (first, last))
            cls_local = first[image, :, 0, 1:].sum(0) if class_token else received
            cls_summary = last[image, :, 0, 1:].sum(0) if class_token else late
            n = len(cls_local)
            local = self.best(cls_local, int(self.ratios[0] * n)) | self.best(received, int(self.ratios[1] * n))
            ordered = sorted(float(v) for v in cls_summary)
            q1, q3 = self.quantile(ordered, 0.25), self.quantile(ordered, 0.75)
            limit = q3 + self.iqr * (q3 - q1)
            self.margin = min(self.margin, min(abs(v - limit) for v in ordered) / ordered[-1])
            summary = self.best(cls_summary, sum(v > limit for v in ordered))
            per_image.append([self.beta if j in summary else self.alpha if j in local else 0.0 for j in range(n)])
        self.boost = torch.tensor(per_image).flatten()

    def best(self, values: Tensor, count: int) -> set[int]:
        """Indices of the `count` largest."""
        order = sorted(range(len(values)), key=lambda j: -float(values[j]))
        if 0 < count < len(order):
            gap = float(values[order[count - 1]] - values[order[count]])
            self.margin = min(self.margin, gap / float(values.max()))
        return set(order[:count])

    @staticmethod
    def quantile(ordered: list[float], q: float) -> float:
        """Linear interpolation between order statistics."""
        place = q * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    def edit_logits(self, layer: int, z: Tensor, prefill: bool) -> Tensor:
        """Only the last row changes."""
        if layer not in self.layers or not self.visual.any():
            return z
        out = z.clone()
        slots = self.visual.nonzero()[:, 0]
        out[:, -1, slots] = z[:, -1, slots] + self.boost * z[:, -1, slots].abs()
        return out
