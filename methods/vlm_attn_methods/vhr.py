"""VHR: reinforce the heads whose output depends on the picture."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from vlm_attn.profiles import Profile
from vlm_attn.stages import HeadScale, ModelInfo, method_dataclass


@method_dataclass
class VHR(HeadScale):
    """Vision-aware head reinforcement: multiply the outputs of the image-dependent half of the heads.

    ``VHD[l, h] = ||O_img[l, h] - O_txt[l, h]||_2`` at the last prompt row, O the head output before ``o_proj``, O_txt
    from a text-only prefill (image placeholders removed, positions compact). Outliers are zeroed: VHD and
    ``||O_txt||^2`` both above mean + std over the layer's heads. Heads with VHD above the layer's median are
    multiplied by ``alpha``, in all rows of the prefill and in decoding.

    Acts before ``o_proj`` in layer 1 and the last ``last_layers`` layers. Layer by layer: VHD of layer l is measured
    with earlier layers already reinforced. The head sets stay fixed for the request.

    Attributes:
        alpha: factor (1 = no change).
        last_layers: number of final layers; None means what the checkpoint's authors published, else 14 of 32, scaled
            by depth [unverified for other depths].
        include_layer1: also layer 1 (can destabilise harder benchmarks); None as above, else yes.
        filter_outliers: the outlier filter.
        distance: ``"l2"``, or ``"l2_squared"`` as one port does (same median set, other filter).
        text_stream: ``"separate"``: an unreinforced text-only prefill; ``"paired"``: that stream is reinforced with
            the same heads, layer by layer in step with the image prompt (two text-only prefills)
            [unverified: the paper does not say whether that stream is reinforced].

    Source: arXiv 2412.13949 (paper text; its code was not available).
    Deviations: std is the unbiased one [unverified].
    """

    name = "vhr"
    summary = "reinforce attention heads whose output depends on the picture"
    paper = "arXiv:2412.13949"
    wants_text_stream = True

    alpha: Annotated[float, Field(ge=0)] = 2.0
    last_layers: Annotated[int, Field(ge=0)] | None = None
    include_layer1: bool | None = None
    filter_outliers: bool = True
    distance: Literal["l2", "l2_squared"] = "l2"
    text_stream: Literal["separate", "paired"] = "separate"

    @classmethod
    def neutral(cls) -> VHR:
        return cls(alpha=1.0)

    def resolve(self, model: ModelInfo, profile: Profile) -> VHR:
        published = profile.entries.get("vhr", {})
        last, first = self.last_layers, self.include_layer1
        if last is None:
            last = int(published.get("last_layers", max(1, round(14 * model.layers / 32))))
        if last > model.layers:
            raise ValueError(f"vhr: last_layers={last}, but the model has {model.layers} decoder layers")
        first = bool(published.get("include_layer1", True)) if first is None else first
        return self.with_values(last_layers=last, include_layer1=first)

    @property
    def paired(self) -> bool:
        return self.text_stream == "paired"

    def edit_layers(self, model: ModelInfo) -> frozenset[int]:
        first = {1} if self.include_layer1 and model.layers > 1 else set()
        return frozenset(first | set(range(model.layers - (self.last_layers or 0), model.layers)))

    def factors(self, layer: int, last: Tensor, text_last: Tensor | None) -> Tensor:
        if text_last is None:
            raise ValueError("vhr ran without its text-only stream: call the model with input_ids")
        text = text_last.float()
        gap = (last.float() - text).norm(dim=-1)
        if self.distance == "l2_squared":
            gap = gap.square()
        if self.filter_outliers and gap.shape[-1] > 1:
            effort = text.square().sum(-1)
            outlier = torch.ones_like(gap, dtype=torch.bool)
            for x in (gap, effort):
                outlier &= x > x.mean(-1, keepdim=True) + x.std(-1, keepdim=True)
            gap = gap.masked_fill(outlier, 0.0)
        chosen = gap > gap.median(-1, keepdim=True).values
        return torch.where(chosen, self.alpha, 1.0)
