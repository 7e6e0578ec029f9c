"""Evidence that a draft found in the picture, laid out at the keys of a layer once and followed token by token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from vlm_attn.stages import EditView
from vlm_attn.tokens import TokenMap

from ._rows import ROOM

TINY = 1e-12


@dataclass
class Laid:
    """What layers with the same ``N`` prompt keys share, with room behind those (``n`` keys in all).

    Attributes:
        arrived: roles of the prompt keys.
        columns: ``[B, 3, n]``, mass of a row of weights on: evidence, text behind the image (new tokens among it),
            visual keys.
        gain: ``[B, 2, n]``, factors less 1: ``exp(alpha S) - 1``, 0 at all but visual keys; ``text w + beta - 1`` at
            the text behind the image.
        floor: ``[B, n]``, ``beta - 1`` at the text behind the image.
        wall: ``[B, n]``, infinite at all but that text.
        looked: ``[B, n]``, attention that each text token paid to the evidence so far.
        low, high: ``[B, 1]``, its range over the text behind the image in the prompt.
        tiny: ``[3, 1]``, 0, 0 and a mass that no head's visual one falls below.
        mean: ``[H, 1]``, ``1 / H``.
        zeros: ``[B, 2, H]``.
        step: the step used last.
    """

    arrived: TokenMap
    columns: Tensor
    gain: Tensor
    floor: Tensor
    wall: Tensor
    looked: Tensor
    low: Tensor
    high: Tensor
    tiny: Tensor
    mean: Tensor
    zeros: Tensor
    step: Step | None = None

    @property
    def generated(self) -> Tensor:
        """``looked`` of the tokens generated so far, ``[B, T]``."""
        return self.looked[:, self.arrived.length :][:, : self.step.generated if self.step else 0]

    def at(self, keys: int) -> Step:
        """The step with so many keys."""
        if self.step is None or self.step.generated != keys - self.arrived.length:
            self.step = Step(self, keys)
        return self.step


class Step:
    """What the layers of one step share: a layout at its keys.

    Attributes:
        laid: the layout.
        generated: how many of the keys are new.
        low, high: ``[B, 1]``, range of ``looked`` over the text behind the image but for the newest key.
    """

    def __init__(self, laid: Laid, keys: int):
        self.laid, self.generated, self.low, self.high = laid, keys - laid.arrived.length, laid.low, laid.high
        self.columns, self.gain = laid.columns[:, :, :keys], laid.gain[:, :, :keys]
        self.floor, self.wall, self.looked = laid.floor[:, :keys], laid.wall[:, :keys], laid.looked[:, :keys]
        self.newest, self.text_gain = self.looked[:, -1:], self.gain[:, 1]
        if self.generated > 1:
            older = self.looked[:, laid.arrived.length : -1]
            self.low = torch.minimum(self.low, older.amin(1, keepdim=True))
            self.high = torch.maximum(self.high, older.amax(1, keepdim=True))

    def masses(self, weights: Tensor) -> Tensor:
        """``[B, 3, H]``: mass of each head's row of ``weights [B, H, n]`` on the columns; never 0 on visual keys."""
        return torch.baddbmm(self.laid.tiny, self.columns, weights.transpose(1, 2))

    def gains(self, text: float) -> Tensor:
        """``gain`` as it is by now: w is ``looked`` min-max over the text behind the image, 0 where it is constant."""
        if self.generated:  # else nothing moved since it was laid out
            low, high = torch.minimum(self.low, self.newest), torch.maximum(self.high, self.newest)
            span = (high - low) + self.wall
            torch.addcdiv(self.floor, self.looked - low, span, value=text, out=self.text_gain)
        return self.gain


@dataclass
class Evidence:
    """Evidence map ``[B, N]`` of the prompt, how much each text token of it looked there, and the strengths."""

    map: Tensor
    prompt: Tensor
    alpha: float
    beta: float
    text: float
    newest: tuple[int, int] | None = None
    laid: Laid | None = None

    def at(self, view: EditView, heads: int, keys: int) -> Step:
        """The step that a layer with weights ``[B, heads, keys]`` belongs to; layers with the same keys share it."""
        laid = self.laid
        if laid is None or laid.arrived is not view.tokens or laid.looked.shape[1] < keys:
            laid = self.laid = self._lay(view.tokens, heads, keys)
        return laid.at(keys)

    def _lay(self, arrived: TokenMap, heads: int, keys: int) -> Laid:
        vis, behind = arrived.vis.float(), arrived.qry
        evidence, looked = self.map.gather(1, arrived.index) * vis, self.prompt.gather(1, arrived.index)
        low = torch.where(behind, looked, float("inf")).amin(1, keepdim=True)
        high = torch.where(behind, looked, -float("inf")).amax(1, keepdim=True)
        share = torch.where(behind & (high > low), (looked - low) / (high - low), 0.0)
        floor = (self.beta - 1) * behind
        room = keys - arrived.length + ROOM
        generated = looked.new_zeros(len(looked), 0) if self.laid is None else self.laid.generated
        return Laid(
            arrived=arrived,
            columns=torch.stack(
                [pad(evidence, (0, room)), pad(behind.float(), (0, room), value=1.0), pad(vis, (0, room))], 1
            ),
            gain=pad(torch.stack([(self.alpha * evidence).expm1(), floor + self.text * share], dim=1), (0, room)),
            floor=pad(floor, (0, room), value=self.beta - 1),
            wall=pad(torch.where(behind, TINY, float("inf")), (0, room), value=TINY),
            looked=pad(torch.cat([looked, generated], dim=1), (0, room - generated.shape[1])),
            low=low,
            high=high,
            tiny=looked.new_tensor([[0.0], [0.0], [TINY]]),
            mean=looked.new_full((heads, 1), 1 / heads),
            zeros=looked.new_zeros(len(looked), 2, heads),
        )

    def look(self, layer: int, step: Step, paid: Tensor) -> None:
        """The heads of the newest token pay ``paid [B, H]`` in a layer; a row that is asked for twice pays once."""
        if self.newest != (layer, step.generated):
            self.newest = layer, step.generated
            step.newest.addmm_(paid, step.laid.mean)
