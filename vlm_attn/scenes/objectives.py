"""What the vision tower is taught: an object, colour, cell and context for every patch, and a summary in CLS."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from vlm_attn.scenes.world import COLOUR_NAMES, CONTEXTS, GRID, KINDS, Scene, patch_owners

KIND_INDEX = {kind: i for i, kind in enumerate(KINDS)}
COLOUR_INDEX = {colour: i for i, colour in enumerate(COLOUR_NAMES)}
CONTEXT_INDEX = {context: i for i, context in enumerate(CONTEXTS)}
NO_KIND, NO_COLOUR, NO_CELL = len(KINDS), len(COLOUR_NAMES), GRID * GRID
"""Labels of background patches."""


@dataclass
class PictureBatch:
    """Pictures and their dense labels.

    Args:
        pixels: float32 [B, 3, 80, 80], normalised to -1..1.
        kind: int64 [B, 100], `NO_KIND` on the background.
        colour: int64 [B, 100].
        cell: int64 [B, 100], row * 3 + column of the object, `NO_CELL` on the background.
        context: int64 [B].
        present: float32 [B, 30], 1 where the kind is in the picture.
        owner: int64 [B, 100], index of the object in the scene, -1 on the background.
    """

    pixels: Tensor
    kind: Tensor
    colour: Tensor
    cell: Tensor
    context: Tensor
    present: Tensor
    owner: Tensor


def picture_batch(scenes: Sequence[Scene]) -> PictureBatch:
    """Render scenes and label their patches."""
    pixels = np.stack([np.asarray(scene.image) for scene in scenes]).transpose(0, 3, 1, 2)
    owner = np.stack([patch_owners(scene).reshape(-1) for scene in scenes])
    kind, colour, cell = (np.full(owner.shape, label) for label in (NO_KIND, NO_COLOUR, NO_CELL))
    present = np.zeros((len(scenes), len(KINDS)), np.float32)
    for b, scene in enumerate(scenes):
        for i, item in enumerate(scene.objects):
            mask = owner[b] == i
            kind[b, mask] = KIND_INDEX[item.kind]
            colour[b, mask] = COLOUR_INDEX[item.colour]
            cell[b, mask] = item.cell[0] * GRID + item.cell[1]
            present[b, KIND_INDEX[item.kind]] = 1
    return PictureBatch(
        pixels=torch.from_numpy(pixels.astype(np.float32) / 127.5 - 1),
        kind=torch.from_numpy(kind),
        colour=torch.from_numpy(colour),
        cell=torch.from_numpy(cell),
        context=torch.tensor([CONTEXT_INDEX[scene.context] for scene in scenes]),
        present=torch.from_numpy(present),
        owner=torch.from_numpy(owner),
    )


class VisionHeads(nn.Module):
    """Read-out heads used only while training the vision tower; they are not part of the checkpoint."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.sizes = (NO_KIND + 1, NO_COLOUR + 1, NO_CELL + 1, len(CONTEXTS))
        self.patch = nn.Linear(width, sum(self.sizes))
        self.summary = nn.Linear(width, len(CONTEXTS) + len(KINDS))

    def forward(self, patches: Tensor, summary: Tensor, batch: PictureBatch) -> tuple[Tensor, dict[str, float]]:
        """Loss of patch features [B, 100, W] (layer -2) and of the final CLS state [B, W], with accuracies."""
        kind, colour, cell, context = self.patch(self.norm(patches)).split(self.sizes, dim=-1)
        labels = batch.context[:, None].expand_as(batch.kind)
        # objects fill about a fifth of the patches, so background counts less
        weight = torch.where(batch.kind == NO_KIND, 0.35, 1.0)
        loss = 0.2 * functional.cross_entropy(context.transpose(1, 2), labels)
        for logits, target in ((kind, batch.kind), (colour, batch.colour), (cell, batch.cell)):
            loss = loss + (functional.cross_entropy(logits.transpose(1, 2), target, reduction="none") * weight).mean()
        scene_logits, set_logits = self.summary(summary).split((len(CONTEXTS), len(KINDS)), dim=-1)
        loss = loss + 0.2 * functional.cross_entropy(scene_logits, batch.context)
        loss = loss + functional.binary_cross_entropy_with_logits(set_logits, batch.present)
        on_object = batch.kind != NO_KIND
        hits = (kind.argmax(-1) == batch.kind).float()
        figures = {
            "patch object": float(hits[on_object].mean()),
            "patch colour": float((colour.argmax(-1) == batch.colour)[on_object].float().mean()),
            "background": float(hits[~on_object].mean()),
            "cls set": float(((set_logits > 0) == (batch.present > 0)).float().mean()),
        }
        return loss, figures
