"""Where the gaze shifted while a question was read, laid out at the keys of a layer once for all its steps."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import pad

from vlm_attn.tokens import TokenMap

from ._rows import ROOM


@dataclass
class Laid:
    """What layers with the same prompt keys share, at ``N`` prompt keys and room for generated ones.

    Attributes:
        tokens: roles of the prompt keys.
        columns: ``[B, N + room, 3]``, a row of weights times it: mass on visual keys, that mass raised, mass on the
            question.
        gains: ``[B, 2, N + room]``: what the looking heads gain, ``exp(alpha S) - 1``, 0 at all but visual keys; 1 at
            the question.
    """

    tokens: TokenMap
    columns: Tensor
    gains: Tensor

    def reach(self, keys: int) -> None:
        """Makes room for so many keys; generated ones get 0."""
        if self.gains.shape[-1] < keys:
            room = keys + ROOM - self.gains.shape[-1]
            self.columns, self.gains = pad(self.columns, (0, 0, 0, room)), pad(self.gains, (0, room))


@dataclass
class Gaze:
    """Saliency map ``[B, N]`` of the prompt, and the layout that was used last."""

    map: Tensor
    laid: Laid | None = None
