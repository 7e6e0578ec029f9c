"""Builds ``results.json`` from the harness's figures and the stored samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vlm_attn.evaluation.config import BenchmarkEntry, EvalConfig, method_hash
from vlm_attn.evaluation.curves import curves
from vlm_attn.evaluation.recorder import RunRecorder
from vlm_attn.evaluation.summary import compare, decoder_tokens, kept_tokens, latency, pope_averages, rater_for

__all__ = ["HARNESS_KEYS", "assemble"]

POPE_SPLITS = ("random", "popular", "adversarial")
HARNESS_KEYS = ("configs", "versions", "n-shot", "n-samples", "higher_is_better", "group_subtasks")


def assemble(
    config: EvalConfig,
    described: Mapping[str, Any],
    harness: Mapping[str, Mapping[str, Any]],
    recorder: RunRecorder,
    failed: Mapping[str, str],
    identity: Mapping[str, Any],
) -> dict[str, Any]:
    """The whole content of ``results.json``. Everything but ``latency`` and ``env`` is a function of the samples.

    ``identity`` is what `runner` keeps in ``run.json``: environment, and each method with its calibrated values.
    """
    env, calibrated = identity.get("env", {}), identity.get("methods", {})
    baseline = config.methods[0].label
    options = {"seed": config.seed, "resamples": config.resamples}
    scores: dict[str, Any] = {}
    paired: dict[str, Any] = {}
    times: dict[str, Any] = {}
    kept: dict[str, Any] = {}
    work: dict[str, Any] = {}
    for label in harness:
        digest = method_hash(described[label])
        for part in (scores, times, kept, work):
            part[label] = {}
        for benchmark in config.benchmarks:
            task = benchmark.name
            rows = recorder.samples(digest, task)
            times[label][task] = latency(recorder.timings(digest, task), config.warmup)
            kept[label][task] = kept_tokens(rows)
            work[label][task] = decoder_tokens(rows)
            rater = rater_for(task, config.parser, config.data_of(benchmark))
            if rater is None or not rows:
                continue
            scores[label][task] = rater.score(rows, **options)
            if label != baseline:
                before = recorder.samples(method_hash(described[baseline]), task)
                paired.setdefault(label, {})[task] = {"baseline": baseline, **compare(rater, before, rows, **options)}

    def samples(label: str, task: str) -> list[dict[str, Any]]:
        return recorder.samples(method_hash(described[label]), task)

    points = curves(config, described, samples, list(harness))
    first = next(iter(harness.values()), {})
    return {
        "results": {label: result["results"] for label, result in harness.items()},
        **{key: first.get(key, {}) for key in HARNESS_KEYS},
        "lmms_eval_version": env.get("versions", {}).get("lmms-eval"),
        "model": config.model,
        "baseline": baseline,
        "config": config.resolved(),
        "method": {
            label: {"config": spec, "hash": method_hash(spec), "resolved": calibrated.get(method_hash(spec))}
            for label, spec in described.items()
        },
        "scores": scores,
        "pope_averages": {label: means for label, tasks in scores.items() if (means := pope_averages(tasks))},
        "paired": paired,
        "pooled": _pooled(config, list(harness), samples, options),
        "curves": points,
        "kept_tokens": kept,
        "decoder_tokens": work,
        "latency": times,
        "failed": dict(failed),
        "env": dict(env),
    }


def _pooled(
    config: EvalConfig,
    labels: Sequence[str],
    samples: Callable[[str, str], list[dict[str, Any]]],
    options: Mapping[str, Any],
) -> dict[str, dict[str, Any]]:
    """POPE over all splits of a source at once: scores, and the paired difference to the baseline.

    Splits share their pictures, which the bootstrap draws together.
    """
    out: dict[str, dict[str, Any]] = {label: {} for label in labels}
    for source, splits in _sources(config).items():
        rater = rater_for(splits[0].name, config.parser, config.data_of(splits[0]))
        rows = {label: [row for split in splits for row in samples(label, split.name)] for label in labels}
        if rater is None or not all(rows.values()):
            continue
        baseline = config.methods[0].label
        for label in labels:
            out[label][source] = {"splits": [split.name for split in splits], **rater.score(rows[label], **options)}
            if label != baseline:
                out[label][source]["paired"] = {
                    "baseline": baseline,
                    **compare(rater, rows[baseline], rows[label], **options),
                }
    return {label: pools for label, pools in out.items() if pools}


def _sources(config: EvalConfig) -> dict[str, list[BenchmarkEntry]]:
    """POPE benchmarks by what their splits share (``scenes_pope``, ``local_pope_coco``), with two splits or more."""
    out: dict[str, list[BenchmarkEntry]] = {}
    for benchmark in config.benchmarks:
        source, _, split = benchmark.name.rpartition("_")
        if split in POPE_SPLITS and "pope" in source:
            out.setdefault(source, []).append(benchmark)
    return {source: splits for source, splits in out.items() if len(splits) > 1}
