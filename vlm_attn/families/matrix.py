"""The support matrix: every method on every family with every attention backend, executed or refused with a reason.

    python -m vlm_attn.families.matrix                            all of it; writes docs/support.md and support.json
    python -m vlm_attn.families.matrix --methods fastv            one column again, the rest of the record stays
    python -m vlm_attn.families.matrix --families qwen2_vl --dry  one family, nothing written

Each cell runs the generic checks of :mod:`vlm_attn.families.checks` on a tiny random-weight model of the family, built
from its real config classes.
"""

from __future__ import annotations

import json
import multiprocessing
import re
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import rich.progress
import torch
import transformers
import typer

from .. import registry
from . import ADAPTERS, UNSUPPORTED
from .checks import Cell, check
from .zoo import SPECIMENS

BACKENDS = ("sdpa", "eager", "flex_attention")
RECORD = Path(__file__).with_name("support.json")
MARKS = {"executed": "✓", "refused": "–", "failed": "✗"}


def column(family: str, backend: str, methods: Sequence[str]) -> list[Cell]:
    """The cells of one family with one backend.

    FlexAttention runs uncompiled: the same masks and score functions without minutes of compilation per shape.
    """
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    with torch.compiler.set_stance("force_eager" if backend == "flex_attention" else "default"):
        return [check(family, backend, row) for row in registry.methods() if row.name in methods]


def run(families: Sequence[str], methods: Sequence[str], backends: Sequence[str], jobs: int) -> Iterator[Cell]:
    """Runs the cells in ``jobs`` processes of one thread each and yields them in order."""
    places = [(family, backend) for family in families for backend in backends]
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for found in pool.map(column, *zip(*places, strict=True), [methods] * len(places)):
            yield from found


def merged(found: Sequence[Cell], known: dict[str, Any]) -> list[Cell]:
    """The cells of an earlier record with those of this run in their place; what no longer exists is left out."""
    methods = {row.name: row for row in registry.methods()}
    cells = {
        (family, c["backend"], c["method"]): Cell(
            family,
            c["backend"],
            c["method"],
            methods[c["method"]].stage,
            c["status"],
            c.get("detail", ""),
            c["figures"],
        )
        for family, entry in known.get("families", {}).items()
        for c in entry["cells"]
        if family in ADAPTERS and c["method"] in methods
    }
    cells.update({(c.family, c.backend, c.method): c for c in found})
    order = {name: i for i, name in enumerate([*ADAPTERS, *BACKENDS, *methods])}
    return sorted(cells.values(), key=lambda c: (order[c.family], order[c.backend], order[c.method]))


def record(found: Sequence[Cell]) -> dict[str, Any]:
    """The record as plain data."""
    by_family: dict[str, list[Cell]] = defaultdict(list)
    for cell in found:
        by_family[cell.family].append(cell)
    return {
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "families": {
            family: {
                "inputs": SPECIMENS[family].handmade or "real processor",
                "cells": [
                    {
                        "method": c.method,
                        "backend": c.backend,
                        "status": c.status,
                        **({"detail": c.detail} if c.detail else {}),
                        "figures": {name: float(f"{value:.1e}") for name, value in c.figures.items()},
                    }
                    for c in mine
                ],
            }
            for family, mine in by_family.items()
            if any(c.status == "executed" and c.stage in ("prune", "edit", "decode") for c in mine)
        },
        "unsupported": dict(UNSUPPORTED),
    }


def general(reason: str, method: str, stages: dict[str, str]) -> str:
    """A refusal without the names and figures of one method on one tiny model, so that equal reasons share a note."""
    text = re.sub(r"\w+ForConditionalGeneration( \(family [^)]*\))?", "the model", reason)
    text = re.sub(rf"(?<!for )\b{method}\b( on [\w-]+)?", "the method", text)
    text = re.sub(r"\[?\b\d+(, \d+)*\b\]?", "N", text)
    return f"{stages.get(method, 'read')}: {text}"


def document(data: dict[str, Any]) -> str:
    """The record as a Markdown page."""
    families = data["families"]
    names = list(dict.fromkeys(c["method"] for f in families.values() for c in f["cells"]))
    backends = list(dict.fromkeys(c["backend"] for f in families.values() for c in f["cells"]))
    stages = {row.name: row.stage for row in registry.methods()}
    counts: dict[str, int] = defaultdict(int)
    reasons: dict[str, int] = {}
    lines = ["| family | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for family, entry in families.items():
        marks = []
        for name in names:
            mine = [c for c in entry["cells"] if c["method"] == name]
            for c in mine:
                counts[c["status"]] += 1
            refusals = sorted({general(c["detail"], name, stages) for c in mine if c["status"] == "refused"})
            notes = "".join(f"[{reasons.setdefault(reason, len(reasons) + 1)}]" for reason in refusals)
            statuses = {c["status"] for c in mine}
            mark = next((s for s in ("failed", "executed") if s in statuses), "refused")
            marks.append(MARKS[mark] + notes)
        lines.append(f"| {family} | " + " | ".join(marks) + " |")
    total = sum(counts.values())
    head = [
        "# Which method runs on which model family",
        "",
        "Written by `python -m vlm_attn.families.matrix`; do not edit. Every cell was executed on a tiny",
        "random-weight model built from the family's real config classes, with the attention backends",
        ", ".join(f"`{b}`" for b in backends) + ": neutral strength gives the unwrapped model's logits (relative",
        "difference at most 1e-5, prefill and four cached steps, one prompt and a left-padded batch of three unequal",
        "ones), the default strength changes them, each row of the batch gives what it gives alone (compared with",
        "`sdpa`), and the detached model is bit-identical. FlexAttention ran uncompiled.",
        "",
        f"torch {data['versions']['torch']}, transformers {data['versions']['transformers']}; {total} cells: "
        + ", ".join(f"{counts[s]} {s}" for s in MARKS)
        + ".",
        "",
        "✓ executed (with a note: not with every backend), – refused (reason below), ✗ failed",
        "",
    ]
    tail = ["", *(f"[{number}] {reason}\n" for reason, number in reasons.items())]
    handmade = {f: e["inputs"] for f, e in families.items() if e["inputs"] != "real processor"}
    if handmade:
        tail += ["## Inputs", "", "Inputs come from the family's real processor, built offline, except:", ""]
        tail += [f"- {family}: {reason}" for family, reason in handmade.items()]
    later = {f: SPECIMENS[f].since for f in families if SPECIMENS[f].since}
    if later:
        tail += ["", "## Older transformers", ""]
        tail += [
            "Everything runs from transformers 5.17 on (`make test-oldest` tests that release) but for families whose",
            "models came later: " + ", ".join(f"{f} {version}" for f, version in later.items()) + ".",
            "",
            "Models of 5.17 take pixels only, not finished features: there, contrastive decoding refuses blip-2,",
            "instructblip, mllama and the videos of llava_onevision.",
        ]
    if data["unsupported"]:
        tail += ["", "## Families that cannot be served", ""]
        tail += [f"- {family}: {reason}" for family, reason in data["unsupported"].items()]
    return "\n".join([*head, *lines, *tail]).rstrip() + "\n"


def compact(data: dict[str, Any]) -> str:
    """The record as JSON with one cell per line."""
    rest = {key: value for key, value in data.items() if key != "families"}
    families = []
    for family, entry in data["families"].items():
        cells = ",\n".join(json.dumps(cell, separators=(",", ":")) for cell in entry["cells"])
        families.append(f'{json.dumps(family)}: {{"inputs": {json.dumps(entry["inputs"])}, "cells": [\n{cells}]}}')
    return json.dumps(rest, indent=1)[:-2] + ',\n "families": {\n' + ",\n".join(families) + "}\n}\n"


app = typer.Typer(add_completion=False)


def _listed(text: str | None, known: Sequence[str], what: str) -> list[str]:
    names = list(known) if not text else text.split(",")
    for name in names:
        if name not in known:
            raise typer.BadParameter(f"unknown {what} '{name}'{registry.closest(name, list(known))}")
    return names


@app.command()
def main(
    families: Annotated[str | None, typer.Option(help="Comma-separated; all by default.")] = None,
    methods: Annotated[str | None, typer.Option(help="Comma-separated; all by default.")] = None,
    backends: Annotated[str | None, typer.Option(help="Comma-separated; all by default.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes.")] = 2,
    dry: Annotated[bool, typer.Option("--dry", help="Write no files.")] = False,
    docs: Annotated[Path, typer.Option(help="The Markdown page.")] = Path("docs/support.md"),
) -> None:
    """Runs the support matrix."""
    chosen = _listed(families, [f for f in ADAPTERS if f in SPECIMENS], "family")
    names = _listed(methods, [row.name for row in registry.methods()], "method")
    used = _listed(backends, BACKENDS, "backend")
    found = []
    total = len(chosen) * len(names) * len(used)
    for cell in rich.progress.track(run(chosen, names, used, jobs), description="matrix", total=total):
        found.append(cell)
        if cell.status == "failed":
            typer.echo(f"{cell.family} {cell.backend} {cell.method}: {cell.detail}", err=True)
    if not dry:
        known = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.is_file() else {}
        data = record(merged(found, known))
        RECORD.write_text(compact(data), encoding="utf-8")
        docs.write_text(document(data), encoding="utf-8")
    tally = {status: sum(c.status == status for c in found) for status in MARKS}
    typer.echo(", ".join(f"{count} {status}" for status, count in tally.items()))
    raise typer.Exit(int(tally["failed"] > 0))


if __name__ == "__main__":
    app()
