"""Shared by pruning methods that rank by attention: what may be done to the score before anything is chosen."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal, Self

from torch import Tensor

from vlm_attn.errors import MissingProfileError
from vlm_attn.profiles import Profile
from vlm_attn.selection import exp_trend, grid_trend, mean_map
from vlm_attn.stages import Prune, PruneView, RowScore, Site, method_dataclass

Positional = Literal["exp_trend", "grid_trend", "mean_map", "pad_mask"]
Calibrator = Positional | Literal["rope_free", "rope_ones"]
TRENDS = ("exp_trend", "grid_trend", "mean_map", "fastv_released")
TOLERANCE = 0.1
"""Exponent that a calibration may leave in its own debiased scores, at most (the published self-check)."""


@method_dataclass
class Debiased(Prune):
    """Attention debiasing of the first stage's score (arXiv 2508.17807) and its rotary variants.

    ``exp_trend``: ``a_i * exp(-sigma * x_i)`` with ``x_i = i / (N - 1)``, per view (tile canvas, frame) of the
    picture; sigma per checkpoint, from a profile.
    ``grid_trend``: ``a_i * exp(-sigma_row y_i - sigma_column x_i)`` with (y, x) in [0, 1] the row and column in
    the view [ours: for positions of several axes, M-RoPE]; both exponents per checkpoint, from a profile.
    ``mean_map``: ``a_i / (mean_i + 1e-7)`` with the mean of the same score over calibration pictures, place by place,
    instead of a curve [unverified]; per checkpoint and picture size, from a profile.
    ``pad_mask``: tokens that show only padding (more than half of the cell) are never chosen, so an image may keep
    fewer than its budget. ``rope_free``: queries and keys before the rotary embedding, softmax over the visual keys
    alone. ``rope_ones``: weights divided by what RoPE leaves of all-ones vectors, clamped at 0.1.
    """

    calibrate: Sequence[Calibrator] = ()
    sigma: float | None = None
    grid_sigma: tuple[float, float] | None = None
    mean: Sequence[float] | None = None

    @property
    def wants_padding(self) -> bool:  # type: ignore[override]
        return "pad_mask" in self.calibrate

    def first(self, layer: int, **how: Any) -> RowScore:
        """The first stage's reading, with the rotary variant that ``calibrate`` asks for."""
        free, ones = "rope_free" in self.calibrate, "rope_ones" in self.calibrate
        if free and ones:
            raise ValueError(f"{self.name}: rope_free and rope_ones exclude each other; choose one")
        if free or ones:
            how["rope"] = "free" if free else "ones"
        return RowScore(layer, **how)

    def with_trend(self, profile: Profile) -> Self:
        """The method with what ``calibrate`` needs read from the profile: exponents or a mean map."""
        asked = [word for word in TRENDS if word in self.calibrate]
        if len(asked) > 1:
            raise ValueError(f"{self.name}: {asked[0]} and {asked[1]} both take out the trend; choose one")
        if asked == ["exp_trend"] and self.sigma is None:
            record = self._record(profile)
            self._check(record.get("sigma_after", 0.0))
            return self.with_values(sigma=float(record["sigma"]))
        if asked == ["grid_trend"] and self.grid_sigma is None:
            record = self._record(profile)
            if not record.get("grid_sigma"):
                raise MissingProfileError(
                    f"{self.name}: the profile holds no exponents of rows and columns (it is older, or the model's "
                    "visual tokens form no grid); calibrate again, or give grid_sigma"
                )
            self._check(*record.get("grid_sigma_after", ()))
            return self.with_values(grid_sigma=tuple(float(value) for value in record["grid_sigma"]))
        if asked == ["mean_map"] and self.mean is None:
            mean = self._record(profile).get("mean")
            if not mean:
                raise MissingProfileError(
                    f"{self.name}: the profile holds no mean map (it is older, or its pictures had several sizes); "
                    "calibrate again, or give mean"
                )
            return self.with_values(mean=tuple(float(value) for value in mean))
        return self

    def _check(self, *left: float) -> None:
        """Warns of exponents that a calibration found in its own debiased scores."""
        worst = max(map(float, left), key=abs, default=0.0)
        if abs(worst) >= TOLERANCE:
            warnings.warn(
                f"{self.name}: the calibration of '{self.trend_id}' failed its self-check (an exponent of {worst:.2f} "
                f"is left, less than {TOLERANCE} should be): the trend of this score is hardly exponential; "
                "calibrate=['mean_map'] needs no curve",
                stacklevel=3,
            )

    def _record(self, profile: Profile) -> dict[str, Any]:
        return profile.need(f"trend:{self.trend_id}", self.name)

    def scored(self) -> Site:
        """The first site that reads attention."""
        return next(site for site in self.sites() if site.score is not None)

    @property
    def trend_id(self) -> str:
        """Name in profiles of the score whose trend is taken out."""
        score = self.scored().score
        return score.id if score else ""

    def ranking(self, view: PruneView) -> Tensor:
        """fp32 ``[B, N]`` scores of a site before debiasing, asked for once per site."""
        if view.scores is None:
            raise ValueError(f"{self.name} ran without its attention score: the layer it reads was skipped")
        return view.scores

    def debiased(self, view: PruneView) -> Tensor:
        """fp32 ``[B, N]`` scores of a site; later stages are left as they are."""
        scores = self.ranking(view)
        return self.without_trend(view, scores) if view.site == self.scored() else scores

    def without_trend(self, view: PruneView, scores: Tensor) -> Tensor:
        """Scores with their trend taken out, as far as ``calibrate`` asks for it."""
        if "exp_trend" in self.calibrate and self.sigma is not None:
            return exp_trend(view.tokens, scores, self.sigma)
        if "grid_trend" in self.calibrate and self.grid_sigma is not None:
            return grid_trend(view.tokens, scores, self.grid_sigma)
        if "mean_map" in self.calibrate and self.mean is not None:
            return mean_map(view.tokens, scores, self.mean, self.name)
        return scores

    def shown(self, view: PruneView) -> Tensor | None:
        """Visual tokens that may be chosen, or None."""
        return view.visible if "pad_mask" in self.calibrate else None
