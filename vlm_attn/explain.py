"""What will run in each decoder layer, and why: the engine's choice of plan in words."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from . import ops
from .attention.fused import FEW_KEYS
from .attention.plans import FUSED_ROWS
from .stages import Edit, HeadScale, KeyBias, LogitMap, RowEdit, SegmentEdit, SoftMask

if TYPE_CHECKING:
    from .session import Session

BIAS_WHY = (
    f"up to {FEW_KEYS} biased keys: applied to the unpadded output by its log-sum-exp; otherwise the bias rides in "
    "extra head dimensions, so no mask is built"
)
KERNEL_WHY = "one pass of the segment kernel, unpadded and if nothing else acts here; else exact rows"
KERNEL_ROW_WHY = "one pass of the segment kernel, if nothing else acts here; else the exact row"
P0, P1, P2, P3, STOCK = "P0 head scale", "P1 new row", "P2 exact rows", "P3 all rows", "stock"


@dataclass(frozen=True)
class PlanRow:
    """One method in one layer and phase (``"prefill"`` or ``"decode"``)."""

    layer: int
    phase: str
    method: str
    plan: str
    why: str


@dataclass(frozen=True)
class Explanation:
    """Rows per layer; printing it gives a table, layers that do the same together."""

    rows: tuple[PlanRow, ...]

    def to_dict(self) -> list[dict[str, Any]]:
        """Plain data."""
        return [asdict(row) for row in self.rows]

    def __str__(self) -> str:
        grouped: dict[tuple[str, ...], list[int]] = {}
        for row in self.rows:
            grouped.setdefault((row.phase, row.method, row.plan, row.why), []).append(row.layer)
        lines = [(_span(layers), *what) for what, layers in grouped.items()]
        lines.sort(key=lambda line: (int(line[0].split("-")[0].split(",")[0]), line[1] == "decode"))
        head = ("layers", "phase", "method", "plan", "why")
        widths = [max(len(line[i]) for line in [head, *lines]) for i in range(4)]
        return "\n".join("  ".join([*(x.ljust(w) for x, w in zip(line, widths)), line[4]]) for line in [head, *lines])


def explain(session: Session) -> Explanation:
    """The plans of an attached session."""
    rows: list[PlanRow] = []
    edits = session.edits
    for layer in range(session.info.layers):
        found = [PlanRow(layer, *said) for i, edit in edits.all for said in _said(session, i, edit, layer)]
        if layer in session.sites:
            name = session.prune.name if session.prune else ""
            found.append(PlanRow(layer, "prefill", name, STOCK, "visual tokens leave before this layer"))
        for phase in ("prefill", "decode"):
            if not any(row.phase == phase for row in found):
                found.append(PlanRow(layer, phase, "-", STOCK, "nothing acts here: the backend's own attention"))
        rows += found
    return Explanation(tuple(rows))


Said = tuple[str, str, str, str]


def _said(session: Session, index: int, edit: Edit, layer: int) -> Iterator[Said]:
    edits, name = session.edits, edit.name
    if isinstance(edit, RowEdit) and edit.source == layer:
        ahead = edits.reads_ahead is not None
        why = "earlier layers are edited: the prompt runs to here once more beforehand" if ahead else "on the way"
        yield "prefill", name, P2, f"the rows of the question are read {why}"
    if isinstance(edit, HeadScale) and layer in edits.scale_layers.get(index, ()):
        stream = ", after a text-only prefill" if edit.wants_text_stream else ""
        yield "prefill", name, P0, f"whole heads are scaled before o_proj{stream}; attention itself is untouched"
        yield "decode", name, P0, "the same heads, fixed in the prefill"
    if layer not in edits.layers[index]:
        return
    kernel = isinstance(edit, SegmentEdit) and _in_kernel(session, edit)
    if isinstance(edit, LogitMap):
        yield "prefill", name, *_map_plan(edit)
    if isinstance(edit, KeyBias):
        why = "eager: added to the mask" if session.backend == "eager" else BIAS_WHY
        yield "prefill", name, P3, why
        yield "decode", name, P1, "added to the mask of the one new row"
        return
    if isinstance(edit, SoftMask):
        yield "prefill", name, P3, "hidden pairs of image rows alone, one fused call per image, merged by log-sum-exp"
        return
    if isinstance(edit, RowEdit):
        yield "prefill", name, P2, "only the last row changes: it is computed again and replaces the fused one"
    if isinstance(edit, SegmentEdit):
        yield "prefill", name, *_segment_plan(edit, kernel)
    if isinstance(edit, LogitMap | RowEdit | SegmentEdit):
        alone = isinstance(edit, SegmentEdit) and kernel
        yield "decode", name, P1, KERNEL_ROW_WHY if alone else "the new row is computed exactly; no fused call runs"


def _in_kernel(session: Session, edit: SegmentEdit) -> bool:
    """Whether the device has a kernel for the segments of this edit."""
    return edit.mix(torch.ones(1, edit.segments)) is not None and ops.accelerated(session.model.device.type)


def _map_plan(edit: LogitMap) -> tuple[str, str]:
    if edit.rows == "all":
        return P3, "factors per key, equal for all heads: one fused call on scaled keys (exact rows after a softcap)"
    if edit.rows == "last":
        return P2, "only the last row changes: it is computed again and replaces the fused one"
    return P3, "factors per key: the text rows run once more on scaled keys (exact rows beside another edit)"


def _segment_plan(edit: SegmentEdit, kernel: bool) -> tuple[str, str]:
    if edit.wants_columns and kernel:
        return P3, f"labels need column means, which the key-mass kernel adds up; then {KERNEL_WHY}"
    if kernel:
        return P3, KERNEL_WHY
    if edit.wants_columns:
        return (
            P3,
            "labels need column means: row blocks add them up with each row's log-sum-exp, then labelled keys alone",
        )
    if edit.rows == "last":
        return P2, "only the last row changes"
    return P2, f"text rows behind the image, exactly; from {FUSED_ROWS} unpadded rows on, segments merged instead (P3)"


def _span(layers: list[int]) -> str:
    """``[2, 3, 4, 7]`` as ``"2-4,7"``."""
    parts: list[list[int]] = []
    for layer in sorted(layers):
        if parts and layer == parts[-1][-1] + 1:
            parts[-1].append(layer)
        else:
            parts.append([layer])
    return ",".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)
