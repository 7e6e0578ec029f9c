"""``vlm-attn leaderboard FOLDER ...``: many runs on one self-contained page.

A table holds runs that asked the same questions in the same way and read the answers in the same way (one protocol);
anything else gets a table of its own, so that no figure stands beside one it cannot be compared with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from vlm_attn.evaluation import tables
from vlm_attn.evaluation.folders import ResultFolder, read_folder
from vlm_attn.evaluation.plots import is_control, short
from vlm_attn.evaluation.report import page
from vlm_attn.evaluation.statistics import holm
from vlm_attn.evaluation.store import write_text
from vlm_attn.evaluation.summary import HEADLINE, LOWER_IS_BETTER

__all__ = ["build_leaderboard", "rows_of", "write_leaderboard"]


def write_leaderboard(path: Path, folders: Sequence[str | Path]) -> Path:
    """Write the page of these result folders (atomically) and return its path."""
    if not folders:
        raise ValueError("A leaderboard needs at least one result folder.")
    write_text(path, build_leaderboard([read_folder(folder) for folder in folders]))
    return path


def rows_of(runs: Sequence[ResultFolder]) -> list[dict[str, Any]]:
    """One row per run, column and benchmark: protocol, figures, difference to the run's own baseline with the p-value
    adjusted for the comparisons within its table."""
    rows = []
    for run in runs:
        for label in run.columns:
            for task in run.tasks(label):
                score = run.results["scores"][label][task]
                rows.append(
                    {
                        "folder": str(run.path), "model": run.results["model"], "method": label, "task": task,
                        "kind": score["kind"], "protocol": run.protocol(label, task), "n": score["n"],
                        "parser": score.get("parser"), "settings": run.samples[label, task][0]["settings"],
                        "metrics": score["metrics"], "intervals": score["intervals"],
                        "paired": run.results["paired"].get(label, {}).get(task),
                        "kept": run.results["kept_tokens"][label].get(task, {}),
                        "latency": run.results["latency"][label].get(task, {}),
                        "env": run.results["env"], "control": is_control(run.results, label),
                        "baseline": label == run.results["baseline"],
                    }
                )  # fmt: skip
    for table in _tables(rows):
        compared = [row for row in table if row["paired"]]
        for row, p in zip(compared, holm([tables.p_value(row["paired"]) for row in compared]), strict=True):
            row["p_holm"] = p
    return rows


def _tables(rows: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Rows of one benchmark and protocol, best first."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["task"], row["protocol"]), []).append(row)
    for group in groups.values():
        metric = HEADLINE[group[0]["kind"]]
        group.sort(key=lambda row: (row["metrics"][metric] * (1 if metric in LOWER_IS_BETTER else -1), row["method"]))
    return list(groups.values())


def build_leaderboard(runs: Sequence[ResultFolder]) -> str:
    """The whole page as text."""
    groups = _tables(rows_of(runs))
    models = sorted({run.results["model"] for run in runs})
    head = (
        f"<header><h1>Leaderboard</h1><p>{len(runs)} runs of {escape(', '.join(models))}. One table per benchmark and "
        "protocol (questions, prompts, generation settings, parser): figures of different tables are not comparable."
        "</p></header>"
    )
    return page("vlm-attn leaderboard", head + "".join(map(_section, groups)))


def _section(group: Sequence[Mapping[str, Any]]) -> str:
    first = group[0]
    names, compared = tables.METRICS[first["kind"]], tables.COMPARED[first["kind"]]
    heads = ["", "method", "model", *map(tables.title, names), f"Δ {tables.title(compared)} to own baseline [95 %]",
             "p (Holm)", "kept", "ms", "where", "folder"]  # fmt: skip
    lines = []
    for rank, row in enumerate(group, 1):
        cells = [str(rank), escape(row["method"]), escape(row["model"])]
        cells += [f"{tables.shown(n, row['metrics'][n])} <small>±{tables.half_width(n, row['intervals'][n])}</small>"
                  for n in names]  # fmt: skip
        cells += _paired(row, compared)
        cells.append(f"{100 * row['kept']['keep_ratio']:.0f} %" if row["kept"] else "–")
        cells.append(tables.milliseconds(row["latency"], "total_s"))
        cells += [escape(", ".join(str(row["env"].get(k, "?")) for k in ("device", "dtype", "attention"))),
                  f"<code>{escape(row['folder'])}</code>"]  # fmt: skip
        kind = "base" if row["baseline"] else "control" if row["control"] else ""
        lines.append(f"<tr class='{kind}'>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    settings = ", ".join(f"{key} {value}" for key, value in sorted(first["settings"].items()))
    parser = f"; parser {first['parser']}" if first["parser"] else ""
    note = (
        f"n = {first['n']}; {settings}{parser}; protocol {first['protocol']}. Sorted by "
        f"{tables.title(HEADLINE[first['kind']])}. Percent, ± half of the 95 % interval; differences are paired with "
        "the baseline of the same run, p adjusted (Holm) for the "
        f"{sum('p_holm' in row for row in group)} comparisons of this table. Times are comparable only where they "
        "were taken on one machine."
    )
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    return (
        f"<section><h2>{escape(short(first['task']))}</h2><div class='scroll'><table><tr>{head}</tr>{''.join(lines)}"
        f"</table></div><p class='note'>{escape(note)}</p></section>"
    )


def _paired(row: Mapping[str, Any], metric: str) -> list[str]:
    pair = row["paired"]
    if not pair:
        return ["", ""]
    difference = pair["difference"][metric]
    low, high = (tables.shown(metric, difference[end]) for end in ("low", "high"))
    return [f"{tables.shown(metric, difference['value'])} <small>[{low}, {high}]</small>", f"{row['p_holm']:.3f}"]
