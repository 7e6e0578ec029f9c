"""Plots of a result file as inline SVG: score against latency and compute, bars per split, differences, CHAIR with
length, score against kept visual tokens."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from vlm_attn.evaluation.compute import relative
from vlm_attn.evaluation.summary import LOWER_IS_BETTER

__all__ = ["all_plots", "colours"]

INK, GRID, SOFT = "#1f2933", "#e4e7eb", "#7b8794"
BASE, CONTROL = "#1f2933", "#a5b0bd"
PALETTE = (
    "#2b6cb0",
    "#d9822b",
    "#2f855a",
    "#b83280",
    "#6b46c1",
    "#0f8b8d",
    "#c53030",
    "#8a6d3b",
    "#4c63b6",
    "#5f6c37",
)
CONTROLS = frozenset({"noop", "random_prune", "uniform_prune", "norm_prune", "placebo"})
MANY = 40
"""With more columns than this, those of curves are left to their own plot and table."""
STYLE = {
    "font.family": "DejaVu Sans", "font.size": 9, "axes.edgecolor": SOFT, "axes.labelcolor": INK, "text.color": INK,
    "xtick.color": SOFT, "ytick.color": SOFT, "axes.spines.top": False, "axes.spines.right": False,
    "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left", "svg.hashsalt": "vlm-attn",
    "svg.fonttype": "path", "axes.grid": True, "grid.color": GRID, "axes.axisbelow": True,
}  # fmt: skip
TITLES = {"pope": "POPE", "chair": "CHAIR", "mme": "MME", "amber": "AMBER", "coco": "COCO", "gqa": "GQA"}


def single(results: Mapping[str, Any], labels: Iterable[str]) -> list[str]:
    """The columns that are shown one by one: all of them, or with very many those that are on no curve."""
    curves = results.get("curves", {}) if len(results["results"]) > MANY else {}
    return [label for label in labels if not curves.get(label, {}).get("series")]


def is_control(results: Mapping[str, Any], label: str) -> bool:
    """Whether a column is a control: it is in the table to be beaten, not to win."""
    described = results["method"][label]["config"]
    parts = described if isinstance(described, list) else [described]
    return bool(described) and all(isinstance(part, Mapping) and part.get("name") in CONTROLS for part in parts)


def colours(results: Mapping[str, Any]) -> dict[str, str]:
    """A colour per method: ink for the baseline, grey for controls, one hue each for the rest."""
    out: dict[str, str] = {}
    hues: dict[str, str] = {}
    curves = results.get("curves", {})
    for label in results["results"]:
        if label == results["baseline"]:
            out[label] = BASE
        elif is_control(results, label):
            out[label] = CONTROL
        else:  # one hue for all columns of one method on curves
            method = curves[label]["method"] if label in curves else label
            out[label] = hues.setdefault(method, PALETTE[len(hues) % len(PALETTE)])
    return out


def tasks_of(results: Mapping[str, Any], kind: str) -> list[str]:
    """Benchmarks of that kind that the baseline has scores for, in config order."""
    base = results["scores"].get(results["baseline"], {})
    return [b["name"] for b in results["config"]["benchmarks"] if base.get(b["name"], {}).get("kind") == kind]


def short(task: str) -> str:
    """A task name as a panel title."""
    words = task.removeprefix("scenes_").removeprefix("local_").split("_")
    return " ".join(TITLES.get(word, word) for word in words)


def to_svg(figure: Figure) -> str:
    """The figure as an ``<svg>`` element to paste into a page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def percent(name: str) -> float:
    return 1.0 if name in ("len_words", "len_tokens", "score") else 100.0


def all_plots(results: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """``(title, caption, svg)`` of every plot that the results can fill."""
    others = (against_cost, splits, differences, captions)
    nothing_else = bool(results.get("curves")) and single(results, results["results"]) == [results["baseline"]]
    makers = (against_kept,) if nothing_else else (*others, against_kept)
    with matplotlib.rc_context(STYLE):
        return [(title, caption, to_svg(figure)) for maker in makers for title, caption, figure in maker(results)]


def _mean_interval(scores: Sequence[Mapping[str, Any]], metric: str) -> tuple[float, float, float]:
    """Plain mean over splits of value, low and high."""
    rows = [(s["intervals"][metric]["value"], s["intervals"][metric]["low"], s["intervals"][metric]["high"])
            for s in scores]  # fmt: skip
    value, low, high = np.mean(rows, axis=0) * percent(metric)
    return float(value), float(low), float(high)


Plot = tuple[str, str, Figure]


Cost = Callable[[Mapping[str, Any], str, Sequence[str]], float | None]


def _time(results: Mapping[str, Any], label: str, tasks: Sequence[str]) -> float | None:
    times = [results["latency"][label].get(task, {}).get("total_s") for task in tasks]
    return 1000 * float(np.mean([t["median"] for t in times if t])) if all(times) else None


def against_cost(results: Mapping[str, Any]) -> list[Plot]:
    """Score against time and against compute: a row each, a panel per kind of benchmark, one legend for all."""
    panels = [(kind, metric) for kind, metric in (("pope", "accuracy"), ("chair", "chair_i"))
              if tasks_of(results, kind)]  # fmt: skip
    if not panels:
        return []
    costs: list[tuple[str, Cost]] = [("median time per sample, ms", _time)]
    if all(relative(results, results["baseline"], tasks_of(results, kind)) for kind, _ in panels):
        costs.append(("decoder work per sample, x baseline", relative))
    figure = Figure(figsize=(5.5 * len(panels), 0.8 + 3.4 * len(costs)), layout="constrained")
    handles: dict[str, Any] = {}
    grid = figure.subplots(len(costs), len(panels), squeeze=False)
    for number, (unit, cost) in enumerate(costs):
        for axes, (kind, metric) in zip(grid[number], panels, strict=True):
            handles |= _scatter(axes, results, kind, metric, cost)
            axes.set_xlabel(unit)
            axes.set_title("" if number else TITLES[kind])
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=6, frameon=False,
                  fontsize=8.5, handletextpad=0.3, columnspacing=1.4)  # fmt: skip
    return [("Score against latency and compute", "Whiskers: 95 % interval. Grey: controls. Times were measured on "
             "the machine named at the end of this page. Decoder work: tokens an average decoder layer processed, "
             "second branches, drafts and text-only passes among them.", figure)]  # fmt: skip


def _scatter(axes: Axes, results: Mapping[str, Any], kind: str, metric: str, cost: Cost) -> dict[str, Any]:
    """One point per method; returns the legend's handles."""
    names, hues, marks = tasks_of(results, kind), colours(results), markers(results)
    handles: dict[str, Any] = {}
    seen = []
    for label in single(results, results["scores"]):
        scores = results["scores"][label]
        x = cost(results, label, names)
        if not all(task in scores for task in names) or x is None:
            continue
        value, low, high = _mean_interval([scores[task] for task in names], metric)
        seen.append(x)
        base = label == results["baseline"]
        axes.vlines(x, low, high, colors=hues[label], linewidth=1.1, zorder=2)
        (handles[label],) = axes.plot(
            x, value, color=hues[label], marker=marks[label], markersize=9 if base else 7, linestyle="none",
            markeredgecolor="white", markeredgewidth=0.7, zorder=4 if base else 3,
        )  # fmt: skip
    lower = metric in LOWER_IS_BETTER
    if seen and max(seen) > 5 * min(seen):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        axes.xaxis.set_minor_formatter(lambda x, _: f"{x:g}" if f"{x:.0e}"[0] in "25" else "")
    else:
        axes.set_xlim(left=0)
    axes.margins(x=0.12, y=0.12)
    name = "CHAIRi, %" if metric == "chair_i" else "accuracy, %" + (" (mean of the splits)" if names[1:] else "")
    axes.set_ylabel(name)
    axes.annotate("better", xy=(0.02, 0.03 if lower else 0.97), xytext=(0.04, 0.16 if lower else 0.84),
                  xycoords="axes fraction", color=SOFT, fontsize=8, va="bottom" if lower else "top",
                  arrowprops={"arrowstyle": "->", "color": SOFT})  # fmt: skip
    return handles


def markers(results: Mapping[str, Any]) -> dict[str, str]:
    """A diamond for the baseline, circles for methods, other shapes for the controls (they share a colour)."""
    shapes = iter("s^vP<>Xhp" * 10)
    return {
        label: "D" if label == results["baseline"] else next(shapes) if is_control(results, label) else "o"
        for label in results["results"]
    }


def splits(results: Mapping[str, Any]) -> list[Plot]:
    """Horizontal bars per method, one panel per benchmark, with the baseline as a line."""
    out: list[Plot] = []
    for kind, metric, name in (("pope", "accuracy", "accuracy, %"), ("mme", "acc", "accuracy, %")):
        names = tasks_of(results, kind)
        if not names:
            continue
        labels = single(results, results["scores"])
        figure = Figure(figsize=(3.4 * max(len(names), 2), 0.9 + 0.27 * len(labels)), layout="constrained")
        grid = np.atleast_1d(figure.subplots(1, len(names), sharey=True))
        for axes, task in zip(grid, names, strict=True):
            _bars(axes, results, task, metric, labels)
            axes.set(title=short(task), xlabel=name)
        out.append((f"{TITLES[kind]} by split" if len(names) > 1 else f"{TITLES[kind]} by method",
                    "Bars: accuracy with its 95 % interval; the dashed line is the baseline. The axis does not start "
                    "at zero.", figure))  # fmt: skip
    return out


def _bars(axes: Axes, results: Mapping[str, Any], task: str, metric: str, labels: Sequence[str]) -> None:
    hues, scale = colours(results), percent(metric)
    found = [(place, label, results["scores"][label][task]["intervals"][metric])
             for place, label in enumerate(labels) if task in results["scores"][label]]  # fmt: skip
    places = [place for place, *_ in found]
    # All of a panel at once: artists are what a page of plots costs.
    value, low, high = (
        scale * np.array([interval[key] for *_, interval in found]) for key in ("value", "low", "high")
    )
    axes.barh(places, value, color=[hues[label] for _, label, _ in found], height=0.62, alpha=0.9)
    axes.errorbar(value, places, xerr=np.maximum(0, [value - low, high - value]), fmt="none", ecolor=INK,
                  elinewidth=1, capsize=2.5)  # fmt: skip
    lowest, highest = low.min(), high.max()
    pad = 0.1 * (highest - lowest or 1.0)
    axes.set_xlim(max(0.0, lowest - 3 * pad), highest + pad)
    base = results["scores"][results["baseline"]][task]["metrics"][metric] * scale
    axes.axvline(base, color=BASE, linestyle="--", linewidth=0.9)
    axes.set_yticks(range(len(labels)), labels)
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)


def differences(results: Mapping[str, Any]) -> list[Plot]:
    """Paired difference to the baseline with its interval, one panel per benchmark."""
    wanted = [(task, metric) for kind, metric in (("pope", "accuracy"), ("chair", "chair_i"), ("mme", "acc"))
              for task in tasks_of(results, kind)]  # fmt: skip
    labels = single(results, results["paired"])
    if not wanted or not labels:
        return []
    figure = Figure(figsize=(2.5 * max(len(wanted), 2), 0.9 + 0.25 * len(labels)), layout="constrained")
    hues = colours(results)
    for axes, (task, metric) in zip(np.atleast_1d(figure.subplots(1, len(wanted), sharey=True)), wanted, strict=True):
        found = [(place, hues[label], pair["difference"][metric]) for place, label in enumerate(labels)
                 if (pair := results["paired"][label].get(task)) is not None]  # fmt: skip
        places, colors = [place for place, *_ in found], [hue for _, hue, _ in found]
        value, low, high = (
            percent(metric) * np.array([difference[key] for *_, difference in found])
            for key in ("value", "low", "high")
        )
        axes.hlines(places, low, high, colors=colors, linewidth=1.4)
        axes.scatter(value, places, color=colors, s=25, zorder=3)
        axes.axvline(0, color=BASE, linewidth=0.9)
        better = "left" if metric in LOWER_IS_BETTER else "right"
        axes.set(
            title=short(task), xlabel=f"Δ {'CHAIRi' if metric == 'chair_i' else 'acc'}, points ({better}: better)"
        )
        axes.xaxis.label.set_fontsize(8)
        axes.set_yticks(range(len(labels)), labels)
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.set_ylim(len(labels) - 0.4, -0.6)
        axes.margins(x=0.15)
        low, high = axes.get_xlim()
        axes.set_xlim(min(low, -1.0), max(high, 1.0))
    return [("Difference to the baseline", "Same questions for both, 95 % interval from resampling pictures. With "
             "many methods, one in twenty intervals misses zero by chance.", figure)]  # fmt: skip


def captions(results: Mapping[str, Any]) -> list[Plot]:
    """CHAIR never alone: hallucination, recall and length beside each other."""
    names = tasks_of(results, "chair")
    if not names:
        return []
    labels = single(results, results["scores"])
    shown = (("chair_i", "CHAIRi, % (lower is better)"), ("chair_s", "CHAIRs, % (lower is better)"),
             ("recall", "recall, %"), ("len_words", "words per caption"))  # fmt: skip
    figure = Figure(figsize=(11.2, 0.9 + 0.27 * len(labels)), layout="constrained")
    for axes, (metric, name) in zip(figure.subplots(1, len(shown), sharey=True), shown, strict=True):
        _bars(axes, results, names[0], metric, labels)
        axes.set(xlabel=name)
    return [("CHAIR with recall and length", "A caption that says less hallucinates less: read the four together. "
             "The axes do not start at zero.", figure)]  # fmt: skip


CURVE_NAMES = {"accuracy": "POPE accuracy, %", "chair_i": "CHAIRi, %", "recall": "CHAIR recall, %"}


def against_kept(results: Mapping[str, Any]) -> list[Plot]:
    """Score against the kept share of visual tokens: a strip of panels per method, in two columns of strips.

    Grey: the random control that pairs with most of the method's columns. Debiased columns are dashed.
    """
    columns = {label: row for label, row in results.get("curves", {}).items() if row["share"] is not None}
    base = columns.get(results["baseline"])
    names = list(dict.fromkeys(row["method"] for row in columns.values() if row["series"]))
    names = [name for name in names if name != "random_prune"] or names
    if base is None or not names:
        return []
    metrics = list(base["scores"])
    strips = min(2, len(names))
    depth = -(-len(names) // strips)
    figure = Figure(figsize=(6.4 * strips, 0.7 + 1.55 * depth), layout="constrained")
    grid = figure.subplots(depth, strips * len(metrics), squeeze=False, sharex=True)
    limits = {metric: _limits(columns.values(), metric) for metric in metrics}
    for place, name in enumerate(names):
        row, strip = place % depth, place // depth
        lines = _lines(columns, name)
        for axes, metric in zip(grid[row, strip * len(metrics) :], metrics, strict=False):
            _panel(axes, metric, base["scores"][metric], lines)
            axes.set(ylim=limits[metric], xlim=(-0.02, 1.04))
            axes.set_xticks((0, 0.5, 1), ("0", "50", "100"))
            axes.tick_params(labelsize=7, length=2)
            if row == 0:
                axes.annotate(CURVE_NAMES[metric], (0, 1), (0, 17), "axes fraction", "offset points", fontsize=8,
                              color=SOFT)  # fmt: skip
            if row == depth - 1 or place == len(names) - 1:
                axes.set_xlabel("kept, % of visual tokens", fontsize=7)
                axes.tick_params(labelbottom=True)
        first = grid[row, strip * len(metrics)]
        first.set_title(name, fontsize=9)
        if len(own := lines[lines[0][2]["marker"] == "" :]) > 1:
            beside = grid[row, strip * len(metrics) + len(metrics) - 1]
            legend = beside.legend(
                *_legend(own),
                fontsize=7,
                frameon=False,
                loc="lower right",
                ncols=len(own),
                bbox_to_anchor=(1.02, 0.96),
                handlelength=2.2,
                columnspacing=1.2,
                borderpad=0,
            )
            legend.set_in_layout(False)
    for axes in grid.flat:
        if not axes.has_data():
            axes.set_visible(False)
    return [("Score against kept visual tokens", "Kept: visual tokens of an average decoder layer, as measured. "
             "Solid: the method; dashed, hollow: the same with attention debiasing; dotted: its other versions. Grey: "
             "the random control at the same site. Black: the baseline. Whiskers and bands: 95 % intervals from "
             "resampling pictures (POPE: all splits together). CHAIRi: lower is better, read it with recall.",
             figure)]  # fmt: skip


Line = tuple[str, list[Mapping[str, Any]], dict[str, Any]]


def _lines(columns: Mapping[str, Mapping[str, Any]], method: str) -> list[Line]:
    """``(name, points by kept share, look)`` of the control and of every series of a method."""
    series: dict[str, list[Mapping[str, Any]]] = {}
    for row in columns.values():
        if row["series"]:
            series.setdefault(row["series"], []).append(row)
    own = {name: points for name, points in series.items() if points[0]["method"] == method}
    paired = [columns[row["control"]]["series"] for points in own.values() for row in points if row["control"]]
    out: list[Line] = []
    if paired:
        control = max(dict.fromkeys(paired), key=paired.count)
        out.append((control, series[control], {"color": CONTROL, "marker": "", "linewidth": 1.2}))
    hue = INK if method in CONTROLS else PALETTE[0]
    others = iter(PALETTE[1:])
    for number, (name, points) in enumerate(own.items()):
        look: dict[str, Any] = {"color": hue, "marker": "o", "linestyle": "-"}
        if points[0]["debiased"]:
            look |= {"linestyle": "--", "markerfacecolor": "white"}
        elif number:
            look |= {"color": next(others), "marker": "s", "linestyle": ":"}
        out.append((name, points, look))
    return [(name, sorted(points, key=lambda row: row["share"]), look) for name, points, look in out]


def _legend(lines: Sequence[Line]) -> tuple[list[Line2D], list[str]]:
    """Handles without whiskers, and names."""
    return [Line2D([], [], markersize=3.4, linewidth=1.2, **look) for *_, look in lines], [name for name, *_ in lines]


def _panel(axes: Axes, metric: str, base: Mapping[str, float], lines: Sequence[Line]) -> None:
    """One metric of one method: baseline, control, curves."""
    axes.axhspan(100 * base["low"], 100 * base["high"], color=BASE, alpha=0.06, linewidth=0)
    axes.axhline(100 * base["value"], color=BASE, linewidth=0.8)
    for name, points, look in lines:
        x = [row["share"] for row in points]
        value, low, high = (
            np.array([100 * row["scores"][metric][key] for row in points]) for key in ("value", "low", "high")
        )
        if not look["marker"]:
            axes.fill_between(x, low, high, color=look["color"], alpha=0.22, linewidth=0)
            axes.plot(x, value, label=name, **look)
            continue
        spread = (np.maximum(value - low, 0), np.maximum(high - value, 0))
        axes.errorbar(x, value, yerr=spread, label=name, markersize=3.4, linewidth=1.2, elinewidth=0.8, **look)


def _limits(rows: Iterable[Mapping[str, Any]], metric: str) -> tuple[float, float]:
    """The same axis for all methods: from the lowest to the highest end of an interval."""
    ends = [100 * row["scores"][metric][end] for row in rows for end in ("low", "high")]
    pad = 0.04 * (max(ends) - min(ends) or 1)
    return min(ends) - pad, max(ends) + pad
