"""Several dense references in one decoder: logits first, then weights in composition order, then heads."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.reference.llava import Dense


class Chain(Dense):
    """Parts in composition order; each sees the chain's prompt, its own bookkeeping is its own."""

    def __init__(self, parts: list[Dense]) -> None:
        super().__init__(parts[0].model)
        self.parts = parts

    @property
    def margin(self) -> float:
        """The smallest distance of any part from a threshold."""
        return min(getattr(part, "margin", 1.0) for part in self.parts)

    def run(self, ids: Tensor, features: Tensor | None, forced: list[int] | Tensor = ()) -> Tensor:
        """Each part first runs alone, which makes its second streams and early choices; then all run together."""
        for part in self.parts:
            part.pixels = self.pixels
            part.run(ids, features)
        for part in self.parts:
            part.hidden_keys = self.hidden_keys  # type: ignore[method-assign]
        return super().run(ids, features, forced)

    def on_layer_input(self, layer: int, x: Tensor, prefill: bool) -> None:
        """All parts look."""
        for part in self.parts:
            part.on_layer_input(layer, x, prefill)

    def hidden_keys(self, layer: int, keys: int) -> Tensor | None:
        """Keys that any part hides."""
        found = [type(part).hidden_keys(part, layer, keys) for part in self.parts]
        found = [f for f in found if f is not None]
        return torch.stack(found).any(0) if found else None

    def edit_logits(self, layer: int, scores: Tensor, prefill: bool) -> Tensor:
        """One after the other."""
        for part in self.parts:
            scores = part.edit_logits(layer, scores, prefill)
        return scores

    def see(self, layer: int, visible: Tensor, prefill: bool) -> Tensor | None:
        """The first part that has something to say."""
        found = [part.see(layer, visible, prefill) for part in self.parts]
        return next((f for f in found if f is not None), None)

    def edit_weights(self, layer: int, weights: Tensor, prefill: bool) -> Tensor:
        """One after the other."""
        for part in self.parts:
            weights = part.edit_weights(layer, weights, prefill)
        return weights

    def edit_heads(self, layer: int, outputs: Tensor, prefill: bool) -> Tensor:
        """One after the other."""
        for part in self.parts:
            outputs = part.edit_heads(layer, outputs, prefill)
        return outputs
