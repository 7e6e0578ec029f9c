"""Shared by edits that move attention mass from some keys to the remaining visual keys of the same row."""

from __future__ import annotations

import torch
from torch import Tensor

OTHER, RECEIVER, VISUAL_DONOR, TEXT_DONOR = 0, 1, 2, 3
SEGMENTS = 4


def redistribute(
    masses: Tensor, counts: Tensor, keep: float, visual_mass_min: float, rho_nonsink: float, need_visual: bool
) -> Tensor:
    """Factors that keep a share ``keep`` of the donors' mass and give the rest to the receivers in proportion.

    With ``M_V = M_R + M_D`` (receivers, visual donors) a (head, row) pair is edited iff ``M_V >= visual_mass_min`` and
    ``M_R >= rho_nonsink * M_V``; then donors get ``keep`` and receivers ``1 + (1 - keep) (M_D + M_T) / M_R``, so the
    row still sums to 1.

    Args:
        masses: fp32 ``[B, H, R, 4]`` of other keys, receivers, visual donors, text donors.
        counts: ``[B, 4]`` keys per segment.

    Returns:
        fp32 ``[B, H, R, 4]`` factors.
    """
    receivers, visual, text = masses[..., RECEIVER], masses[..., VISUAL_DONOR], masses[..., TEXT_DONOR]
    total = receivers + visual
    gate = (total >= visual_mass_min) & (receivers >= rho_nonsink * total) & (receivers > 0)
    if need_visual:
        gate = gate & (counts[:, VISUAL_DONOR] > 0)[:, None, None]
    gain = 1 + (1 - keep) * (visual + text) / receivers.clamp(min=torch.finfo(torch.float32).tiny)
    one = torch.ones_like(gain)
    kept = torch.full_like(gain, keep)
    return torch.where(gate[..., None], torch.stack([one, gain, kept, kept], dim=-1), 1.0)
