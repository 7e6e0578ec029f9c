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
        masses = self._per_segment(prompt)
        if new.shape[-1]:
            masses[..., self.edit.generated] += new.sum(-1)
        scales = torch.where(active, self.scales(masses), 1.0)
        edited = torch.empty_like(weights)
        torch.mul(prompt, self._per_key(scales), out=edited[..., :n])
        torch.mul(new, scales[..., self.edit.generated, None], out=edited[..., n:])
        return edited

    def _per_segment(self, weights: Tensor) -> Tensor:
        """Sums ``[B, H, R, G]`` of the prompt's weights ``[B, H, R, n]`` over each segment."""
        if self.members.shape[1] > 1:
            return weights @ self.members
        # One product per sample: the same labels for every head need no copy per head.
        return (weights.flatten(1, 2) @ self.members[:, 0]).unflatten(1, weights.shape[1:3])

    def _per_key(self, scales: Tensor) -> Tensor:
        """Factors ``[B, H, R, n]`` of the prompt's keys from those of their segments ``[B, H, R, G]``."""
        if self.members.shape[1] > 1:
            return scales @ self.members.transpose(-1, -2)
        return (scales.flatten(1, 2) @ self.members[:, 0].transpose(1, 2)).unflatten(1, scales.shape[1:3])
