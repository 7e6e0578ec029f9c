"""Plots of a result file as inline SVG: score against latency, bars per split, differences, CHAIR with length."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

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
CONTROLS = frozenset({"noop", "random_prune", "uniform_prune", "placebo"})
STYLE = {
    "font.family": "DejaVu Sans", "font.size": 9, "axes.edgecolor": SOFT, "axes.labelcolor": INK, "text.color": INK,
    "xtick.color": SOFT, "ytick.color": SOFT, "axes.spines.top": False, "axes.spines.right": False,
    "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left", "svg.hashsalt": "vlm-attn",
    "svg.fonttype": "path", "axes.grid": True, "grid.color": GRID, "axes.axisbelow": True,
}  # fmt: skip
TITLES = {"pope": "POPE", "chair": "CHAIR", "mme": "MME", "amber": "AMBER", "coco": "COCO", "gqa": "GQA"}


def is_control(results: Mapping[str, Any], label: str) -> bool:
    """Whether a column is a control: it is in the table to be beaten, not to win."""
    described = results["method"][label]["config"]
    parts = described if isinstance(described, list) else [described]
    return bool(described) and all(isinstance(part, Mapping) and part.get("name") in CONTROLS for part in parts)


def colours(results: Mapping[str, Any]) -> dict[str, str]:
    """A colour per method: ink for the baseline, grey for controls, one hue each for the rest."""
    out, hue = {}, 0
    for label in results["results"]:
        if label == results["baseline"]:
            out[label] = BASE
        elif is_control(results, label):
            out[label] = CONTROL
        else:
            out[label] = PALETTE[hue % len(PALETTE)]
            hue += 1
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
    makers = (against_latency, splits, differences, captions)
    with matplotlib.rc_context(STYLE):
        return [(title, caption, to_svg(figure)) for maker in makers for title, caption, figure in maker(results)]


def _mean_interval(scores: Sequence[Mapping[str, Any]], metric: str) -> tuple[float, float, float]:
    """Plain mean over splits of value, low and high."""
    rows = [(s["intervals"][metric]["value"], s["intervals"][metric]["low"], s["intervals"][metric]["high"])
            for s in scores]  # fmt: skip
    value, low, high = np.mean(rows, axis=0) * percent(metric)
    return float(value), float(low), float(high)


Plot = tuple[str, str, Figure]


def against_latency(results: Mapping[str, Any]) -> list[Plot]:
    """Score against the median time of a sample, one panel per kind of benchmark, one legend for all."""
    panels = [(kind, metric) for kind, metric in (("pope", "accuracy"), ("chair", "chair_i"))
              if tasks_of(results, kind)]  # fmt: skip
    if not panels:
        return []
    figure = Figure(figsize=(5.5 * len(panels), 4.3), layout="constrained")
    hues, marks = colours(results), markers(results)
    handles: dict[str, Any] = {}
    for axes, (kind, metric) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
        names = tasks_of(results, kind)
        seen = []
        for label, scores in results["scores"].items():
            times = [results["latency"][label].get(task, {}).get("total_s") for task in names]
            if not all(task in scores for task in names) or not all(times):
                continue
            x = 1000 * float(np.mean([t["median"] for t in times if t]))
            value, low, high = _mean_interval([scores[task] for task in names], metric)
            seen.append(x)
            base = label == results["baseline"]
            handles[label] = axes.errorbar(
                x, value, yerr=[[max(0, value - low)], [max(0, high - value)]], color=hues[label],
                marker=marks[label], markersize=9 if base else 7, elinewidth=1.1, linestyle="none",
                markeredgecolor="white", markeredgewidth=0.7, zorder=4 if base else 3,
            )  # fmt: skip
        lower = metric in LOWER_IS_BETTER
        name = "CHAIRi, %" if metric == "chair_i" else "accuracy, %" + (" (mean of the splits)" if names[1:] else "")
        if seen and max(seen) > 5 * min(seen):
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
            axes.xaxis.set_minor_formatter(lambda x, _: f"{x:g}" if f"{x:.0e}"[0] in "25" else "")
        else:
            axes.set_xlim(left=0)
        axes.margins(x=0.12, y=0.12)
        axes.set(title=TITLES[kind], xlabel="median time per sample, ms", ylabel=name)
        axes.annotate("better", xy=(0.02, 0.03 if lower else 0.97), xytext=(0.04, 0.16 if lower else 0.84),
                      xycoords="axes fraction", color=SOFT, fontsize=8, va="bottom" if lower else "top",
                      arrowprops={"arrowstyle": "->", "color": SOFT})  # fmt: skip
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=6, frameon=False,
                  fontsize=8.5, handletextpad=0.3, columnspacing=1.4)  # fmt: skip
    return [("Score against latency", "Whiskers: 95 % interval. Grey: controls. Times were measured on the machine "
             "named at the end of this page.", figure)]  # fmt: skip


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
        labels = list(results["scores"])
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
    for place, label, interval in found:
        value, low, high = (scale * interval[key] for key in ("value", "low", "high"))
        axes.barh(place, value, color=hues[label], height=0.62, alpha=0.9)
        axes.errorbar(value, place, xerr=[[max(0, value - low)], [max(0, high - value)]], color=INK, elinewidth=1,
                      capsize=2.5)  # fmt: skip
    lowest = min(scale * interval["low"] for *_, interval in found)
    highest = max(scale * interval["high"] for *_, interval in found)
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
    labels = list(results["paired"])
    if not wanted or not labels:
        return []
    figure = Figure(figsize=(2.5 * max(len(wanted), 2), 0.9 + 0.25 * len(labels)), layout="constrained")
    hues = colours(results)
    for axes, (task, metric) in zip(np.atleast_1d(figure.subplots(1, len(wanted), sharey=True)), wanted, strict=True):
        for place, label in enumerate(labels):
            pair = results["paired"][label].get(task)
            if pair is None:
                continue
            value, low, high = (percent(metric) * pair["difference"][metric][key] for key in ("value", "low", "high"))
            axes.errorbar(value, place, xerr=[[max(0, value - low)], [max(0, high - value)]], color=hues[label],
                          marker="o", markersize=5, elinewidth=1.4)  # fmt: skip
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
    labels = list(results["scores"])
    shown = (("chair_i", "CHAIRi, % (lower is better)"), ("chair_s", "CHAIRs, % (lower is better)"),
             ("recall", "recall, %"), ("len_words", "words per caption"))  # fmt: skip
    figure = Figure(figsize=(11.2, 0.9 + 0.27 * len(labels)), layout="constrained")
    for axes, (metric, name) in zip(figure.subplots(1, len(shown), sharey=True), shown, strict=True):
        _bars(axes, results, names[0], metric, labels)
        axes.set(xlabel=name)
    return [("CHAIR with recall and length", "A caption that says less hallucinates less: read the four together. "
             "The axes do not start at zero.", figure)]  # fmt: skip
