"""Pictures of a record: layer x head heat maps, shares per layer, divergence per token."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from .record import GROUPS, Record, Rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {"system": "#8a94a3", "image": "#2b6cb0", "text": "#d9822b"}
TICKS = 9  # most labels on an axis


@dataclass(frozen=True)
class Panel:
    """A layer x head map: values ``[L, H]``, what they are, and the unit on its colour bar; ``signed``: a change."""

    title: str
    values: Tensor
    unit: str
    logarithmic: bool = False
    signed: bool = False

    def minus(self, other: Panel) -> Panel:
        """The change from ``other``: a difference, or the logarithm (base 2) of a ratio."""
        if self.logarithmic:
            change, unit = (self.values / other.values).log2(), f"log2 change of {self.unit}"
        else:
            change, unit = self.values - other.values, f"change, {self.unit}"
        return Panel(self.title, change, unit, signed=True)


def panels(record: Record) -> list[Panel]:
    """The maps of what was asked for."""
    rows: Rows = "generated" if len(record.shares) > 1 else "last"
    said = "rows of the answer" if rows == "generated" else "last prompt row"
    asked: Rows = "last" if bool(record.question.isnan().all()) else "question"
    out = []
    if {"shares", "mdi", "aei", "sinks"} & set(record.what):
        out.append(Panel(f"Attention on the image, {said}", 100 * record.share("image", rows), "% of a row"))
    if "vas" in record.what:
        where = "question rows" if asked == "question" else "last prompt row"
        out.append(Panel(f"Visual attention score, {where}", record.vas(asked), "image / system", logarithmic=True))
    if "heads" in record.what:
        out.append(Panel("Visual heads, first token", record.visual_heads()["score"], "mass × concentration"))
    if {"vhd", "t_vhd"} & set(record.what):
        out.append(Panel("Vision-aware divergence, last prompt row", record.vision_aware(), "‖O_img − O_txt‖"))
    return out


def plot(record: Record, path: str | Path, title: str = "", *, baseline: Record | None = None) -> Path:
    """Draws what was asked for into a PNG file and returns its path.

    One heat map per readout that has a value per layer and head, then the shares of system, image and text per layer,
    and the divergence of every token of the answer, where they were read. With a ``baseline`` (the same prompt and
    readouts without the method) heat maps show the change, red where the method raises a value.

    Raises:
        ValueError: the two records are not of the same readouts and layers, or one has no row of the answer.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    maps = panels(record)
    if baseline is not None:
        maps = [mine.minus(theirs) for mine, theirs in zip(maps, _same(record, baseline), strict=True)]
    extra = [draw for name, draw in (("shares", _shares), ("t_vhd", _tokens)) if name in record.what]
    total = len(maps) + len(extra)
    columns = min(total, 2) if total <= 4 else 3
    lines = -(-total // columns)
    layers, heads = record.shares.shape[1:3]
    size = (min(6.4, 3.4 + 0.1 * heads) * columns, min(5.2, 2.6 + 0.09 * layers) * lines + 0.4)
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for axis, panel in zip(axes, maps, strict=False):
        _heat(axis, panel, record.layers)
    for axis, draw in zip(axes[len(maps) :], extra, strict=False):
        draw(axis, record)
    for axis in axes[total:]:
        axis.set_visible(False)
    figure.suptitle(title or _title(record), fontsize=11, fontweight="bold")
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, format="png")
    return target


def _same(record: Record, baseline: Record) -> list[Panel]:
    """The baseline's maps, if they can be compared."""
    theirs = panels(baseline)
    if [p.title for p in theirs] != [p.title for p in panels(record)] or record.layers != baseline.layers:
        raise ValueError("the two records differ in readouts, rows or layers: read the same prompt the same way twice")
    return theirs


def _title(record: Record) -> str:
    methods = " + ".join(str(m["name"]) for m in record.about.get("methods", ())) or "no method"
    name = Path(str(record.about.get("checkpoint", ""))).name or record.about.get("family", "")
    return f"{name}, {methods}, {len(record.tokens)} tokens"


def _heat(axis: Axes, panel: Panel, layers: tuple[int, ...]) -> None:
    from matplotlib.colors import LogNorm, Normalize

    values = panel.values.float().numpy()
    positive = values[np.isfinite(values) & (values > 0)]
    most = float(positive.max()) if positive.size else 1.0
    norm = Normalize(0.0, most)
    if panel.signed:
        most = float(np.nanmax(np.abs(np.where(np.isfinite(values), values, np.nan)), initial=1e-9))
        norm = Normalize(-most, most)
    if panel.logarithmic and positive.size:
        least = max(float(positive.min()), most * 1e-6)
        norm, values = LogNorm(least, most), np.maximum(values, least)
    shown = np.ma.masked_invalid(values)
    image = axis.imshow(
        shown, aspect="auto", interpolation="nearest", cmap="RdBu_r" if panel.signed else "viridis", norm=norm
    )
    axis.set_facecolor("#d5d9df")  # not defined
    axis.set_title(panel.title, fontsize=9.5, loc="left")
    axis.set_xlabel("head", fontsize=9)
    axis.set_ylabel("layer", fontsize=9)
    _ticks(axis.xaxis, range(values.shape[1]))
    _ticks(axis.yaxis, layers)
    axis.tick_params(labelsize=8, length=2)
    bar = axis.figure.colorbar(image, ax=axis, fraction=0.05, pad=0.02)
    bar.set_label(panel.unit, fontsize=8.5)
    bar.ax.tick_params(labelsize=8, length=2)


def _ticks(axis: Any, labels: Any) -> None:
    """At most :data:`TICKS` labels, evenly spaced from the first on."""
    labels = list(labels)
    step = max(1, -(-len(labels) // TICKS))
    places = list(range(0, len(labels), step))
    axis.set_ticks(places, [str(labels[i]) for i in places])


def _shares(axis: Axes, record: Record) -> None:
    rows: Rows = "generated" if len(record.shares) > 1 else "last"
    base = np.zeros(len(record.layers))
    for group in GROUPS:
        values = 100 * record.share(group, rows).mean(1).numpy()
        axis.bar(range(len(base)), values, bottom=base, color=COLOURS[group], label=group, width=0.9)
        base = base + values
    axis.set_xlabel("layer", fontsize=9)
    axis.set_ylabel("% of a row, mean over heads", fontsize=9)
    axis.set_ylim(0, 100)
    axis.set_xlim(-0.6, len(base) - 0.4)
    _ticks(axis.xaxis, record.layers)
    axis.tick_params(labelsize=8, length=2)
    axis.legend(fontsize=8.5, loc="lower left", bbox_to_anchor=(-0.02, 0.98), ncols=3, frameon=False)


def _tokens(axis: Axes, record: Record) -> None:
    values = record.t_vhd().numpy()
    axis.plot(range(len(values)), values, color=COLOURS["image"], marker="o", markersize=3, linewidth=1.2)
    axis.set_title("Token-level divergence (T-VHD)", fontsize=9.5, loc="left")
    axis.set_xlabel("token of the answer", fontsize=9)
    axis.set_ylabel("sum over layers and top heads", fontsize=9)
    axis.set_ylim(bottom=0)
    _ticks(axis.xaxis, range(len(values)))
    axis.tick_params(labelsize=8, length=2)
    axis.grid(axis="y", color="#e4e7eb")
