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
        boost: ``[B, 1, n]``, factor of the looking heads: ``exp(alpha S)``, 1 at all but visual keys.
        question: bool ``[B, 1, n]``.
    """

    tokens: TokenMap
    columns: Tensor
    boost: Tensor
    question: Tensor


@dataclass
class Gaze:
    """Saliency map ``[B, N]`` of the prompt, and the step that is laid out."""

    map: Tensor
    step: Step | None = None
