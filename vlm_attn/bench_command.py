"""The verb ``vlm-attn bench``: what methods cost next to the stock model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.progress import Progress

__all__ = ["bench"]


def bench(
    what: Annotated[
        Literal["overview", "edits", "prune"],
        typer.Argument(help="overview: fastv, var, vhr; edits: every attention edit; prune: every pruning method."),
    ] = "overview",
    shape: Annotated[list[str] | None, typer.Option("--shape", help="Model shape; repeat for more.")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Timed rounds per shape (7; edits, prune: 5).")] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Decode steps per run (8; edits, prune: 12), the length of an answer.")
    ] = None,
    method: Annotated[
        list[str] | None, typer.Option("--method", help="edits, prune: these alone; repeat for more.")
    ] = None,
    gpu: Annotated[
        bool, typer.Option("--gpu", help="edits, prune: LLaVA-1.5-7B shapes in bf16 on the CUDA device.")
    ] = False,
    clock: Annotated[
        Literal["wall", "cpu"], typer.Option(help="cpu: time of this process alone, for a machine that is not quiet.")
    ] = "wall",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON file to write as well.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")] = False,
) -> None:
    """Measure the speed of the methods against the stock model, in paired single-thread runs."""
    from vlm_attn import bench as module
    from vlm_attn import cli

    if what == "overview" and method:
        raise typer.BadParameter("--method belongs to: vlm-attn bench edits, vlm-attn bench prune")
    if what == "overview" and gpu:
        raise typer.BadParameter("--gpu belongs to: vlm-attn bench edits, vlm-attn bench prune")
    # Without its refreshing thread: the memory runs fork this process.
    with cli.quiet_stdout(as_json), Progress(console=cli.err, transient=True, auto_refresh=False) as progress:
        task = progress.add_task("bench")

        def tick() -> None:
            progress.update(task, advance=1, refresh=True)

        result: dict[str, Any]
        length: dict[str, Any] = {} if steps is None else {"steps": steps}
        if what == "edits":
            rounds = rounds or 5
            progress.update(task, total=module.edit_ticks(shape or (), rounds, method or ()))
            result = module.run_edits(
                shape or (), rounds=rounds, clock=clock, gpu=gpu, only=method or (), tick=tick, **length
            )
        elif what == "prune":
            rounds = rounds or 5
            progress.update(task, total=module.prune_ticks(shape or (), rounds, method or (), gpu))
            result = module.run_prune(
                shape or (), rounds=rounds, clock=clock, gpu=gpu, only=method or (), tick=tick, **length
            )
        else:
            shape, rounds = shape or ["deep", "long"], rounds or 7
            progress.update(task, total=module.ticks(shape, rounds))
            result = module.run_bench(shape, rounds=rounds, clock=clock, tick=tick, **length)
    if output:
        output.write_text(json.dumps(cli.to_data(result), indent=2) + "\n", encoding="utf-8")
    if as_json:
        cli.emit(result)
    else:
        module.print_report(result, cli.out)
    if not result["valid"]:
        raise typer.Exit(1)
