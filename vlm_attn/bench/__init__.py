"""What methods cost: paired, interleaved timings against the stock model on random weights.

:func:`run_bench` compares one pruner and two edits with what their FLOPs allow, :func:`run_edits` measures every
attention edit in prefill, decode and peak memory beside the eager way of reading attention, :func:`run_prune` every
pruning method: budget, FLOPs, prefill, whole answer, memory, and what choosing costs.
"""

from __future__ import annotations

from .edits import Case, Runner, edit_ticks, run_edits
from .overview import CONTROL, SHAPES, ideal_ratio, run_bench, ticks
from .prune import prune_ticks, run_prune
from .report import print_report, tables
from .setup import Request, Shape
from .turns import Taken, Trial

__all__ = [
    "CONTROL",
    "SHAPES",
    "Case",
    "Request",
    "Runner",
    "Shape",
    "Taken",
    "Trial",
    "edit_ticks",
    "ideal_ratio",
    "print_report",
    "prune_ticks",
    "run_bench",
    "run_edits",
    "run_prune",
    "tables",
    "ticks",
]
