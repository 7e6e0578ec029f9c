"""Score against kept visual tokens: the columns of sweeps, each with its control and its plain twin.

Columns of one ``series`` (a sweep, or a name given in the config) form a curve. Their place on it is the share of
visual tokens that was measured, mean over decoder layers and samples, not the nominal budget.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vlm_attn.evaluation.config import EvalConfig
from vlm_attn.evaluation.summary import Rater, Row, compare, intervals, kept_tokens, rater_for

__all__ = ["CURVED", "NEAR", "curves"]

CURVED = {"pope": ("accuracy",), "chair": ("chair_i", "recall")}
"""Metrics of a curve per kind of benchmark."""
NEAR = 0.05
"""A control stands beside a column if their kept shares differ by no more than this."""
_DEBIASING = ("calibrate", "sigma", "grid_sigma", "mean")
_CONTROL = "random_prune"

Samples = Callable[[str, str], Sequence[Row]]


def curves(
    config: EvalConfig, described: Mapping[str, Any], samples: Samples, labels: Sequence[str]
) -> dict[str, Any]:
    """Every column that lies on a curve, and the baseline, by label; empty without a series.

    POPE is pooled over its splits: its accuracy is their mean where they are equally long. Splits share pictures and
    half of their questions, so intervals come from resampling pictures, for accuracy too.

    Args:
        described: the method of each column, every default filled in.
        samples: (label, task) -> answered samples.
        labels: columns that were finished.

    Returns:
        per label ``series``, ``method``, ``debiased``, ``share``, ``scores`` (metric -> interval), and the paired
        differences (metric -> interval with p) ``to_control`` and, for a debiased column, ``to_plain``, with the
        labels of ``control`` and ``plain`` (None where there is none).
    """
    series = {entry.label: entry.series for entry in config.methods if entry.series and entry.label in labels}
    if not series:
        return {}
    baseline = config.methods[0].label
    pools = _pools(config)
    rows = {
        label: {kind: [row for task in tasks for row in samples(label, task)] for kind, (tasks, _) in pools.items()}
        for label in (baseline, *series)
    }
    kept = {label: kept_tokens([row for part in parts.values() for row in part]) for label, parts in rows.items()}
    options = {"seed": config.seed, "resamples": config.resamples}

    def difference(label: str, other: str | None) -> dict[str, Any]:
        if other is None:
            return {}
        found = {kind: compare(rater, rows[other][kind], rows[label][kind], **options)["difference"]
                 for kind, (_, rater) in pools.items()}  # fmt: skip
        return {metric: found[kind][metric] for kind in pools for metric in CURVED[kind]}

    out: dict[str, Any] = {}
    for label in rows:
        scores = {kind: _intervals(rater, rows[label][kind], options) for kind, (_, rater) in pools.items()}
        plain = _plain_twin(label, described, series)
        control = _control(label, described, {key: value["keep_ratio"] for key, value in kept.items() if value})
        out[label] = {
            "series": series.get(label, ""),
            "method": "+".join(part["name"] for part in _parts(described[label])),
            "debiased": _debiased(described[label]),
            "share": kept[label].get("keep_ratio"),
            "scores": {metric: scores[kind][metric] for kind in pools for metric in CURVED[kind]},
            "control": control,
            "to_control": difference(label, control),
            "plain": plain,
            "to_plain": difference(label, plain),
        }
    return out


def _intervals(rater: Rater, samples: Sequence[Row], options: Mapping[str, int]) -> dict[str, dict[str, float]]:
    clusters = [rater.cluster(row) for row in samples]
    return intervals(rater.rows(samples), clusters, rater.statistics, {}, **options)


def _pools(config: EvalConfig) -> dict[str, tuple[list[str], Rater]]:
    """Benchmarks of each kind that curves show, with the rater of all of them; of CHAIR the first only."""
    out: dict[str, tuple[list[str], Rater]] = {}
    for benchmark in config.benchmarks:
        rater = rater_for(benchmark.name, config.parser, config.data_of(benchmark))
        if rater is None or rater.kind not in CURVED:
            continue
        tasks, _ = out.setdefault(rater.kind, ([], rater))
        if not tasks or rater.kind == "pope":
            tasks.append(benchmark.name)
    return out


def _parts(described: Any) -> list[dict[str, Any]]:
    return described if isinstance(described, list) else [described] if described else []


def _debiased(described: Any) -> bool:
    return any(part.get("calibrate") for part in _parts(described))


def _undebiased(described: Any) -> str:
    """What two columns share that differ in their debiasing alone."""
    parts = [{key: value for key, value in part.items() if key not in _DEBIASING} for part in _parts(described)]
    return json.dumps(parts, sort_keys=True, default=str)


def _plain_twin(label: str, described: Mapping[str, Any], series: Mapping[str, str]) -> str | None:
    if not _debiased(described[label]):
        return None
    alike = (other for other in series if not _debiased(described[other])
             and _undebiased(described[other]) == _undebiased(described[label]))  # fmt: skip
    return next(alike, None)


def _control(label: str, described: Mapping[str, Any], shares: Mapping[str, float]) -> str | None:
    """The random control whose kept share is nearest, if it is near; None for the baseline and for itself."""

    def random(other: str) -> bool:
        return [part["name"] for part in _parts(described[other])] == [_CONTROL]

    if not described[label] or random(label) or label not in shares:
        return None
    near = [(abs(shares[other] - shares[label]), other) for other in shares if random(other)]
    gap, control = min(near, key=lambda pair: pair[0], default=(1.0, None))
    return control if gap <= NEAR else None
