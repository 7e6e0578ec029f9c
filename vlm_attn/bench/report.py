"""Bench results as tables on a console."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from .prune_report import prune_table


def print_report(report: dict[str, Any], console: Console | None = None) -> None:
    """Writes the tables to a console."""
    out = console or Console()
    for table in tables(report):
        out.print(table)


def tables(report: dict[str, Any]) -> list[Table]:
    """One rich table per shape."""
    make = {"edits": _edit_tables, "prune": _prune}.get(report.get("bench", ""), _overview)
    return [table for result in report["shapes"] for table in make(result)]


def _title(shape: dict[str, Any]) -> str:
    tokens = shape["visual"] + shape["text"]
    return (
        f"{shape['name']}: {shape['layers']} layers, hidden {shape['hidden']}, {shape['heads']}/"
        f"{shape['kv_heads']} heads, {tokens} tokens ({shape['visual']} visual)"
    )


def _void(result: dict[str, Any]) -> str:
    return (
        f"VOID: the control is {result['control_off_by']:.1%} off stock (5 % allowed). "
        "Something else used the machine; run again when it is quiet."
    )


def _prune(result: dict[str, Any]) -> list[Table]:
    return [prune_table(result, _title(result["shape"]), _void(result))]


# ------------------------------------------------------------------------------------------------------- overview


def _overview(result: dict[str, Any]) -> list[Table]:
    table = Table(title=_title(result["shape"]), caption=_caption(result))
    for head in (
        "configuration",
        "prefill s",
        "min s",
        "x stock",
        "FLOPs-ideal",
        "of ideal",
        "token ms",
        "x stock",
    ):
        table.add_column(head, justify="left" if head == "configuration" else "right")
    for row in result["rows"]:
        prefill, decode = row["prefill"], row["decode"]
        table.add_row(
            row["config"], f"{prefill['median_s']:.3f}", f"{prefill['min_s']:.3f}", f"{prefill['ratio']:.3f}",
            f"{row['flops_ideal']:.3f}", f"{row['of_ideal_speedup']:.0%}", f"{decode['median_s'] * 1e3:.1f}",
            f"{decode['ratio']:.3f}",
        )  # fmt: skip
        if "text_only_pass_s" in row:
            rest = row["prefill_without_text_pass"]
            table.add_row(
                "  less its text-only pass", f"{rest['median_s']:.3f}", f"{rest['min_s']:.3f}",
                f"{rest['ratio']:.3f}", "", "", "", "",
            )  # fmt: skip
    return [table]


def _caption(result: dict[str, Any]) -> str:
    if not result["valid"]:
        return _void(result)
    lines = [f"{'met' if b['met'] else 'MISSED'}: {b['what']} {b['value']:.3f} ({b['bar']})" for b in result["bars"]]
    return "\n".join([f"control off by {result['control_off_by']:.1%}", *lines])


# ---------------------------------------------------------------------------------------------------------- edits


def _edit_tables(result: dict[str, Any]) -> list[Table]:
    stock = result["stock"]
    table = Table(title=_title(result["shape"]), caption=_edit_caption(result), caption_justify="left")
    for head in ("case", "prefill x", "decode x", "memory x", "MiB"):
        table.add_column(head, justify="left" if head == "case" else "right", no_wrap=True)
    first = f"{stock['prefill_s']:.3f} s", f"{stock['decode_s'] * 1e3:.1f} ms"
    table.add_row("stock", *first, "", _mebibytes(stock["peak_bytes"]))
    for row in result["rows"]:
        figures = (_figure(row[name]) for name in ("prefill", "decode", "memory"))
        table.add_row(row["case"], *figures, _mebibytes(row["memory"]["peak_bytes"]))
        if "text_only_pass_s" in row:
            table.add_row("  less its text-only pass", _figure(row["prefill_without_text_pass"]), "", "", "")
    return [table, _answers(result["answers"])] if result["answers"] else [table]


def _figure(figure: dict[str, Any]) -> str:
    """A ratio next to its bar: ``1.02 <= 1.03`` where it is met, ``1.05 > 1.03`` where it is not."""
    ratio, bar = figure["ratio"], figure["bar"]
    if ratio is None:
        return "-"
    return f"{ratio:.3f}" if bar is None else f"{ratio:.3f} {'<=' if ratio <= bar else ' >'} {bar:.2f}"


def _mebibytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**20:.0f}"


def _edit_caption(result: dict[str, Any]) -> str:
    lines = [
        f"control off by {result['control_off_by']:.1%}" if result["valid"] else _void(result),
        "x = times stock, median of paired ratios; behind it the bar, where one is set.",
        f"Memory: {result['memory']}.",
        *(f"{row['case']}: {row['data']}" for row in result["rows"] if row["data"]),
        *(
            f"{row['case']}: its text-only pass took {row['text_only_pass_s']:.3f} s"
            for row in result["rows"]
            if "text_only_pass_s" in row
        ),
    ]
    return "\n".join(lines)


def _answers(answers: list[dict[str, Any]]) -> Table:
    table = Table(title=f"whole answers of {answers[0]['tokens']} tokens through generate(), extra passes included")
    for head in ("method", "seconds", "x stock", "passes over the prompt more than once"):
        table.add_column(head, justify="left" if head[0] in "mp" else "right")
    for row in answers:
        table.add_row(row["method"], f"{row['median_s']:.3f}", f"{row['ratio']:.3f}", row["extra"])
    return table
