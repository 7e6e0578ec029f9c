"""The verb ``vlm-attn read``: what a model attends to while it answers, as numbers, files and a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["read"]


def read(
    image: Annotated[str, typer.Argument(help="Picture file, or scene:SEED for a picture of the bundled world.")],
    question: Annotated[str, typer.Argument(help="The question.")],
    model: Annotated[str, typer.Option("--model", "-m", help="'scenes', a checkpoint folder or a hub id.")] = "scenes",
    what: Annotated[
        list[str] | None,
        typer.Option("--what", help="shares, vas, heads, mdi, aei, sinks, vhd or t_vhd; repeat for more."),
    ] = None,
    method: Annotated[
        list[str] | None, typer.Option("--method", help="Method name or recipe file; repeat to combine.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Parameter, as KEY=VALUE or METHOD.KEY=VALUE.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length limit of the answer.")] = 32,
    baseline: Annotated[
        bool, typer.Option("--baseline", help="Read the model without the method too; heat maps show the change.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="PNG file for heat maps over layers and heads.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Record to write: PATH.json and PATH.safetensors.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")] = False,
) -> None:
    """Read what a model attends to while it answers, with or without a method."""
    import vlm_attn
    from vlm_attn import cli, readouts

    if plot:
        import matplotlib  # noqa: F401 - missed before the model runs, not after

    wanted = tuple(what or readouts.DEFAULT)
    picture = cli.open_picture(image)
    chosen = cli.build_methods(method or [], set_ or [])
    if baseline and not chosen:
        raise ValueError("--baseline compares a method with none: add --method NAME")
    with cli.quiet_stdout(as_json):
        vlm = vlm_attn.wrap(model, method=chosen or None)
        try:
            record = vlm.read(picture, question, wanted, max_new_tokens=max_new_tokens)
            base = None
            if baseline:
                base = vlm.set_method(None).read(picture, question, wanted, max_new_tokens=max_new_tokens)
            answer = vlm.processor.decode(list(record.tokens), skip_special_tokens=True).strip()
        finally:
            vlm.close()
        files = {}
        if plot:
            files["plot"] = str(readouts.plot(record, plot, baseline=base))
        if output:
            files["record"] = str(record.save(output))
    summary = record.summary()
    if as_json:
        without = {} if base is None else {"baseline": base.summary()}
        cli.emit({"answer": answer, **record.about, "layers": record.layers, **summary, **without, **files})
        return
    shown = [answer, *lines(summary, record.layers)]
    shown += [] if base is None else ["without the method:", *lines(base.summary(), base.layers)]
    for line in shown:
        cli.out.print(line, markup=False, highlight=False, soft_wrap=True)
    for name, path in files.items():
        cli.err.print(f"[green]{name} written[/green] {path}", highlight=False, soft_wrap=True)


def lines(summary: dict[str, Any], layers: tuple[int, ...]) -> list[str]:
    """A summary in lines of text."""
    rows = {"generated": "rows of the answer", "last": "last prompt row"}[summary["rows"]]
    out = []
    for group, values in summary.get("shares", {}).items():
        shown = " ".join(f"{100 * value:.0f}" for value in values)
        out.append(f"{group:<6} % per layer ({rows}): {shown}")
    if "vas" in summary:
        out.append(f"visual attention score: {summary['vas']['mean']} (mean, {summary['vas']['rows']} rows)")
    if "heads" in summary:
        best = ", ".join(f"{h['layer']}.{h['head']} ({h['score']})" for h in summary["heads"][:5])
        out.append(f"visual heads, layer.head (score): {best}")
    for name, value in summary.get("mdi", {}).items():
        out.append(f"text dominance MDI, {name}: {_early_to_late(value)}")
    for name, value in summary.get("aei", {}).items():
        out.append(f"attention efficiency of {name}: {_early_to_late(value)}")
    if "sinks" in summary:
        out.append(f"sinks: {len(summary['sinks'])}")
        for sink in summary["sinks"][:8]:
            place = "" if sink["cell"] is None else f" image {sink['image']}, cell {tuple(sink['cell'])}"
            kind = "primary" if sink["primary"] else "secondary"
            where = f"{len(sink['layers'])} of {len(layers)} layers, {100 * sink['share']:.1f} %"
            out.append(f"  {kind}: token {sink['position']} ({sink['kind']}{place}), {where}")
    if "vhd" in summary:
        out.append(f"vision-aware divergence per layer: {' '.join(map(str, summary['vhd']['mean']))}")
    if "t_vhd" in summary:
        out.append(f"divergence per token: {' '.join(map(str, summary['t_vhd']))}")
    return out


def _early_to_late(value: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value[name]}" for name in ("early", "middle", "late"))
