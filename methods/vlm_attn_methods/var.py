"""VAR: move attention from sink tokens to the rest of the picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from vlm_attn.ops import Mix
from vlm_attn.profiles import Profile
from vlm_attn.stages import EditView, ModelInfo, SegmentEdit, check_layer, method_dataclass

from ._redistribution import RECEIVER, SEGMENTS, TEXT_DONOR, VISUAL_DONOR, redistribute

RHO = {"general": 0.8, "hallucination": 0.5, "vision_centric": 0.9}


@method_dataclass
class VAR(SegmentEdit):
    """Visual attention redistribution: in image-centric heads, a share of the sinks' attention goes to the picture.

    Sinks of layer l: valid tokens with ``phi(x) = max_{t in sink_dims} |x_t| / rms(x) > tau``, x the layer's input
    (residual stream, fp32, no norm weight). For every head and row with a visual sink in the layer,
    ``M_V >= visual_mass_min`` and ``M_V0 / M_V >= rho_nonsink`` (V0 = visual non-sinks): sinks keep the share ``keep``
    of their weight, and ``(1 - keep)(M_V1 + M_T1)`` is spread over V0 in proportion. Rows still sum to 1.

    Acts after the softmax, in layers ``first_layer..L-2`` (``..L-1`` without ``skip_last``), in text rows that see the
    image, prefill and decode. Sinks are found in the prefill and reused in decoding.

    Attributes:
        sink_dims: residual dimensions of the checkpoint's massive activations; None reads the profile.
        tau: sink threshold; None reads the profile, or takes ``0.3125 sqrt(D)`` [unverified] with explicit dims.
        visual_mass_min: least visual mass of an edited row.
        rho_nonsink: least non-sink share of the visual mass, a number or ``"general"`` 0.8, ``"hallucination"`` 0.5,
            ``"vision_centric"`` 0.9.
        keep: kappa, the share of their weight that sinks keep (1 = no change).
        first_layer: first edited layer. skip_last: leave the last layer alone.
        include_text_sinks: text sinks donate as well. need_visual_sink: text sinks alone do not trigger an edit.

    Source: arXiv 2503.03321 and its released code.
    Deviations: rho has the paper's meaning (the code tests 1 - r); ``keep`` is the kept share as in the code (0.6);
    the last layer is excluded, as the paper says (a shadowed flag makes the code edit it).
    """

    name = "var"
    summary = "redistribute attention from sink tokens to the rest of the picture"
    paper = "arXiv:2503.03321"
    needs = ("sinks",)
    segments = SEGMENTS
    wants_hidden = True

    sink_dims: Sequence[Annotated[int, Field(ge=0)]] | None = None
    tau: Annotated[float, Field(gt=0)] | None = None
    visual_mass_min: Annotated[float, Field(ge=0, le=1)] = 0.2
    rho_nonsink: Annotated[float, Field(ge=0, le=1)] | Literal["general", "hallucination", "vision_centric"] = 0.5
    keep: Annotated[float, Field(ge=0, le=1)] = 0.6
    first_layer: Annotated[int, Field(ge=0)] = 2
    skip_last: bool = True
    include_text_sinks: bool = True
    need_visual_sink: bool = True

    @classmethod
    def neutral(cls) -> VAR:
        return cls(sink_dims=(0,), tau=1.0, keep=1.0, first_layer=0, skip_last=False)

    def resolve(self, model: ModelInfo, profile: Profile) -> VAR:
        check_layer(self.name, "first_layer", self.first_layer, model)
        dims, tau = self.sink_dims, self.tau
        if dims is None:
            record = profile.need("sinks", self.name)
            dims = [int(d) for d in record["dims"]]
            tau = float(record["tau"]) if tau is None else tau
        if not dims or max(dims) >= model.hidden:
            raise ValueError(f"var: sink_dims={list(dims)} must name residual dimensions 0..{model.hidden - 1}")
        return self.with_values(sink_dims=tuple(dims), tau=tau if tau is not None else 0.3125 * model.hidden**0.5)

    def edit_layers(self, model: ModelInfo) -> frozenset[int]:
        return frozenset(range(self.first_layer, model.layers - int(self.skip_last)))

    def labels(self, view: EditView) -> Tensor:
        if view.hidden is None or self.sink_dims is None or self.tau is None:
            raise ValueError("var was not resolved against a model: attach it with vlm_attn.attach or wrap")
        x = view.hidden.float()
        rms = (x.pow(2).mean(-1) + 1e-6).sqrt()
        phi = x[..., list(self.sink_dims)].abs().amax(-1) / rms
        tokens = view.tokens
        sinks = tokens.valid & (phi > self.tau)
        labels = torch.zeros(phi.shape, dtype=torch.uint8, device=phi.device)
        labels[tokens.vis] = RECEIVER
        given = sinks & tokens.vis
        labels[given] = VISUAL_DONOR
        if self.include_text_sinks:
            # Without a visual sink nothing is given, where one is needed.
            labels[sinks & ~tokens.vis & (given.any(1, keepdim=True) | (not self.need_visual_sink))] = TEXT_DONOR
        return labels

    def scales(self, masses: Tensor, counts: Tensor) -> Tensor:
        rho = RHO[self.rho_nonsink] if isinstance(self.rho_nonsink, str) else self.rho_nonsink
        return redistribute(masses, self.keep, self.visual_mass_min, rho)

    def mix(self, counts: Tensor) -> tuple[Mix, Tensor]:
        rho = RHO[self.rho_nonsink] if isinstance(self.rho_nonsink, str) else self.rho_nonsink
        visual = (RECEIVER, VISUAL_DONOR)
        allowed = (counts[:, VISUAL_DONOR] > 0) | (not self.need_visual_sink)
        mix = Mix((VISUAL_DONOR, TEXT_DONOR), (RECEIVER,), self.keep, visual, self.visual_mass_min, rho)
        return mix, allowed
