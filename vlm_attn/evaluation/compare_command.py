"""The verbs ``vlm-attn compare`` and ``vlm-attn leaderboard``: result folders beside each other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["compare", "leaderboard"]

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]


def compare(
    first: Annotated[str, typer.Argument(metavar="A", help="Result folder.")],
    second: Annotated[str, typer.Argument(metavar="B", help="Result folder; differences are B minus A.")],
    a: Annotated[str | None, typer.Option("--a", help="Column of A; default: every column in both.")] = None,
    b: Annotated[str | None, typer.Option("--b", help="Column of B.")] = None,
    resamples: Annotated[int, typer.Option(min=100, max=100_000, help="Size of the bootstrap.")] = 2000,
    as_json: Json = False,
) -> None:
    """Compare two runs sample by sample; refuses runs with other samples or another protocol."""
    from vlm_attn import cli
    from vlm_attn.evaluation.compare import compare_folders, comparison_table

    with cli.quiet_stdout(as_json):
        result = compare_folders(first, second, a=a, b=b, resamples=resamples)
    if as_json:
        cli.emit(result)
    else:
        cli.out.print(comparison_table(result))


def leaderboard(
    folders: Annotated[list[str], typer.Argument(help="Result folders.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Page to write.")] = Path("leaderboard.html"),
    as_json: Json = False,
) -> None:
    """Write one page with the results of many runs, grouped by benchmark and protocol."""
    from vlm_attn import cli
    from vlm_attn.evaluation.folders import read_folder
    from vlm_attn.evaluation.leaderboard import rows_of, write_leaderboard

    with cli.quiet_stdout(as_json):
        path = write_leaderboard(output, folders)
    if as_json:
        cli.emit({"page": str(path), "rows": rows_of([read_folder(folder) for folder in folders])})
    else:
        cli.out.print(f"written: {path}", highlight=False)
