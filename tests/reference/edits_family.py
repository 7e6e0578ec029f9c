"""The dense references of attention edits on any family: their hooks act inside the family's own stock model."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from tests.reference.edits_logits import Paint
from tests.reference.edits_rows import Gift, Ilvad
from tests.reference.family import OnModel
from tests.reference.llava import Dense


class Applied(OnModel):
    """One reference, or a chain of them, in place of the stock model's attention."""

    def __init__(self, model: Any, part: Dense) -> None:
        super().__init__(model)
        self.part = part

    def begin(self, inputs: dict[str, Tensor]) -> None:
        """What the part would do before a prompt of its own."""
        part, ids = self.part, inputs["input_ids"][0]
        part.visual, part.sinks = self.visual, {}
        if isinstance(part, Gift):
            part.prepare(ids, Drafted(self.model).draft(inputs, 1).maps[part.source])
        if isinstance(part, Ilvad):
            draft = Drafted(self.model).draft(inputs, part.count)
            part.prepare(ids, {n: x.mean(0) for n, x in draft.maps.items()}, draft.steps)
        if isinstance(part, Paint):
            maps = encoder_attentions(self.model, inputs["pixel_values"])
            part.choose(maps, class_token=maps[0].shape[0] * maps[0].shape[-1] > int(self.visual.sum()))

    def on_layer_input(self, layer: int, x: Tensor, prefill: bool) -> None:
        """See `Dense`."""
        self.part.on_layer_input(layer, x, prefill)

    def attend(self, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        """Head outputs `[1, rows, H, d]`: logits, mask, weights and heads as the part wants them."""
        layer, (heads, rows), total = module.layer_idx, q.shape[1:3], k.shape[2]
        group, prefill = heads // k.shape[1], rows > 1
        scores = torch.stack([q[0, head] @ k[0, head // group].T * scaling for head in range(heads)])
        scores = self.part.edit_logits(layer, scores, prefill)
        visible = torch.ones(rows, total, dtype=torch.bool) if mask is None else mask[0, 0, :, :total] > -1
        factors = self.part.see(layer, visible, prefill)
        weights = (scores + (visible.float() if factors is None else factors).log()).softmax(-1)
        weights = self.part.edit_weights(layer, weights, prefill)
        outputs = torch.stack([weights[head] @ v[0, head // group] for head in range(heads)])
        return self.part.edit_heads(layer, outputs, prefill).transpose(0, 1)[None]


class Drafted(OnModel):
    """An unedited greedy answer: every weight of the prompt `[H, n, n]`, the newest row `[H, keys]` of each step."""

    def draft(self, inputs: dict[str, Tensor], tokens: int) -> Drafted:
        """Runs it."""
        self.maps: dict[int, Tensor] = {}
        self.steps: list[dict[int, Tensor]] = []
        with self._attention_replaced():
            self.model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        return self

    def edit_weights(self, layer: int, weights: Tensor, prefill: bool) -> Tensor:
        """Reads only."""
        if prefill:
            self.maps[layer] = weights.clone()
            return weights
        if layer == 0:
            self.steps.append({})
        self.steps[-1][layer] = weights[:, 0]
        return weights


def encoder_attentions(model: Any, pixels: Tensor) -> list[Tensor]:
    """Attention `[images, heads, n, n]` of every layer of the vision tower, as transformers returns it."""
    tower = copy.deepcopy(model.get_encoder(modality="image"))
    tower.set_attn_implementation("eager")
    return list(tower(pixels, output_attentions=True).attentions)
