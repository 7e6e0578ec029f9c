"""CARVE: crop the picture to what the question makes the model look at, and ask again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
from PIL import Image
from pydantic import Field
from scipy import ndimage

from vlm_attn.readouts.maps import GENERAL, attention_map, contrast_map, default_layers
from vlm_attn.stages import ModelInfo, Probe, Refine, check_layer, method_dataclass

SUFFIX = " Answer the question using a single word or phrase."


@method_dataclass
class Carve(Refine):
    """Contrastive attention refinement: divide the question's attention by that of a general instruction, crop, ask.

    ``S = sum_t w_t sum_l a^Q_{l,t} / (a^G_{l,t} + lambda)`` on the visual grid, bilinear to pixels. The highest
    share ``top`` of pixels is split into 4-connected regions; the ``regions`` with the largest sum of S stay. The
    picture is blacked out elsewhere, cropped to their box and enlarged (Lanczos, aspect kept). Two extra greedy
    passes, methods suspended; attention is head-mean, post-softmax, newest row, fp32.

    Acts on the picture before the processor (``vlm.ask``); ``generate`` alone refuses.

    Attributes:
        layers: decoder layers; None means 20..25, or the span 0.62 L .. 0.80 L of shallower models [ours].
        mode: ``"t_start"``, ``"t_end"`` (default, best in the paper; absent from the code) or ``"T_full"``.
        steps: most new tokens of the two passes.
        top: share of pixels above the threshold (1 = whole picture, no change); 0.2 code, 0.4 best in the paper.
        regions: at most so many regions (paper; the code has a minimum instead).
        lam, lam_rel: lambda, and lambda relative to the mean of a^G [ours].
        pictures: ``"both"`` asks with [original, refined] (code), ``"refined"`` with the refined one (Algorithm 1).
        suffix: text appended to question and general instruction in the two passes, as the code does.
        general: the general instruction.
        skip_correlation: no refinement when a^Q and a^G correlate above this [ours]; None = never skip.
        stretch: lay the grid over the whole picture, ignoring crop and padding, as the papers do.

    Source: arXiv 2509.06461 and its released code; ViCrop arXiv 2502.17422.
    Deviations: grid-to-pixel mapping undoes crop and padding unless ``stretch``; a nearly constant S keeps the
    picture; a cache is used (same rows).
    """

    name = "carve"
    summary = "crop to the question-specific region of contrastive attention, then ask again"
    paper = "arXiv:2509.06461"

    layers: Sequence[Annotated[int, Field(ge=0)]] | None = None
    mode: Literal["t_start", "t_end", "T_full"] = "t_end"
    steps: Annotated[int, Field(ge=1)] = 32
    top: Annotated[float, Field(gt=0, le=1)] = 0.2
    regions: Annotated[int, Field(ge=1)] = 3
    lam: Annotated[float, Field(gt=0)] = 1e-8
    lam_rel: Annotated[float, Field(ge=0)] = 0.0
    pictures: Literal["both", "refined"] = "both"
    suffix: str = SUFFIX
    general: str = GENERAL
    skip_correlation: Annotated[float, Field(gt=0, le=1)] | None = 0.98
    stretch: bool = False

    @classmethod
    def neutral(cls) -> Carve:
        return cls(top=1.0)

    @property
    def active(self) -> bool:
        return self.top < 1

    def resolve(self, model: ModelInfo, profile: object) -> Carve:
        for layer in self.layers or ():
            check_layer(self.name, "layers", layer, model)
        return self.with_values(layers=tuple(self.layers or default_layers(model.layers)))

    def refine(self, images: list[Image.Image], text: str, probe: Probe) -> tuple[list[Image.Image], str]:
        refined = [self._refine(image, text, probe) for image in images]
        extra = [new for new, old in zip(refined, images, strict=True) if new is not old]
        if self.pictures == "refined" or not extra:
            return refined, text
        return [*images, *extra], text

    def _refine(self, image: Image.Image, text: str, probe: Probe) -> Image.Image:
        question, general = text + self.suffix, self.general + self.suffix
        if self.skip_correlation is not None:
            pair = [attention_map(probe, image, t, layers=self.layers) for t in (question, general)]
            if float(np.corrcoef(np.stack(pair))[0, 1]) > self.skip_correlation:
                return image
        values = contrast_map(
            probe,
            image,
            question,
            general=general,
            layers=self.layers,
            mode=self.mode,
            steps=self.steps,
            lam=self.lam,
            lam_rel=self.lam_rel,
        )
        mask = region_mask(probe.to_pixels(values, image, stretch=self.stretch), self.top, self.regions)
        return image if mask is None else cut_out(image, mask)


def region_mask(score: np.ndarray, top: float, regions: int) -> np.ndarray | None:
    """bool ``(H, W)`` of the best 4-connected regions above the (1 - top)-quantile; None for a constant score."""
    if float(np.ptp(score)) <= 1e-3 * float(np.abs(score).max()):
        return None
    above = score >= np.quantile(score, 1 - top)
    labels, count = ndimage.label(above)
    if count == 0:
        return None
    sums = ndimage.sum_labels(score, labels, index=np.arange(1, count + 1))
    best = np.argsort(-sums, kind="stable")[:regions] + 1
    return np.isin(labels, best)


def cut_out(image: Image.Image, mask: np.ndarray) -> Image.Image:
    """The picture blacked out outside ``mask``, cropped to its box and enlarged until one side fills the original."""
    pixels = np.asarray(image.convert("RGB")) * mask[..., None]
    ys, xs = np.nonzero(mask)
    box = (int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1)
    width, height = box[2] - box[0], box[3] - box[1]
    scale = max(image.width / width, image.height / height)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return Image.fromarray(pixels.astype(np.uint8)).crop(box).resize(size, Image.Resampling.LANCZOS)
