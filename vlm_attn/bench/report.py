"""Bench results as tables on a console."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table


def print_report(report: dict[str, Any], console: Console | None = None) -> None:
    """Writes the tables to a console."""
    out = console or Console()
    for table in tables(report):
        out.print(table)


def tables(report: dict[str, Any]) -> list[Table]:
    """One rich table per shape."""
    make = _edit_tables if report.get("bench") == "edits" else _overview
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
    heads = ("case", "prefill x", "bar", "", "decode x", "bar", "", "memory x", "bar", "", "MiB", "data")
    for head in heads:
        table.add_column(head, justify="left" if head in ("case", "data", "") else "right")
    first = f"{stock['prefill_s']:.3f} s, {stock['decode_s'] * 1e3:.1f} ms a token"
    table.add_row("stock", "1", "", "", "1", "", "", "1", "", "", _mebibytes(stock["peak_bytes"]), first)
    for row in result["rows"]:
        cells = [cell for name in ("prefill", "decode", "memory") for cell in _figure(row[name])]
        table.add_row(row["case"], *cells, _mebibytes(row["memory"]["peak_bytes"]), row["data"])
        if "text_only_pass_s" in row:
            bare = _figure(row["prefill_without_text_pass"])
            said = f"that pass took {row['text_only_pass_s']:.3f} s"
            table.add_row("  less its text-only pass", *bare, *[""] * 7, said)
    return [table, _answers(result["answers"])] if result["answers"] else [table]


def _figure(figure: dict[str, Any]) -> tuple[str, str, str]:
    """Ratio, bar, and whether it is met."""
    ratio, bar = figure["ratio"], figure["bar"]
    if ratio is None:
        return "-", "", ""
    if bar is None:
        return f"{ratio:.3f}", "", ""
    return f"{ratio:.3f}", f"{bar:.2f}", "met" if ratio <= bar else "MISSED"


def _mebibytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**20:.0f}"


def _edit_caption(result: dict[str, Any]) -> str:
    head = f"control off by {result['control_off_by']:.1%}" if result["valid"] else _void(result)
    return f"{head}\nx = times stock (median of paired ratios). Memory: {result['memory']}."


def _answers(answers: list[dict[str, Any]]) -> Table:
    table = Table(title=f"whole answers of {answers[0]['tokens']} tokens through generate(), extra passes included")
    for head in ("method", "seconds", "x stock", "passes over the prompt more than once"):
        table.add_column(head, justify="left" if head[0] in "mp" else "right")
    for row in answers:
        table.add_row(row["method"], f"{row['median_s']:.3f}", f"{row['ratio']:.3f}", row["extra"])
    return table
