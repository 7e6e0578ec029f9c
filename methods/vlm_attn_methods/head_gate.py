"""Head gate: block or amplify the heads that arbitrate between picture and text."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from vlm_attn.ops import Mix
from vlm_attn.profiles import Profile
from vlm_attn.stages import EditView, HeadScale, ModelInfo, Rows, SegmentEdit, method_dataclass

from ._layers import Pairs, check_pairs, heads_of


@method_dataclass
class HeadGate(SegmentEdit, HeadScale):
    """Instruction anchors: a few heads decide which modality is followed; this closes or opens them.

    ``mode="amplify"``: outputs of the listed heads times ``alpha``, all rows, prefill and decode (before ``o_proj``).
    ``mode="block"``: with ``drop="visual"`` or ``"context"`` (text before the image) the listed heads lose those keys
    and the rest of the row is renormalised; with ``drop="output"`` their outputs become 0.

    Key dropping acts after the softmax, in the last row of every forward (``where="last"``) or in all text rows that
    see the image (``where="text"``).

    Attributes:
        heads: (layer, head) pairs; None reads the checkpoint's profile (top 5 % by head score).
        mode: ``"amplify"`` or ``"block"``.
        alpha: factor of amplified heads (1 = no change) [unverified].
        drop: what a blocked head loses.
        where: rows in which keys are dropped.

    The head score of ``vlm-attn calibrate CHECKPOINT --for head_gate``: change of the logit difference between the
    right and the competing answer when the head's output is blocked, averaged over probes; the top 5 % are kept.

    Source: arXiv 2602.03677, abstract only (no code): about 5 % of heads arbitrate. Every primitive here is a reading
    of that abstract [unverified].
    """

    name = "head_gate"
    summary = "block or amplify the heads that arbitrate between picture and text"
    paper = "arXiv:2602.03677"
    needs = ("head_gate (heads)",)
    segments = 2
    redistributes = False

    heads: Pairs | None = None
    mode: Literal["amplify", "block"] = "amplify"
    alpha: Annotated[float, Field(ge=0)] = 2.0
    drop: Literal["visual", "context", "output"] = "visual"
    where: Literal["last", "text"] = "last"

    @classmethod
    def neutral(cls) -> HeadGate:
        return cls(heads=((0, 0),), alpha=1.0)

    @property
    def rows(self) -> Rows:  # type: ignore[override]
        return "last" if self.where == "last" else "sees_image"

    @property
    def factor(self) -> float:
        """Factor of the listed heads' outputs."""
        return self.alpha if self.mode == "amplify" else 0.0

    def resolve(self, model: ModelInfo, profile: Profile) -> HeadGate:
        heads = profile.need("head_gate", self.name)["heads"] if self.heads is None else self.heads
        return self.with_values(heads=check_pairs(self.name, "heads", heads, model))

    def _layers(self) -> frozenset[int]:
        return frozenset(pair[0] for pair in self.heads or ())

    def edit_layers(self, model: ModelInfo) -> frozenset[int]:
        return self._layers() if self.mode == "block" and self.drop != "output" else frozenset()

    def scale_layers(self, model: ModelInfo) -> frozenset[int]:
        return self._layers() - self.edit_layers(model)

    def heads_at(self, layer: int) -> Sequence[int]:
        return heads_of(self.heads or (), layer)

    def labels(self, view: EditView) -> Tensor:
        tokens = view.tokens
        return (tokens.vis if self.drop == "visual" else tokens.sys).to(torch.uint8)

    def scales(self, masses: Tensor, counts: Tensor) -> Tensor:
        others = masses[..., 0]
        alone = others < torch.finfo(torch.float32).tiny  # with nothing else to look at, nothing is blocked
        scales = _kept(masses.device) / others[..., None]
        return scales.masked_fill_(alone[..., None], 1.0)

    def mix(self, counts: Tensor) -> tuple[Mix, Tensor]:
        return Mix((1,), (0,), 0.0), torch.ones(len(counts), dtype=torch.bool, device=counts.device)

    def factors(self, layer: int, last: Tensor, text_last: Tensor | None) -> Tensor:
        out = torch.ones(last.shape[:2], device=last.device)
        out[:, list(self.heads_at(layer))] = self.factor
        return out


@functools.cache
def _kept(device: torch.device) -> Tensor:
    """1 for the segment that stays, 0 for the blocked one."""
    return torch.tensor([1.0, 0.0], device=device)
