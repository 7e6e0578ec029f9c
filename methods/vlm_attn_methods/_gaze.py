"""Where the gaze shifted while a question was read, laid out at the keys of a step once for all its layers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vlm_attn.tokens import TokenMap


@dataclass
class Step:
    """What the layers of one step share, at its ``n`` keys.

    Attributes:
        tokens: roles of the keys.
        columns: ``[B, n, 3]``, a row of weights times it: mass on visual keys, that mass raised, mass on the question.
        gains: ``[B, 2, n]``: what the looking heads gain, ``exp(alpha S) - 1``, 0 at all but visual keys; 1 at the
            question.
    """

    tokens: TokenMap
    columns: Tensor
    gains: Tensor


@dataclass
class Gaze:
    """Saliency map ``[B, N]`` of the prompt, and the step that is laid out."""

    map: Tensor
    step: Step | None = None
