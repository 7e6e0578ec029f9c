"""Result tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from vlm_attn.evaluation.compute import relative
from vlm_attn.evaluation.statistics import holm
from vlm_attn.evaluation.summary import LOWER_IS_BETTER

__all__ = [
    "COMPARED",
    "METRICS",
    "adjusted",
    "half_width",
    "milliseconds",
    "p_value",
    "result_tables",
    "shown",
    "title",
    "verdict",
    "work",
]

METRICS: dict[str, tuple[str, ...]] = {
    "pope": ("accuracy", "precision", "recall", "f1", "yes_ratio"),
    "chair": ("chair_s", "chair_i", "recall", "precision", "len_words"),
    "mme": ("score", "acc", "acc_plus"),
    "amber_g": ("chair", "cover", "hal", "cog", "len_words"),
    "amber_d": ("accuracy", "precision", "recall", "f1", "unknown_rate"),
    "hallusion": ("a_acc", "f_acc", "q_acc", "a_acc_all", "q_acc_all"),
    "mmhal": ("len_words", "empty_rate"),
}
"""What full tables show; the terminal leaves out `_WIDE` to fit."""
COMPARED = {"pope": "accuracy", "chair": "chair_i", "mme": "acc", "amber_g": "chair", "amber_d": "accuracy",
            "hallusion": "a_acc", "mmhal": "empty_rate"}  # fmt: skip
"""The metric whose paired difference is shown."""
_WIDE = ("precision",)
_NAMES = {
    "accuracy": "acc",
    "chair_s": "CHAIRs",
    "chair_i": "CHAIRi",
    "f1": "F1",
    "yes_ratio": "yes",
    "len_words": "words",
    "acc_plus": "acc+",
    "chair": "CHAIR",
    "unknown_rate": "unknown",
    "a_acc": "aAcc",
    "f_acc": "fAcc",
    "q_acc": "qAcc",
    "a_acc_all": "aAcc (all)",
    "q_acc_all": "qAcc (all)",
    "empty_rate": "empty",
    "f1_random_minus_adversarial": "F1 random - adversarial",
}
_ABSOLUTE = ("len_words", "len_tokens", "score")


FEW_PICTURES = 30


def few_pictures(n: int) -> str:
    """What to say about bootstrap intervals from a handful of pictures."""
    return (
        f"As few as {n} picture{'s' * (n != 1)} in a benchmark: intervals from resampling so few are too narrow. "
        "This run shows that things work; take conclusions from a larger one."
    )


def title(name: str) -> str:
    """A metric's column title."""
    return _NAMES.get(name, name)


def shown(name: str, value: float) -> str:
    """A metric as it is printed: percent, except lengths and MME scores."""
    return f"{value:.1f}" if name in _ABSOLUTE else f"{100 * value:.1f}"


def half_width(name: str, interval: Mapping[str, float]) -> str:
    return shown(name, (interval["high"] - interval["low"]) / 2)


def milliseconds(times: Mapping[str, Any], name: str) -> str:
    """A median time in ms, one digit below 10 ms."""
    if name not in times:
        return "-"
    value = 1000 * times[name]["median"]
    return f"{value:.1f}" if value < 10 else f"{value:.0f}"


def result_tables(results: Mapping[str, Any]) -> RenderableType:
    """One table per benchmark: scores with 95 % half-widths, difference to the baseline, tokens kept, latency."""
    parts: list[RenderableType] = []
    for benchmark in results["config"]["benchmarks"]:
        task = benchmark["name"]
        rows = {label: tasks[task] for label, tasks in results["scores"].items() if task in tasks}
        parts.append(_scored(results, task, rows) if rows else _plain(results, task))
    if results.get("pope_averages"):
        parts.append(_averages(results["pope_averages"]))
    for label, message in results["failed"].items():
        parts.append(Text(f"{label}: not finished ({message})", style="red"))
    pictures = [score["images"] for tasks in results["scores"].values() for score in tasks.values()]
    if pictures and min(pictures) < FEW_PICTURES:
        parts.append(Text(few_pictures(min(pictures)), style="yellow"))
    parts.append(
        Text(
            "Percent, ± half of the 95 % interval (bootstrap over pictures; Wilson for acc and CHAIRs). Δ and p are "
            "paired with the baseline; * interval without 0 (and McNemar p < 0.05), not corrected for the number of "
            "methods. "
            "CHAIR: lower is better, read it with recall and length. Kept: visual tokens, mean over layers. Times: "
            "median ms (first token, per further token, whole sample).",
            style="dim",
        )
    )
    return Group(*parts)


def _scored(results: Mapping[str, Any], task: str, rows: Mapping[str, Any]) -> Table:
    first = next(iter(rows.values()))
    kind = first["kind"]
    reading = f", parser {first['parser']}" if "parser" in first else ""
    table = Table(
        title=f"{task}  (n = {first['n']}, {first['images']} pictures{reading})",
        title_justify="left",
        title_style="bold",
        header_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    names = [name for name in METRICS[kind] if name not in _WIDE]
    table.add_column("method", overflow="fold")
    for name in names:
        table.add_column(title(name), justify="right", no_wrap=True)
    compared = COMPARED[kind]
    for name in (f"Δ {title(compared)} [95 %]", "p", "kept", "1st ms", "ms/tok", "ms"):
        table.add_column(name, justify="right", no_wrap=True)
    for label, score in rows.items():
        cells = [label]
        for name in names:
            spread = f"±{half_width(name, score['intervals'][name])}"
            cells.append(f"{shown(name, score['metrics'][name])}[dim]{spread}[/dim]")
        pair = results["paired"].get(label, {}).get(task)
        if pair:
            cells += [_difference(compared, pair), f"{p_value(pair):.3f}"]
        else:
            cells += ["", ""]
        kept, times = results["kept_tokens"][label].get(task, {}), results["latency"][label].get(task, {})
        cells.append(f"{kept['kept_tokens']:.0f}" if kept else "-")
        cells += [milliseconds(times, name) for name in ("first_token_s", "decode_s_per_token", "total_s")]
        table.add_row(*cells)
    return table


def _averages(means: Mapping[str, Mapping[str, float]]) -> Table:
    """POPE over its splits: plain means, and the fall of F1 from random to adversarial."""
    table = Table(title="POPE, mean of the splits", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True,
                  title_justify="left", title_style="bold", header_style="bold")  # fmt: skip
    names = ("accuracy", "f1", "yes_ratio", "f1_random_minus_adversarial")
    table.add_column("method", overflow="fold")
    for name in names:
        table.add_column(title(name), justify="right", no_wrap=True)
    for label, row in means.items():
        table.add_row(label, *(shown(name, row[name]) if name in row else "-" for name in names))
    return table


def work(results: Mapping[str, Any], label: str, task: str) -> str:
    """Decoder work per sample as a multiple of the baseline's."""
    share = relative(results, label, [task])
    return "–" if share is None else f"{share:.2f}"


def p_value(pair: Mapping[str, Any]) -> float:
    """The p-value of a comparison's main metric: McNemar's on yes/no answers, else the bootstrap's."""
    if "mcnemar" in pair:
        return float(pair["mcnemar"]["p"])
    return next(float(pair["difference"][name]["p"]) for name in COMPARED.values() if name in pair["difference"])


def adjusted(results: Mapping[str, Any]) -> dict[tuple[str, str], float]:
    """Holm-adjusted p-values of all comparisons of a run with its baseline, by (column, benchmark)."""
    keys = [(label, task) for label, tasks in results["paired"].items() for task in tasks]
    return dict(zip(keys, holm([p_value(results["paired"][label][task]) for label, task in keys]), strict=True))


def verdict(pair: Mapping[str, Any], metric: str) -> str:
    """ "better", "worse", or "" where the comparison leaves it open: the interval holds 0, or McNemar's p >= 0.05."""
    difference = pair["difference"][metric]
    if difference["low"] <= 0 <= difference["high"] or pair.get("mcnemar", {"p": 0.0})["p"] >= 0.05:
        return ""
    return "better" if (difference["value"] < 0) == (metric in LOWER_IS_BETTER) else "worse"


def _difference(name: str, pair: Mapping[str, Any]) -> str:
    difference = pair["difference"][name]
    low, high, value = difference["low"], difference["high"], difference["value"]
    sign = "+" if value >= 0 else "-"
    text = f"{sign}{shown(name, abs(value))} [dim]\\[{shown(name, low)}, {shown(name, high)}][/dim]"
    colour = {"better": "green", "worse": "red"}.get(verdict(pair, name))
    return f"[{colour}]{text}*[/]" if colour else text


def _plain(results: Mapping[str, Any], task: str) -> Table:
    """A benchmark we have no statistics for: lmms-eval's own figures."""
    table = Table(title=f"{task}  (lmms-eval's own figures)", title_justify="left", title_style="bold")
    names = sorted(
        {
            name
            for tasks in results["results"].values()
            for name, value in tasks.get(task, {}).items()
            if isinstance(value, int | float) and "stderr" not in name
        }
    )
    for name in ("method", *names):
        table.add_column(name.split(",")[0])
    for label, tasks in results["results"].items():
        found = tasks.get(task, {})
        table.add_row(label, *(f"{found[name]:.4g}" if name in found else "-" for name in names))
    return table
