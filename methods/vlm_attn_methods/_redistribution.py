"""Shared by edits that move attention mass from some keys to the remaining visual keys of the same row."""

from __future__ import annotations

import torch
from torch import Tensor

OTHER, RECEIVER, VISUAL_DONOR, TEXT_DONOR = 0, 1, 2, 3
SEGMENTS = 4


def redistribute(masses: Tensor, keep: float, visual_mass_min: float, rho_nonsink: float) -> Tensor:
    """Factors that keep a share ``keep`` of the donors' mass and give the rest to the receivers in proportion.

    With ``M_V = M_R + M_D`` (receivers, visual donors) a (head, row) pair is edited iff ``M_V >= visual_mass_min`` and
    ``M_R >= rho_nonsink * M_V``; then donors get ``keep`` and receivers ``1 + (1 - keep) (M_D + M_T) / M_R``, so the
    row still sums to 1.

    Args:
        masses: fp32 ``[B, H, R, 4]`` of other keys, receivers, visual donors, text donors.

    Returns:
        fp32 ``[B, H, R, 4]`` factors.
    """
    # Runs once per layer and token: few operators, each on a few numbers.
    tiny = torch.finfo(torch.float32).tiny
    _, receivers, visual, text = masses.unbind(-1)
    total = receivers + visual
    gate = (receivers >= (rho_nonsink * total).clamp(min=tiny)) & (total >= visual_mass_min)
    one = torch.ones_like(total)
    gain = torch.addcdiv(one, visual + text, receivers.clamp(min=tiny), value=1 - keep)
    kept = torch.where(gate, keep, one)
    return torch.stack([one, torch.where(gate, gain, one), kept, kept], dim=-1)
