"""A segment edit together with the labels of one layer's keys."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..stages import SegmentEdit


@dataclass(frozen=True)
class Labelled:
    """A segment edit with the labels of one layer's prompt keys (uint8 ``[B, n]`` or ``[B, H, n]``).

    ``members`` fp32 ``[B, 1 or H, n, G]`` is the one-hot form, ``counts`` fp32 ``[B, G]`` or ``[B, H, G]`` the segment
    sizes, ``heads`` bool ``[H]`` the edited heads (None = all).
    """

    edit: SegmentEdit
    labels: Tensor
    members: Tensor
    counts: Tensor
    heads: Tensor | None = None

    @classmethod
    def of(cls, edit: SegmentEdit, labels: Tensor, heads: Tensor | None = None) -> Labelled:
        """Computes the derived forms once."""
        members = torch.nn.functional.one_hot(labels.long(), edit.segments).float()
        counts = members.sum(-2)
        return cls(edit, labels, members[:, None] if labels.dim() == 2 else members, counts, heads)

    def scales(self, masses: Tensor) -> Tensor:
        """The edit's factors ``[B, H, R, G]``, 1 in heads it leaves alone."""
        scales = self.edit.scales(masses, self.counts)
        return scales if self.heads is None else torch.where(self.heads[None, :, None, None], scales, 1.0)

    def apply(self, weights: Tensor, active: Tensor) -> Tensor:
        """The weights ``[B, H, R, N]`` after the edit, in the rows where ``active [B, 1, R, 1]``."""
        n = self.labels.shape[-1]
        prompt, new = weights[..., :n], weights[..., n:]
        masses = prompt @ self.members
        masses[..., self.edit.generated] += new.sum(-1)
        scales = torch.where(active, self.scales(masses), 1.0)
        edited = prompt * (scales @ self.members.transpose(-1, -2))
        if not new.shape[-1]:
            return edited
        return torch.cat([edited, new * scales[..., self.edit.generated, None]], dim=-1)
