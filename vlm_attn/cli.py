"""The command line: ``vlm-attn VERB``; ``vlm-attn --help`` lists the verbs.

Heavy modules are imported inside the verbs, so that ``vlm-attn --help`` answers at once. Every verb has ``--json``:
standard output then holds one JSON document and nothing else. A mistake of the user gives one line on standard error
and exit code 2; ``--debug`` shows the traceback as well.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import sys
from collections.abc import Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.exceptions import TyperException

import vlm_attn
from vlm_attn.bench_command import bench
from vlm_attn.evaluation.compare_command import compare, leaderboard
from vlm_attn.evaluation.score_command import score
from vlm_attn.read_command import read

if TYPE_CHECKING:
    from vlm_attn.stages import Method

app = typer.Typer(
    name="vlm-attn",
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Vision-attention methods for Hugging Face vision-language models: run, measure, compare.",
)
out = Console()
err = Console(stderr=True)

USER_ERRORS = (ValueError, TypeError, FileNotFoundError, IsADirectoryError, PermissionError)
EXTRA_OF = {"gradio": "demo", "lmms_eval": "eval", "datasets": "eval", "matplotlib": "eval", "nltk": "eval"}


class Listing(StrEnum):
    """What ``ls`` can list."""

    methods = "methods"
    families = "families"
    benchmarks = "benchmarks"


Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
Model = Annotated[str, typer.Option("--model", "-m", help="'scenes', a checkpoint folder or a hub id.")]
Methods = Annotated[list[str] | None, typer.Option("--method", help="Method name or recipe file; repeat to combine.")]
Sets = Annotated[list[str] | None, typer.Option("--set", help="Parameter, as KEY=VALUE or METHOD.KEY=VALUE.")]


def _version(wanted: bool) -> None:
    if wanted:
        out.print(vlm_attn.__version__, highlight=False)
        raise typer.Exit


@app.callback()
def _global(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks; may stand anywhere.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    pass


# ------------------------------------------------------------------------------------------------------ listings


@app.command()
def ls(what: Annotated[Listing, typer.Argument(help="What to list.")], as_json: Json = False) -> None:
    """List methods, model families or benchmarks."""
    rows = listing(what)
    if as_json:
        emit(rows)
        return
    columns = [key for key in rows[0] if any(row.get(key) not in (None, "", [], {}) for row in rows)] if rows else []
    table = Table(title=f"{len(rows)} {what.value}", title_justify="left")
    for key in columns:
        table.add_column(key.replace("_", " "), overflow="fold")
    for row in rows:
        table.add_row(*(escape(_cell(row.get(key))) for key in columns))
    out.print(table)


def listing(what: Listing) -> list[dict[str, Any]]:
    """The rows of one listing as plain data."""
    if what is Listing.methods:
        return [_plain(row) for row in vlm_attn.methods()]
    if what is Listing.families:
        return [_plain(row) for row in vlm_attn.families()]
    from vlm_attn import evaluation

    return [_plain(row) for row in evaluation.benchmarks()]


def _plain(row: Any) -> dict[str, Any]:
    data = row.to_dict() if hasattr(row, "to_dict") else row if isinstance(row, dict) else dataclasses.asdict(row)
    return {str(k): v for k, v in data.items()}


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{k}: {v}" for k, v in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else "" if value is None else str(value)


# ----------------------------------------------------------------------------------------------------------- ask


@app.command()
def ask(
    image: Annotated[str, typer.Argument(help="Picture file, or scene:SEED for a picture of the scenes world.")],
    question: Annotated[str, typer.Argument(help="What to ask about it.")],
    model: Model = "scenes",
    method: Methods = None,
    set_: Sets = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length limit of the answer.")] = 64,
    as_json: Json = False,
) -> None:
    """Ask a model one question about one picture, with or without a method."""
    picture = open_picture(image)
    chosen = build_methods(method or [], set_ or [])
    with quiet_stdout(as_json):
        vlm = vlm_attn.wrap(model, method=chosen or None)
        try:
            answer = vlm.ask(picture, question, max_new_tokens=max_new_tokens)
        finally:
            vlm.close()
    stats = {str(k): v for k, v in dict(answer.stats).items()}
    if as_json:
        emit({"answer": answer.text, "model": model, "method": [m.to_dict() for m in chosen], "stats": stats})
        return
    out.print(answer.text, markup=False, highlight=False)
    err.print(f"[dim]{escape(stats_line(stats))}[/dim]", highlight=False)


app.command()(read)


def open_picture(name: str) -> Any:
    """The picture of a command line argument: a local file or ``scene:SEED``."""
    if re.fullmatch(r"scene:\d{1,12}", name):
        from vlm_attn.scenes.world import make_scene

        return make_scene(int(name.removeprefix("scene:"))).image
    from vlm_attn.images import load_image

    return load_image(name)


def stats_line(stats: dict[str, Any]) -> str:
    """Times and tokens of one answer in a few words."""
    parts = []
    if (total := stats.get("visual_tokens")) is not None:
        parts.append(f"visual tokens kept {(stats.get('kept_tokens') or {}).get('last', total)} of {total}")
    for name, seconds in (stats.get("times") or {}).items():
        parts.append(f"{name.replace('_s', '', 1).replace('_', ' ')} {1000 * seconds:.1f} ms")
    if edited := sum((stats.get("edited_heads") or {}).values()):
        parts.append(f"attention rows edited {edited:,}")
    return " · ".join(parts)


def build_methods(names: Sequence[str], settings: Sequence[str]) -> list[Method]:
    """Methods from ``--method`` and ``--set`` options; options override what a recipe file says."""
    from vlm_attn import recipe

    chosen = list(recipe.pipeline([n for n in names if n]))
    for setting in settings:
        key, value = split_setting(setting)
        owner, _, field = key.rpartition(".")
        if not chosen:
            raise ValueError(f"--set {setting} has no method to go to: add --method NAME")
        if not owner and len(chosen) > 1:
            known = ", ".join(m.name for m in chosen)
            raise ValueError(f"--set {setting}: say which method means, as METHOD.{key}=... (methods: {known})")
        places = [i for i, m in enumerate(chosen) if not owner or m.name == owner]
        if not places:
            raise ValueError(f"--set {setting}: no method '{owner}' is chosen ({', '.join(m.name for m in chosen)})")
        for i in places:
            chosen[i] = recipe.from_dict({**chosen[i].to_dict(), field: value})
    return chosen


def split_setting(setting: str) -> tuple[str, Any]:
    """``"keep=32"`` as ``("keep", 32)``; the value is read as YAML data."""
    key, sign, text = setting.partition("=")
    if not sign or not re.fullmatch(r"[A-Za-z_][\w.-]*", key):
        raise ValueError(f"--set takes KEY=VALUE, not '{setting}'")
    try:
        return key, yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"--set {key}: '{text}' is not a YAML value: {str(error).splitlines()[0]}") from error


# ---------------------------------------------------------------------------------------------- eval and validate


@app.command(name="eval")
def eval_(
    config: Annotated[str, typer.Argument(help="YAML file, or the name of one that ships with the package.")],
    model: Annotated[str | None, typer.Option("--model", "-m", help="Overrides the model of the file.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Samples per benchmark.")] = None,
    output: Annotated[str | None, typer.Option("--output", "-o", help="Folder of the results.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Any other key of the file: KEY=VALUE.")] = None,
    launch: Annotated[int, typer.Option(min=1, max=1024, help="Processes that share the samples.")] = 1,
    as_json: Json = False,
) -> None:
    """Run a benchmark config: model x methods x benchmarks, with paired statistics and a report."""
    from vlm_attn import evaluation

    path = find_config(config)
    overrides = eval_overrides(path, {"model": model, "limit": limit, "output": output}, set_ or [])
    with quiet_stdout(as_json):
        result = evaluation.run_config(path, overrides, processes=launch)
    if result is None:  # one of several processes; another one scores
        return
    if as_json:
        emit(result.to_dict())
    if result.failed:
        raise typer.Exit(1)


def eval_overrides(path: Path, named: dict[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """Config keys from the command line; ``--limit`` also replaces the limits of single benchmarks in the file."""
    from vlm_attn import evaluation

    overrides = dict(map(split_setting, settings)) | {k: v for k, v in named.items() if v is not None}
    if named.get("limit") is not None:
        listed = evaluation.load_config(path, overrides).benchmarks
        overrides["benchmarks"] = [{**b.model_dump(exclude_none=True), "limit": named["limit"]} for b in listed]
    return overrides


@app.command()
def validate(
    config: Annotated[str, typer.Argument(help="YAML file, or the name of one that ships with the package.")],
    as_json: Json = False,
) -> None:
    """Check a benchmark config without running it and show what it resolves to."""
    from vlm_attn import evaluation

    with quiet_stdout(as_json):
        resolved = evaluation.validate_config(find_config(config))
    if as_json:
        emit({"valid": True, "config": resolved})
    else:
        out.print(yaml.safe_dump(to_data(resolved), sort_keys=False), markup=False, highlight=False, end="")
        err.print("[green]valid[/green]")


def find_config(name: str) -> Path:
    """A config file by path, or one that ships with the package by its bare name."""
    path = Path(name)
    if path.is_file():
        return path
    shipped: dict[str, Path] = {}
    for folder in (Path(__file__).parent.parent / "eval_configs", Path(__file__).parent / "eval_configs"):
        shipped |= {p.name: p for p in sorted(folder.glob("*.yaml"))}
    wanted = path.name if path.suffix in (".yaml", ".yml") else f"{path.name}.yaml"
    if wanted in shipped and path.parent.name in ("", "eval_configs"):
        return shipped[wanted]
    from vlm_attn.registry import closest

    raise FileNotFoundError(
        f"config {name} does not exist{closest(wanted, tuple(shipped))} (shipped: {', '.join(shipped) or 'none'})"
    )


app.command()(score)
app.command()(compare)
app.command()(leaderboard)


# ------------------------------------------------------------------------------------- calibrate, bench and demo


@app.command()
def calibrate(
    model: Annotated[str, typer.Argument(help="'scenes', a checkpoint folder or a hub id.")],
    for_: Annotated[
        list[str] | None, typer.Option("--for", help="Method; repeat for more. Default: var, fastv.")
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of pictures that are in no evaluation set.")] = None,
    n: Annotated[int | None, typer.Option("-n", min=1, help="Pictures to calibrate on.")] = None,
    layer: Annotated[
        int, typer.Option(min=0, help="Layer whose positional trend is fitted (fastv: its layer - 1).")
    ] = 1,
    weak_sinks: Annotated[
        bool, typer.Option(help="Record the strongest dimensions even if they are no sinks.")
    ] = False,
    by: Annotated[
        Literal["accuracy", "entropy"],
        typer.Option(help="What zerotuning profiles its heads by: accuracy or entropy."),
    ] = "accuracy",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Profile file to write.")] = None,
    as_json: Json = False,
) -> None:
    """Measure what methods need to know about a checkpoint and save it where `wrap` finds it."""
    from vlm_attn import calibration

    with quiet_stdout(as_json):
        vlm = vlm_attn.wrap(model)
        try:
            result = calibration.calibrate(
                vlm, for_ or (), n=n, out=output, images=images, layer=layer, weak_sinks=weak_sinks, by=by
            )
        finally:
            vlm.close()
    if as_json:
        emit(result)
        return
    out.print(yaml.safe_dump(to_data(result["entries"]), sort_keys=False), markup=False, highlight=False, end="")
    err.print(f"[green]written[/green] {escape(result['profile'])}", highlight=False, soft_wrap=True)


app.command()(bench)


@app.command()
def demo(
    model: Model = "scenes",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 7860,
    as_json: Json = False,
) -> None:
    """Open the demo page: one question, two methods side by side."""
    from vlm_attn_demo.run import serve

    def ready(url: str) -> None:
        if as_json:
            emit({"url": url, "model": model})
        else:
            out.print(f"The demo is at {url} (Ctrl-C stops it)", highlight=False)

    serve(model, host=host, port=port, ready=ready)


# ------------------------------------------------------------------------------------------------------- plumbing


def emit(data: Any) -> None:
    """Writes one JSON document to standard output."""
    typer.echo(json.dumps(to_data(data), indent=2, ensure_ascii=False, allow_nan=False))


def to_data(value: Any) -> Any:
    """Paths, dataclasses, arrays and tensors as plain JSON data; NaN and infinities as null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_data(dataclasses.asdict(value))
    if isinstance(value, dict):
        return {str(k): to_data(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [to_data(v) for v in value]
    if hasattr(value, "tolist"):
        return to_data(value.tolist())
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    return value if value is None or isinstance(value, str | int | bool) else str(value)


@contextlib.contextmanager
def quiet_stdout(active: bool) -> Iterator[None]:
    """Sends what libraries write to standard output to standard error, so that ``--json`` stays one document."""
    with contextlib.redirect_stdout(sys.stderr) if active else contextlib.nullcontext():
        yield


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``vlm-attn``: runs a verb and turns errors into one line and an exit code."""
    args = list(sys.argv[1:] if arguments is None else arguments)
    end = args.index("--") if "--" in args else len(args)
    debug = "--debug" in args[:end]
    args = [a for i, a in enumerate(args) if a != "--debug" or i > end]
    as_json = "--json" in args[:end]
    sys.exit(_run(args, debug, as_json))


def _run(args: list[str], debug: bool, as_json: bool) -> int:
    try:
        code = app(args or ["--help"], prog_name="vlm-attn", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except (typer.Abort, KeyboardInterrupt):
        return _fail("stopped", 130, as_json)
    except BrokenPipeError:
        return 1
    except TyperException as error:
        return _fail(f"{error.format_message()} (vlm-attn --help shows what there is)", 2, as_json)
    except Exception as error:
        if debug:
            err.print_exception()
        return _fail(*_explained(error, debug), as_json)


def _explained(error: Exception, debug: bool) -> tuple[str, int]:
    """Message and exit code of an error: 2 where the user can cure it, 1 for what must not happen."""
    if isinstance(error, ModuleNotFoundError):
        extra = EXTRA_OF.get((error.name or "").partition(".")[0])
        if extra:
            return f'{error}; install it with: pip install "vlm-attn[{extra}]"', 2
    elif isinstance(error, USER_ERRORS):
        return str(error), 2
    return f"{type(error).__name__}: {error}{'' if debug else ' (--debug shows where)'}", 1


def _fail(message: str, code: int, as_json: bool) -> int:
    err.print(f"[bold red]error:[/bold red] {escape(' '.join(message.split()))}", highlight=False, soft_wrap=True)
    if as_json:
        with contextlib.suppress(OSError):  # standard output itself may be what failed
            emit({"error": " ".join(message.split()), "exit_code": code})
    return code
