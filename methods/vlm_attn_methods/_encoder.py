"""Shared by pruning methods that look at the vision encoder and cut once, at the language model's input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Self

import torch
from torch import Tensor

from vlm_attn.encoder_view import Picture
from vlm_attn.selection import images
from vlm_attn.stages import Merged, Prune, PruneView, Site, method_dataclass


@method_dataclass
class EncoderPrune(Prune):
    """One cut before the language model; each image is decided from its own picture.

    Attention debiasing (``calibrate``) is not offered here: it takes out what causal order and rotary positions do to
    attention from text, and encoders have neither.

    ``positions``: ``"renumber"`` closes the gaps, as released; ``"keep"`` leaves the original positions.
    """

    encoder_layer = -2

    positions: Literal["renumber", "keep"] = "renumber"

    @classmethod
    def neutral(cls) -> Self:
        params: dict[str, Any] = {"keep": 1.0}
        return cls(**params)

    def sites(self) -> tuple[Site, ...]:
        return (Site(0, hidden=True),)

    def each(self, view: PruneView, choose: Callable[[Picture, Tensor], Tensor]) -> Tensor:
        """bool ``[B, N]`` from a rule per image: (picture, projected features ``[n, D]``) -> indices to keep."""
        out = torch.zeros_like(view.tokens.vis)
        for row, slots, _ in images(view.tokens):
            picture = view.vision.picture(row, int(view.tokens.img_id[row, slots[0]]))
            out[row, slots[choose(picture, view.features[row, slots])]] = True
        return out

    def replaced(self, view: PruneView, choose: Callable[[Picture], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Keep mask and hidden states from a rule per image: picture -> (indices, encoder features ``[N, d_v]``).

        The features that the rule returns are projected; rows that are not kept do not matter.
        """
        out, hidden = torch.zeros_like(view.tokens.vis), view.features.clone()
        for row, slots, _ in images(view.tokens):
            picture = view.vision.picture(row, int(view.tokens.img_id[row, slots[0]]))
            chosen, features = choose(picture)
            changed = chosen[(features[chosen] != picture.features[chosen]).any(-1)]
            out[row, slots[chosen]] = True
            if changed.numel():
                hidden[row, slots[changed]] = view.vision.project(features[changed]).to(hidden.dtype)
        return out, hidden


@method_dataclass
class InEncoder(EncoderPrune):
    """Patches leave inside the encoder (``shrink``); the prompt then drops their places."""

    encoder_layer = 0

    def keep_mask(self, view: PruneView) -> Tensor | Merged:
        return self.each(view, lambda picture, z: alive(picture))


def alive(picture: Picture) -> Tensor:
    """Indices of the patches that did not leave inside the encoder."""
    if picture.alive is None:
        raise ValueError("nothing was removed inside the encoder: the method does not say where (shrinks)")
    return picture.alive.nonzero()[:, 0]
