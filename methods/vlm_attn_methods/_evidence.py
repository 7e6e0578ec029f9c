"""Evidence that a draft found in the picture, laid out at the keys of a step once for all its layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlm_attn.stages import EditView
from vlm_attn.tokens import TokenMap

from ._rows import laid


@dataclass
class Step:
    """What the layers of one step share, at its ``n`` keys.

    Attributes:
        tokens: roles of the keys. generated: how many of them are new.
        columns: ``[B, n, 3]``, a row of weights times it: mass on visual keys, on evidence (over the number of heads),
            on text behind the image.
        gain: ``[B, 2, n]``, factors less 1: ``exp(alpha S) - 1``, 0 at all but visual keys; for text, see `gains`.
        behind: ``[B, n]``, 1 at text behind the image, new tokens among it.
        floor: ``[B, n]``, ``beta - 1`` there.
        looked: ``[B, n]``, attention that each text token paid to the evidence so far.
        low, high: ``[B, 1]``, its range over the text behind the image but for the newest key.
        apart: ``[B, 1]``, 0 where the newest key is text behind the image, else infinite; None where it always is.
    """

    tokens: TokenMap
    generated: int
    columns: Tensor
    gain: Tensor
    behind: Tensor
    floor: Tensor
    looked: Tensor
    low: Tensor
    high: Tensor
    apart: Tensor | None

    def gains(self, text: float) -> Tensor:
        """``gain`` with ``text w + beta - 1`` at the text behind the image, w as it is by now."""
        torch.addcmul(self.floor, self.behind, self._share(), value=text, out=self.gain[:, 1])
        return self.gain

    def _share(self) -> Tensor:
        """w ``[B, n]``, at the text behind the image: ``looked`` min-max over that text; 0 where it is constant."""
        newest = self.looked[:, -1:]
        if self.apart is None:
            low, high = torch.minimum(self.low, newest), torch.maximum(self.high, newest)
            return (self.looked - low) / (high - low).clamp(min=1e-12)
        low, high = torch.minimum(self.low, newest + self.apart), torch.maximum(self.high, newest - self.apart)
        return torch.where(high > low, (self.looked - low) / (high - low).clamp(min=1e-12), 0.0)


@dataclass
class Evidence:
    """Evidence map ``[B, N]`` of the prompt, and how much each text token looked at it: prompt and generated."""

    map: Tensor
    prompt: Tensor
    generated: Tensor
    newest: tuple[int, int] | None = None
    step: Step | None = None

    def at(self, view: EditView, heads: int, alpha: float, beta: float) -> Step:
        """The step that a layer belongs to; layers with the same keys share it."""
        if self.step is None or self.step.tokens is not view.tokens:
            self.step = self._laid(view, heads, alpha, beta)
        return self.step

    def _laid(self, view: EditView, heads: int, alpha: float, beta: float) -> Step:
        generated = view.tokens.length - int((view.tokens.index[0] < view.prompt.length).sum())
        missing = max(generated - self.generated.shape[1], 0)
        self.generated = torch.nn.functional.pad(self.generated, (0, missing))
        vis = view.tokens.vis.float()
        evidence = laid(self.map, view) * vis
        behind = view.tokens.qry | (view.tokens.index >= view.prompt.length)
        looked = laid(torch.cat([self.prompt, self.generated], dim=1), view)
        infinite = torch.full_like(looked, float("inf"))
        return Step(
            tokens=view.tokens,
            generated=generated,
            columns=torch.stack([vis, evidence / heads, behind.float()], dim=-1),
            gain=torch.stack([(alpha * evidence).expm1(), torch.zeros_like(evidence)], dim=1),
            behind=behind.float(),
            floor=(beta - 1) * behind,
            looked=looked,
            low=torch.where(behind, looked, infinite)[:, :-1].amin(1, keepdim=True),
            high=torch.where(behind, looked, -infinite)[:, :-1].amax(1, keepdim=True),
            apart=None if bool(behind[:, -1].all()) else torch.where(behind, 0.0, infinite)[:, -1:],
        )

    def look(self, layer: int, paid: Tensor) -> None:
        """The newest token pays ``paid [B]`` in a layer; a row that is asked for twice pays once."""
        step = self.step
        if step is None or self.newest == (layer, step.generated):
            return
        self.newest = layer, step.generated
        self.generated[:, -1] += paid
        step.looked[:, -1] = self.generated[:, -1]
