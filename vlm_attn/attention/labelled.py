"""A segment edit together with the labels of one layer's keys."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..stages import SegmentEdit

Changed = Callable[[], Tensor] | None
"""Where weights changed, bool ``[B, H, R]``, worked out when it is called; None: nowhere."""

# Forms that grow with the answer are made this much longer than the keys at hand, so that few steps make them anew.
SPARE = 64


@dataclass(frozen=True)
class Labelled:
    """A segment edit with the labels of one layer's prompt keys (uint8 ``[B, n]`` or ``[B, H, n]``).

    ``members`` fp32 ``[B, 1 or H, n, G]`` is the one-hot form, ``counts`` fp32 ``[B, G]`` or ``[B, H, G]`` the segment
    sizes, ``heads`` bool ``[H]`` the edited heads (None = all), ``grown`` the members with generated tokens behind;
    ``neutral``: it changes nothing, whatever the weights.
    """

    edit: SegmentEdit
    labels: Tensor
    members: Tensor
    counts: Tensor
    heads: Tensor | None = None
    neutral: bool = False
    grown: list[Tensor] = field(default_factory=list, init=False, repr=False)

    @classmethod
    def of(cls, edit: SegmentEdit, labels: Tensor, heads: Tensor | None = None) -> Labelled:
        """Computes the derived forms once."""
        members = torch.nn.functional.one_hot(labels.long(), edit.segments).float()
        counts = members.sum(-2)
        said = edit.mix(counts)
        neutral = said is not None and (said[0].keep == 1 or said[0].gate_min > 1)
        return cls(edit, labels, members[:, None] if labels.dim() == 2 else members, counts, heads, neutral)

    @functools.cached_property
    def spared(self) -> Tensor | None:
        """bool ``[1, H, 1, 1]``: the heads it leaves alone."""
        return None if self.heads is None else ~self.heads[None, :, None, None]

    def scales(self, masses: Tensor) -> Tensor:
        """The edit's factors ``[B, H, R, G]``, 1 in heads it leaves alone."""
        scales = self.edit.scales(masses, self.counts)
        return scales if self.spared is None else scales.masked_fill(self.spared, 1.0)

    def apply(self, weights: Tensor, active: Tensor | None) -> Tensor:
        """The weights ``[B, H, R, N]`` after the edit, in the rows where ``active [B, 1, R, 1]`` (None = all)."""
        return self.change(weights, active)[0]

    def change(self, weights: Tensor, active: Tensor | None) -> tuple[Tensor, Changed]:
        """The same, and where a weight changed."""
        members = self._members_at(weights.shape[-1])
        masses = _product(weights, members)
        scales = self.scales(masses)
        scales = scales if active is None else torch.where(active, scales, 1.0)
        edited = weights * _product(scales, members.transpose(-1, -2))
        return edited, functools.partial(self.changes, scales, masses)

    @staticmethod
    def changes(scales: Tensor, masses: Tensor) -> Tensor:
        """bool ``[B, H, R]``: the rows in which a segment that has mass is scaled."""
        return ((scales != 1) & (masses > 0)).any(-1)

    def _members_at(self, keys: int) -> Tensor:
        """``members`` of ``keys`` keys: those behind the prompt belong to the segment of generated tokens."""
        known = self.grown[-1] if self.grown else self.members
        if known.shape[2] < keys:
            b, h, n, g = self.members.shape
            new = torch.zeros(b, h, keys + SPARE - n, g, device=self.members.device)
            new[..., self.edit.generated] = 1.0
            known = torch.cat([self.members, new], dim=2)
            self.grown[:] = [known]
        return known[:, :, :keys]


def _product(rows: Tensor, members: Tensor) -> Tensor:
    """``rows [B, H, R, n] @ members [B, 1 or H, n, G]``, without a copy of ``members`` per head."""
    if members.shape[1] > 1:
        return rows @ members
    b, h, r, n = rows.shape
    return torch.bmm(rows.reshape(b, h * r, n), members[:, 0]).view(b, h, r, members.shape[-1])
