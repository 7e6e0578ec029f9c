"""iLLaVA: fold the least attended tokens into one, in the vision encoder and again in the language model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from vlm_attn.kit.budgets import budget, scaled_layers
from vlm_attn.kit.mergers import merge, ramp, survivors
from vlm_attn.profiles import Profile
from vlm_attn.selection import Keep, images
from vlm_attn.stages import EncoderStep, Merged, ModelInfo, PruneView, Shrunk, Site, check_layer, method_dataclass

from ._debias import Debiased
from ._encoder import alive

ENCODER_LAYERS, ENCODER_DEPTH = (5, 6, 7, 8), 26


@method_dataclass
class ILLaVA(Debiased):
    """Folds the tokens that receive least attention into one token, a few per encoder layer, the rest in the decoder.

    Formula: in an encoder layer, ``a_i`` = attention received, mean over heads and queries; in decoder layer K,
    ``a_i = mean_h A^(K-1)[h, last, i]``. To lose r tokens, the ``r + 1`` lowest become one: their mean with weights
    that rise linearly with the score, at the place of the last of them.

    Acts behind the encoder layers ``encoder_layers``, then at the input of decoder layer ``layer``, prefill only;
    original positions are kept, text is never dropped.

    Attributes:
        encoder_layers: encoder layers, 0-based; None = 5, 6, 7, 8 of 26, carried over to the encoder's depth [ours]
            (no further than the layer whose output are the features).
        encoder_drop: tokens that leave behind each of them, at least one token stays: a count, or a share of the
            image's patches (92 of 729); 0 leaves the encoder alone.
        layer: K, 0-based, at least 1; None = 8 of 28, carried over to the model's depth [ours].
        keep: tokens left there, relative to those that come out of the encoder: a count, or a share in (0, 1].
        calibrate: debiasing of the decoder's score: any of ``exp_trend``, ``grid_trend`` or ``mean_map``,
            ``pad_mask``, ``rope_free``, ``rope_ones``.
        sigma: strength of the positional trend; None reads it from the checkpoint's profile.
        grid_sigma: the same for ``grid_trend``, of rows and of columns.
        mean: the same for ``mean_map``, place by place.

    Source: arXiv 2412.06263; debiasing arXiv 2508.17807.
    Deviations: the released ramps of encoder and decoder run in opposite directions, here the better token always
    weighs more; that tokens leave at an encoder layer's output is [unverified]; attention from the class token counts
    as one query among the others, and the class token itself stays; with ``pad_mask`` padding leaves unmerged; ties
    go to the earlier token.
    """

    name = "illava"
    summary = "fold the least attended tokens into one, in the encoder and in the decoder"
    paper = "arXiv:2412.06263"
    needs = ("trend (only with calibrate=['exp_trend'])",)
    encoder_layer = 0
    shrinks = "output"

    encoder_layers: Sequence[Annotated[int, Field(ge=0)]] | None = None
    encoder_drop: Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0, lt=1)] = 0.1262
    layer: Annotated[int, Field(ge=1)] | None = None
    keep: Keep = 0.7

    @classmethod
    def neutral(cls) -> ILLaVA:
        return cls(encoder_drop=0, layer=1, keep=1.0)

    def resolve(self, model: ModelInfo, profile: Profile) -> ILLaVA:
        layer = self.layer or scaled_layers((8,), model.layers, published_depth=28)[0]
        check_layer(self.name, "layer", layer, model, lowest=1)
        return self.with_values(layer=layer).with_trend(profile)

    def sites(self) -> tuple[Site, ...]:
        layer = self.layer or 1
        return Site(0), Site(layer, self.first(layer - 1), hidden=True)

    def shrink(self, step: EncoderStep) -> Shrunk | None:
        layers = self.encoder_layers
        if layers is None:
            layers = scaled_layers(ENCODER_LAYERS, step.layers, 0, ENCODER_DEPTH)
        drop = self.encoder_drop if isinstance(self.encoder_drop, int) else round(self.encoder_drop * step.total)
        drop = min(drop, len(step.sizes) - 1)
        if step.layer not in layers or not drop:
            return None
        kept, hidden = folded(step.picture.features, step.picture.received, drop)
        return Shrunk(kept, hidden)

    def keep_mask(self, view: PruneView) -> Tensor | Merged:
        tokens, out = view.tokens, torch.zeros_like(view.tokens.vis)
        if view.site.layer == 0:
            for row, slots, _ in images(tokens):
                out[row, slots[alive(view.vision.picture(row, int(tokens.img_id[row, slots[0]])))]] = True
            return out
        scores, shown, hidden = self.debiased(view), self.shown(view), view.features.clone()
        for row, all_slots, _ in images(tokens):
            slots = all_slots if shown is None else all_slots[shown[row, all_slots]]
            k = budget(self.keep, all_slots.numel())
            kept, hidden[row, slots] = folded(hidden[row, slots], scores[row, slots], slots.numel() - k)
            out[row, slots[kept]] = True
        return Merged(out, hidden)


def folded(features: Tensor, scores: Tensor, drop: int) -> tuple[Tensor, Tensor]:
    """Indices that stay and features ``[n, d]`` after the ``drop + 1`` lowest became one."""
    parent, weights = ramp(scores, drop)
    return survivors(parent).nonzero()[:, 0], merge(features, parent, weights)
