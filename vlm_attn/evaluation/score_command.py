"""The verb ``vlm-attn score``: the score of an answer file, wherever it was produced."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["score"]


def score(
    benchmark: Annotated[str, typer.Argument(help="pope, chair, amber, mme, hallusionbench, mmhal or ghost.")],
    answers: Annotated[Path, typer.Option("--answers", "-a", help="Answer file (MME: also a folder of .txt files).")],
    data: Annotated[Path | None, typer.Option("--data", "-d", help="Folder of the benchmark's own files.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File for one JSON line per answer.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Option of the scorer, as KEY=VALUE: parser, variant, split ...")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")] = False,
) -> None:
    """Score an answer file of a published benchmark."""
    from vlm_attn import cli
    from vlm_attn.evaluation.scorers import score_file

    options = dict(map(cli.split_setting, set_ or []))
    with cli.quiet_stdout(as_json):
        report = score_file(benchmark, answers, data, **options)
        if output:
            report.write_samples(output)
    if as_json:
        cli.emit(report.to_dict())
    else:
        cli.out.print(report.render())
