"""The pruning bench as a table on a console."""

from __future__ import annotations

from typing import Any

from rich.table import Table

HEADS = ("case", "budget", "tokens", "ideal", "prefill", "of ideal", "scoring", "answer", "decode", "memory")


def prune_table(result: dict[str, Any], title: str, void: str) -> Table:
    """One shape."""
    caption = f"control off by {result['control_off_by']:.1%}" if result["valid"] else void
    caption += (
        f"\nprefill without the {result['stock']['tower_s']:.3f} s of stock's vision tower; "
        "tokens = visual tokens of an average layer; ideal = FLOPs next to stock's; prefill, answer (end to end), "
        "decode, memory = times stock (median of paired ratios); of ideal = ideal / prefill; scoring = share of "
        f"stock's prefill\nFLOPs: {result['flops_formula']}\nmemory: {result['memory']}"
    )
    table = Table(title=title, caption=caption, caption_justify="left")
    for head in HEADS:
        table.add_column(head, justify="left" if head in HEADS[:2] else "right", no_wrap=head == "case")
    for row in result["rows"]:
        scoring, ideal = row["scoring"], row["of_ideal_speedup"]
        memory = row["memory"]["ratio"]
        table.add_row(
            row["case"], row["nominal"], f"{row['equivalent_tokens']:.1f}", f"{row['flops_ideal']:.3f}",
            f"{row['prefill']['ratio']:.3f}", f"{ideal:.0%} {met(ideal, row['of_ideal_bar'], True)}",
            f"{scoring['of_stock_prefill']:.1%} {met(scoring['of_stock_prefill'], scoring['bar'])}",
            f"{row['end_to_end']['ratio']:.3f}", f"{row['decode']['ratio']:.3f}",
            "-" if memory is None else f"{memory:.3f}",
        )  # fmt: skip
    return table


def met(value: float, bar: float | None, above: bool = False) -> str:
    """Whether a bar is met, and which."""
    if bar is None:
        return ""
    good = value >= bar if above else value <= bar
    return f"{'met' if good else 'MISSED'} {bar:.0%}"
