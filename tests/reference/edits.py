"""Attention edits on explicit weights: VAR (visual attention redistribution) and VHR (vision-aware heads)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.reference.llava import Dense


class Var(Dense):
    """Moves weight from sink tokens to the other visual tokens, in the heads and rows which already look there."""

    def __init__(
        self,
        model: nn.Module,
        sink_dims: tuple[int, ...],
        tau: float,
        visual_mass_min: float = 0.2,
        rho_nonsink: float = 0.5,
        keep: float = 0.6,
        first_layer: int = 2,
        skip_last: bool = True,
        include_text_sinks: bool = True,
        need_visual_sink: bool = True,
    ) -> None:
        super().__init__(model)
        self.dims = list(sink_dims)
        self.tau = tau
        self.visual_mass_min = visual_mass_min
        self.rho_nonsink = rho_nonsink
        self.keep = keep
        self.layers = range(first_layer, self.depth - 1 if skip_last else self.depth)
        self.include_text_sinks = include_text_sinks
        self.need_visual_sink = need_visual_sink
        self.margin = float("inf")
        self.edited = 0
        self.candidates = 0

    def run(self, ids: Tensor, features: Tensor | None, forced: list[int] | Tensor = ()) -> Tensor:
        """See `Dense.run`."""
        self.sinks: dict[int, Tensor] = {}
        return super().run(ids, features, forced)

    def on_layer_input(self, layer: int, x: Tensor, prefill: bool) -> None:
        """`phi = max over sink dims of |x| / rms(x)` on the prompt; above `tau` a token is a sink of this layer."""
        if not prefill or layer not in self.layers:
            return
        flags = []
        for row in x:
            rms = (row.pow(2).mean() + 1e-6).sqrt()
            phi = float((row[self.dims].abs() / rms).max())
            self.margin = min(self.margin, abs(phi - self.tau) / self.tau)
            flags.append(phi > self.tau)
        self.sinks[layer] = torch.tensor(flags)

    def edit_weights(self, layer: int, weights: Tensor, prefill: bool) -> Tensor:
        """Literal redistribution, one head and one row at a time."""
        if layer not in self.layers:
            return weights
        heads, rows, keys = weights.shape
        visual = torch.zeros(keys, dtype=torch.bool)
        visual[: len(self.visual)] = self.visual
        sink = torch.zeros(keys, dtype=torch.bool)
        sink[: len(self.visual)] = self.sinks[layer]
        hidden = self.hidden_keys(layer, keys)
        if hidden is not None:
            visual, sink = visual & ~hidden, sink & ~hidden
        v1, v0 = sink & visual, visual & ~sink
        t1 = sink & ~visual if self.include_text_sinks else torch.zeros(keys, dtype=torch.bool)
        donors = v1 | t1
        if self.need_visual_sink and not v1.any():
            return weights
        past = keys - rows
        text_rows = [i for i in range(rows) if not visual[past + i] and visual[: past + i].any()]
        edited = weights.clone()
        for head in range(heads):
            for row in text_rows:
                a = weights[head, row]
                m_v, m_v0, m_s = a[visual].sum(), a[v0].sum(), a[donors].sum()
                self.candidates += 1
                self.margin = min(self.margin, float((m_v - self.visual_mass_min).abs()))
                if m_v < self.visual_mass_min:
                    continue
                self.margin = min(self.margin, float((m_v0 - self.rho_nonsink * m_v).abs()))
                if m_v0 < self.rho_nonsink * m_v or m_v0 == 0:
                    continue
                omega = (1 - self.keep) * m_s
                edited[head, row, donors] = self.keep * a[donors]
                edited[head, row, v0] = a[v0] + omega * a[v0] / m_v0
                self.edited += int((edited[head, row] != a).any())
        return edited


class LastRow(Dense):
    """Records the head outputs `[H, d]` of the last prompt row in every layer."""

    def run(self, ids: Tensor, features: Tensor | None, forced: list[int] | Tensor = ()) -> Tensor:
        """See `Dense.run`."""
        self.rows: dict[int, Tensor] = {}
        return super().run(ids, features, forced)

    def edit_heads(self, layer: int, outputs: Tensor, prefill: bool) -> Tensor:
        """Reads only."""
        if prefill:
            self.rows[layer] = outputs[:, -1].clone()
        return outputs


class Given(LastRow):
    """The same with known heads scaled; the row is read before the scaling."""

    def __init__(self, model: nn.Module, alpha: float, selected: dict[int, Tensor]) -> None:
        super().__init__(model)
        self.alpha, self.selected = alpha, dict(selected)

    def edit_heads(self, layer: int, outputs: Tensor, prefill: bool) -> Tensor:
        """Reads, then scales."""
        outputs = super().edit_heads(layer, outputs, prefill).clone()
        outputs[self.selected.get(layer, torch.tensor([], dtype=torch.long))] *= self.alpha
        return outputs


class Vhr(Dense):
    """Multiplies the heads whose output depends most on the picture; the sets are fixed in the prefill."""

    def __init__(
        self,
        model: nn.Module,
        alpha: float = 2.0,
        last_layers: int | None = None,
        include_layer1: bool = True,
        filter_outliers: bool = True,
        text_stream: str = "separate",
        distance: str = "l2",
    ) -> None:
        super().__init__(model)
        self.paired, self.squared = text_stream == "paired", distance == "l2_squared"
        self.alpha = alpha
        count = max(1, round(14 * self.depth / 32)) if last_layers is None else last_layers
        self.layers = set(range(self.depth - count, self.depth)) | ({1} if include_layer1 else set())
        self.filter_outliers = filter_outliers

    def run(self, ids: Tensor, features: Tensor | None, forced: list[int] | Tensor = ()) -> Tensor:
        """See `Dense.run`; the text-only stream runs first, without reinforcement."""
        self.words, self.features, self.prompt = ids[ids != self.image_id], features, ids
        text = LastRow(self.model)
        text.run(self.words, None)
        self.text_rows = text.rows
        self.selected: dict[int, Tensor] = {}
        self.margin = float("inf")
        return super().run(ids, features, forced)

    def edit_heads(self, layer: int, outputs: Tensor, prefill: bool) -> Tensor:
        """Selects in the prefill, scales every row of the prefill and of every step."""
        if layer not in self.layers:
            return outputs
        if prefill and self.paired:
            text = Given(self.model, self.alpha, self.selected)  # layers below are known by now
            text.run(self.words, None)
            self.text_rows = text.rows
        if prefill:
            self.selected[layer] = self._select(outputs[:, -1], self.text_rows[layer])
        scale = torch.ones(self.heads)
        scale[self.selected[layer]] = self.alpha
        return outputs * scale[:, None, None]

    def _select(self, with_image: Tensor, without: Tensor) -> Tensor:
        vhd = torch.tensor([float((a - b).norm()) for a, b in zip(with_image, without, strict=True)])
        if self.squared:
            vhd = vhd**2
        strength = torch.tensor([float(b.norm()) ** 2 for b in without])
        if self.filter_outliers:
            outlier = (vhd > vhd.mean() + vhd.std()) & (strength > strength.mean() + strength.std())
            vhd = torch.where(outlier, torch.zeros_like(vhd), vhd)
        order = vhd.sort().values
        median = order[(len(order) - 1) // 2]
        above = order[order > median]
        if len(above):
            self.margin = min(self.margin, float((above[0] - median) / order[-1]))
        return (vhd > median).nonzero()[:, 0]
