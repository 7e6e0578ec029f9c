"""FastV: drop the visual tokens that the last prompt token attends to least."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from vlm_attn.kit.calibrators import fastv_released
from vlm_attn.profiles import Profile
from vlm_attn.selection import Auto, Keep, Per, affordable, select, top_k, weighted
from vlm_attn.stages import ModelInfo, PruneView, Site, check_layer, method_dataclass

from ._debias import Calibrator, Debiased


@method_dataclass
class FastV(Debiased):
    """Keeps the visual tokens with the largest attention from the last prompt token one layer earlier.

    Formula: ``a_i = mean_h A^(K-1)[h, last, i]`` (post-softmax, fp32, over all keys); per image the top
    ``round(keep * N)`` (or ``keep`` if it is a count) stay, in raster order.

    Acts at the input of decoder layer K = ``layer``, prefill only: layers < K process and cache every token, layers
    >= K the kept ones; original positions are kept and decoding continues from the original length (variant (c) of
    the released code). Text is never dropped.

    Attention debiasing (arXiv 2508.17807) changes the ranking score only:
        ``exp_trend``: ``a_i * exp(-sigma * x_i)`` with ``x_i = i / (N - 1)``; sigma per checkpoint from a profile.
        ``grid_trend``, ``mean_map``: a trend of rows and one of columns, or a mean place by place, instead.
        ``fastv_released``: the authors' weights for LLaVA-1.5-7B, the inverse of a cubic in x, instead.
        ``pad_mask``: tokens that show only padding (more than half of the cell) get score 0 and are never chosen, so
        an image may keep fewer than its budget.

    Attributes:
        layer: K, 0-based, at least 1 (the score comes from layer K-1).
        keep: tokens kept per image: a count, a share in (0, 1], or ``"auto"``, as few as hold 99 % of the score's mass
            on the image (``"auto:0.95"`` for 95 %), or ``"auto:30ms"``, as many as let the decoder's prefill take
            30 ms by times measured at attach [ours].
        per: ``"image"``, or ``"view"``: the budget is split over tiles or frames by their size [ours].
        calibrate: any of ``exp_trend``, ``grid_trend``, ``mean_map`` or ``fastv_released``, ``pad_mask``,
            ``rope_free``, ``rope_ones``.
        sigma: strength of the positional trend; None reads it from the checkpoint's profile.
        grid_sigma: the same for ``grid_trend``, of rows and of columns.
        mean: mean map; None reads it from the checkpoint's profile.

    Source: arXiv 2403.06764; debiasing arXiv 2508.17807.
    Deviations: the score is the last row, as the code does (the paper's text averages over tokens); ties go to the
    earlier token; with an edit attached, the score reads the weights before segment mixes.
    """

    name = "fastv"
    summary = "prune visual tokens by last-token attention at an early layer"
    paper = "arXiv:2403.06764"
    needs = ("trend (only with calibrate=['exp_trend'])",)

    layer: Annotated[int, Field(ge=1)] = 2
    keep: Keep | Auto = 0.5
    per: Per = "image"
    calibrate: Sequence[Calibrator | Literal["fastv_released"]] = ()  # type: ignore[assignment]

    @classmethod
    def neutral(cls) -> FastV:
        return cls(layer=1, keep=1.0)

    def resolve(self, model: ModelInfo, profile: Profile) -> FastV:
        check_layer(self.name, "layer", self.layer, model, lowest=1)
        return self.with_trend(profile)

    def sites(self) -> tuple[Site, ...]:
        return (Site(self.layer, self.first(self.layer - 1)),)

    def without_trend(self, view: PruneView, scores: Tensor) -> Tensor:
        if "fastv_released" in self.calibrate:
            return weighted(view.tokens, scores, fastv_released)
        return super().without_trend(view, scores)

    def keep_mask(self, view: PruneView) -> Tensor:
        scores = self.debiased(view)
        return select(view.tokens, affordable(view, self.keep), top_k(scores), self.shown(view), scores, self.per)
