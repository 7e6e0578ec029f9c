"""``vlm-attn compare A B``: two result folders, sample by sample.

The difference of every metric with its interval (bootstrap over pictures, the same pictures on both sides), McNemar's
test on yes/no answers, and p-values adjusted for the number of comparisons. Runs that asked other questions, in other
words or with other generation settings are refused by name: their difference would not be the method's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from vlm_attn.evaluation import tables
from vlm_attn.evaluation.config import BASELINE
from vlm_attn.evaluation.folders import ResultFolder, read_folder
from vlm_attn.evaluation.matching import unknown_name
from vlm_attn.evaluation.statistics import holm
from vlm_attn.evaluation.summary import compare

__all__ = ["compare_folders", "comparison_table"]

_FREE = ("machine", "system", "cpus", "threads")


def compare_folders(
    first: str, second: str, *, a: str | None = None, b: str | None = None, resamples: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """Paired comparison of two runs; differences are second minus first.

    Args:
        first, second: result folders.
        a, b: the columns to compare; default: every column that both have.
        resamples, seed: of the bootstrap.

    Raises:
        ValueError: no common column or benchmark, or samples and protocols that differ (all of them are named).
    """
    runs = read_folder(first), read_folder(second)
    columns = _columns(*runs, a, b)
    problems: list[str] = []
    pairs: list[dict[str, Any]] = []
    for left, right in columns:
        tasks = [task for task in runs[0].tasks(left) if task in runs[1].tasks(right)]
        for task in tasks:
            if reason := _difference(*runs, left, right, task):
                problems.append(f"  {left} / {right} on {task}: {reason}")
                continue
            rater = runs[0].rater(task)
            rows = runs[0].samples[left, task], runs[1].samples[right, task]
            pairs.append({"a": left, "b": right, "task": task, "kind": rater.kind,
                          "scores": [run.results["scores"][label][task]["metrics"]
                                     for run, label in zip(runs, (left, right), strict=True)],
                          **compare(rater, *rows, seed=seed, resamples=resamples)})  # fmt: skip
    if problems:
        raise ValueError("\n".join([f"The runs differ in more than the method ({len(problems)} times):", *problems]))
    if not pairs:
        raise ValueError("The two runs have no benchmark in common.")
    for pair, p in zip(pairs, holm([tables.p_value(pair) for pair in pairs]), strict=True):
        pair["p_holm"] = p
    return {
        "folders": [str(run.path) for run in runs],
        "models": [run.results["model"] for run in runs],
        "environment": _environments(*runs),
        "resamples": resamples,
        "pairs": pairs,
    }


def _columns(first: ResultFolder, second: ResultFolder, a: str | None, b: str | None) -> list[tuple[str, str]]:
    for run, label in ((first, a), (second, b)):
        if label is not None and label not in run.columns:
            raise ValueError(f"{run.path}: {unknown_name('column', label, run.columns)}")
    if a is not None or b is not None:
        return [(a or b or BASELINE, b or a or BASELINE)]
    common = [label for label in first.columns if label in second.columns]
    if not common:
        raise ValueError(
            f"No column is in both runs ({', '.join(first.columns)}; {', '.join(second.columns)}): name them with "
            "--a and --b."
        )
    return [(label, label) for label in common]


def _difference(first: ResultFolder, second: ResultFolder, a: str, b: str, task: str) -> str:
    """Why two columns cannot be compared on a benchmark; empty if they can."""
    before, after = first.samples[a, task], second.samples[b, task]
    ids = [{row["doc_id"] for row in rows} for rows in (before, after)]
    if ids[0] != ids[1]:
        only = [len(ids[0] - ids[1]), len(ids[1] - ids[0])]
        return f"other samples ({only[0]} only in the first run, {only[1]} only in the second)"
    for one, two in zip(before, after, strict=True):
        where = f"sample {one['doc_id']}"
        if one["prompt"] != two["prompt"]:
            return f"another prompt, {where}: {one['prompt'][-80:]!r} and {two['prompt'][-80:]!r}"
        if one["doc_hash"] != two["doc_hash"]:
            return f"another question or truth, {where}"
        if one["settings"] != two["settings"]:
            return f"other generation settings, {where}: {one['settings']} and {two['settings']}"
        if one["seed"] != two["seed"] and one["settings"].get("do_sample"):
            return f"sampled with other seeds ({one['seed']} and {two['seed']})"
    parsers = [run.results["scores"][label][task].get("parser") for run, label in ((first, a), (second, b))]
    return f"read by other parsers ({parsers[0]} and {parsers[1]})" if parsers[0] != parsers[1] else ""


def _environments(first: ResultFolder, second: ResultFolder) -> dict[str, Any]:
    """What else differs: versions, device, dtype, attention; said, not refused."""
    one, two = (dict(run.results["env"]) for run in (first, second))
    flat = [{**env, **env.pop("versions", {})} for env in (one, two)]
    keys = sorted({*flat[0], *flat[1]} - set(_FREE))
    return {key: [env.get(key) for env in flat] for key in keys if flat[0].get(key) != flat[1].get(key)}


def comparison_table(result: Mapping[str, Any]) -> RenderableType:
    """The comparison for the terminal."""
    title = f"{result['folders'][1]} minus {result['folders'][0]}"
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold", box=box.SIMPLE_HEAD,
                  pad_edge=False)  # fmt: skip
    for name in ("method", "benchmark", "metric", "A", "B", "difference [95 %]", "p", "p (Holm)", "same text"):
        table.add_column(name, justify="left" if name in ("method", "benchmark", "metric") else "right")
    for pair in result["pairs"]:
        label = pair["a"] if pair["a"] == pair["b"] else f"{pair['a']} / {pair['b']}"
        for place, metric in enumerate(tables.METRICS[pair["kind"]]):
            difference = pair["difference"][metric]
            head = metric == tables.COMPARED[pair["kind"]]
            p = tables.p_value(pair) if head else difference["p"]
            low, high = (tables.shown(metric, difference[end]) for end in ("low", "high"))
            table.add_row(
                escape(label) if not place else "", pair["task"] if not place else "", tables.title(metric),
                *(tables.shown(metric, score[metric]) for score in pair["scores"]),
                f"{tables.shown(metric, difference['value'])} \\[{low}, {high}]", f"{p:.3f}",
                f"{pair['p_holm']:.3f}" if head else "", f"{100 * pair['same_text']:.0f} %" if not place else "",
            )  # fmt: skip
    other = "; ".join(f"{key}: {one} and {two}" for key, (one, two) in result["environment"].items())
    notes = [
        f"B minus A, paired by sample; intervals and p from a bootstrap over pictures ({result['resamples']} "
        "resamples), for yes/no benchmarks McNemar's p on the main metric.",
        f"Holm: adjusted for the {len(result['pairs'])} comparison(s) of main metrics; the other p are not adjusted.",
        *([f"Models: {result['models'][0]} and {result['models'][1]}."] if len(set(result["models"])) > 1 else []),
        *([f"The environments differ: {other}."] if other else []),
    ]
    return Group(table, *(Text(note, style="dim") for note in notes))
