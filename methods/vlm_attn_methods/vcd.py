"""VCD: contrast the logits with those of a noised picture."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from vlm_attn.stages import Contrast, method_dataclass

STEPS = 1000


def signal_share(step: int) -> float:
    """``sqrt(alpha_bar_t)``: amplitude of the picture left after ``step`` of the 1000 diffusion steps."""
    u = torch.linspace(-6, 6, STEPS, dtype=torch.float64)
    betas = torch.sigmoid(u) * (0.5e-2 - 1e-5) + 1e-5
    return float((1 - betas[: step + 1]).prod().sqrt())


@method_dataclass
class VCD(Contrast):
    """Visual contrastive decoding: amplify what the picture adds over a noised copy of it.

    ``out = (1 + alpha) l - alpha l'``, l' the logits with pixels ``x_t = sqrt(ab_t) x + sqrt(1 - ab_t) eps`` (on the
    normalised pixel tensor, one Gaussian eps per picture); tokens with ``l < max l + log beta`` are forbidden, the
    mask coming from the normal branch.

    Acts on the next-token logits of ``generate``, after built-in penalties and before temperature, top-k and top-p;
    the branch keeps its own cache and runs without edits or pruning. A plain forward is not changed.

    Attributes:
        alpha: contrast strength (0 = none).
        beta: plausibility threshold in (0, 1]; None switches it off. The POPE preset of the paper's scripts is 0.2.
        noise_step: diffusion step 0..999 (500 keeps 86 % of the amplitude).
        seed: seed of eps; the same eps for every picture, so a batch gives what each sample alone gives.

    Source: CVPR 2024 and its released code (alpha 1, beta 0.1, step 500).
    Deviations: eps is seeded; built-in logits processors run before the contrast (the code runs them after).
    """

    name = "vcd"
    summary = "contrast next-token logits with those of a noised picture"
    paper = "arXiv:2311.16922"

    alpha: Annotated[float, Field(ge=0)] = 1.0
    beta: Annotated[float, Field(gt=0, le=1)] | None = 0.1
    noise_step: Annotated[int, Field(ge=0, lt=STEPS)] = 500
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0

    @classmethod
    def neutral(cls) -> VCD:
        return cls(alpha=0.0, beta=None)

    @property
    def active(self) -> bool:
        return self.alpha > 0 or self.beta is not None

    def alter_pixels(self, pixels: Tensor) -> Tensor:
        share = signal_share(self.noise_step)
        generator = torch.Generator().manual_seed(self.seed)
        noise = torch.randn(pixels.shape, generator=generator).to(pixels)
        return share * pixels + math.sqrt(1 - share**2) * noise

    def combine(self, logits: Tensor, branch: Tensor) -> Tensor:
        out = (1 + self.alpha) * logits - self.alpha * branch
        if self.beta is None:
            return out
        floor = logits.amax(-1, keepdim=True) + math.log(self.beta)
        return out.masked_fill(logits < floor, float("-inf"))
