"""Model x methods x benchmarks through lmms-eval's `simple_evaluate`, resumable, then scored and compared.

Folder of a run:

- ``samples.jsonl``: one line per answered sample, written as it is produced; holds all that scoring needs, no times.
- ``timings.jsonl``: the measured times of the same samples. Only this file and ``latency`` below differ between an
  uninterrupted run and one that was killed and continued.
- ``results.json``: lmms-eval's keys with one level for the method (``results[method][task]``), plus ``scores``
  (intervals, all parsers), ``method``, ``paired``, ``pooled``, ``curves``, ``kept_tokens``, ``decoder_tokens``,
  ``latency``, ``env``, ``failed``.
- ``methods/<label>.json``: lmms-eval's own result of one method, in its own shape.
- ``report.html``, ``config.yaml`` (resolved), ``run.json`` (what must agree to continue), ``harness.log``.
- ``ranks/``: work of several processes while it lasts (`ranks`, `launch`).
"""

from __future__ import annotations

import contextlib
import logging
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import yaml
from rich.console import Console

from vlm_attn.evaluation import environment
from vlm_attn.evaluation.answers import plain
from vlm_attn.evaluation.assemble import HARNESS_KEYS, assemble
from vlm_attn.evaluation.config import BenchmarkEntry, ConfigError, EvalConfig, MethodEntry, load_config, method_hash
from vlm_attn.evaluation.matching import unknown_name
from vlm_attn.evaluation.progress import RunProgress, terminal
from vlm_attn.evaluation.ranks import Order, Rank, ShareDone, gather, hidden, rank_folder, sort_files
from vlm_attn.evaluation.recorder import RunRecorder
from vlm_attn.evaluation.store import FolderLock, JsonLines, write_json, write_text

__all__ = ["Backend", "RunResult", "run", "run_config", "validate_config"]

logger = logging.getLogger(__name__)

TASK_FOLDER = Path(__file__).parent / "tasks"
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


class Backend(Protocol):
    """Where models and methods come from; tests put a small one in place of `VlmBackend`."""

    def describe(self, spec: Any) -> Any:
        """The method in full, every default filled in, as plain data (None for the baseline); bad specs raise."""

    def load(self, config: EvalConfig) -> Any:
        """The model, wrapped, without a method."""


class VlmBackend:
    """The real one: `vlm_attn.wrap`."""

    def describe(self, spec: Any) -> Any:
        if spec is None:
            return None
        from vlm_attn import recipe

        return [method.to_dict() for method in recipe.pipeline(spec)]

    def load(self, config: EvalConfig) -> Any:
        import vlm_attn

        options: dict[str, Any] = {}
        if config.dtype != "auto":
            options["dtype"] = config.dtype
        if config.device is not None:
            options["device_map"] = config.device  # "auto" spreads a model over several devices
        if config.attention is not None:
            options["attn_implementation"] = config.attention
        return vlm_attn.wrap(config.model, None, **options)


@dataclass(frozen=True)
class RunResult:
    """What a finished run hands back.

    ``results`` is the content of ``results.json``; ``failed`` maps method labels to the error that stopped them (the
    other methods were still run); ``report`` is the HTML file, or None if it was switched off.
    """

    folder: Path
    results: dict[str, Any]
    report: Path | None = None
    failed: dict[str, str] = field(default_factory=dict)

    def table(self) -> Any:
        """The result tables as a rich renderable."""
        from vlm_attn.evaluation.tables import result_tables

        return result_tables(self.results)

    def to_dict(self) -> dict[str, Any]:
        return {
            "folder": str(self.folder),
            "report": str(self.report) if self.report else None,
            "failed": self.failed,
            "results": self.results,
        }


def validate_config(path: str | Path, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Check a config without running it and return it with every default. Methods and benchmarks are looked up; files
    of local benchmarks are not opened."""
    config = load_config(path, overrides)
    _describe_all(config, VlmBackend())
    _check_benchmarks(config, files=False)
    return config.resolved()


def run_config(
    path: str | Path, overrides: Mapping[str, Any] | None = None, *, processes: int = 1
) -> RunResult | None:
    """Run an evaluation config file; ``overrides`` (from a command line) win over the file.

    ``processes`` above 1 share the work on this machine. Within a run of several processes this answers the share of
    this one, and returns None where another process scores.
    """
    from vlm_attn.evaluation import launch

    config, rank = load_config(path, overrides), Rank.current()
    if rank.count > 1:
        return launch.run_rank(config, rank)
    return launch.launch(config, processes) if processes > 1 else run(config)


def check(config: EvalConfig, backend: Backend | None = None) -> Order:
    """Check methods and benchmarks before anything is loaded; the order in which one process answers them."""
    described = _describe_all(config, backend or VlmBackend())
    _check_benchmarks(config)
    return _order(config, described)


def _order(config: EvalConfig, described: Mapping[str, Any]) -> Order:
    return Order([method_hash(described[m.label]) for m in config.methods], [b.name for b in config.benchmarks])


def start_anew(config: EvalConfig, folder: Path) -> None:
    """Remove the answers of an earlier run if the config says so."""
    if not config.resume:
        for name in ("samples.jsonl", "timings.jsonl", "run.json"):
            (folder / name).unlink(missing_ok=True)
        shutil.rmtree(folder / "ranks", ignore_errors=True)


def answer_share(config: EvalConfig, rank: Rank, backend: Backend | None = None) -> None:
    """Answer this rank's share of what the run lacks into its folder; no scores, no waiting for other ranks."""
    backend = backend or VlmBackend()
    described = _describe_all(config, backend)
    _check_benchmarks(config)
    folder = Path(config.output)
    own = rank_folder(folder, rank.index)
    console = terminal(quiet=config.quiet)
    with FolderLock(own), hidden():
        known = environment.read_identity(folder / "run.json")
        model = _Model(config, backend, own / "run.json", known=known, device=rank.device(config.device))
        with _recording(config, own, earlier=folder / "samples.jsonl") as recorder:
            try:
                _, failed = _run_methods(config, described, model, recorder, own, console, rank)
            finally:
                model.close()
    for label, message in failed.items():  # the process that scores meets the same error and reports it
        console.print(f"{label}: {message}", markup=False, highlight=False)


@contextlib.contextmanager
def _recording(config: EvalConfig, folder: Path, earlier: Path | None = None) -> Iterator[RunRecorder]:
    """The files of a run, open for appending."""
    if config.threads is not None:
        import torch

        torch.set_num_threads(config.threads)
    samples, timings = JsonLines(folder / "samples.jsonl"), JsonLines(folder / "timings.jsonl")
    try:
        yield RunRecorder(samples, timings, model=config.model, seed=config.seed, earlier=earlier)
    finally:
        samples.close()
        timings.close()


def run(config: EvalConfig, backend: Backend | None = None, console: Console | None = None) -> RunResult:
    """Run a config. Started again after a kill, it continues where it stopped."""
    console = console or terminal(quiet=config.quiet)
    backend = backend or VlmBackend()
    described = _describe_all(config, backend)
    _check_benchmarks(config)
    folder = Path(config.output or "runs/evaluation")
    resolved = config.resolved()
    console.rule("[bold]vlm-attn eval[/bold]")
    console.print(yaml.safe_dump(resolved, sort_keys=False).rstrip(), markup=False, highlight=False)
    order = _order(config, described)
    with FolderLock(folder), hidden():
        start_anew(config, folder)
        gather(folder, order)
        model = _Model(config, backend, folder / "run.json")
        write_text(folder / "config.yaml", yaml.safe_dump(resolved, sort_keys=False))
        with _recording(config, folder) as recorder:
            try:
                harness, failed = _run_methods(config, described, model, recorder, folder, console)
            finally:
                model.close()
        sort_files(folder, order)
        results = assemble(config, described, harness, recorder, failed, environment.read_identity(model.path))
        write_json(folder / "results.json", results)
        for label, figures in harness.items():
            write_json(folder / "methods" / f"{re.sub(r'[^A-Za-z0-9_.+=-]', '_', label)}.json", figures)
        report = None
        if config.report:
            from vlm_attn.evaluation.report import write_report

            report = write_report(folder / "report.html", results, recorder)
    result = RunResult(folder=folder, results=results, report=report, failed=failed)
    console.print(result.table())
    console.print(f"results: {folder / 'results.json'}" + (f"\nreport:  {report}" if report else ""), highlight=False)
    return result


class _Model:
    """Loads the model when the first missing sample asks for it and puts the right method in place."""

    def __init__(
        self,
        config: EvalConfig,
        backend: Backend,
        path: Path,
        known: Mapping[str, Any] | None = None,
        device: str | None = None,
    ) -> None:
        """``path``: this process's ``run.json``; ``known``: that of the whole run; ``device``: this
        process's."""
        self.config, self.backend, self.path = config, backend, path
        self.placed = config.model_copy(update={"device": device or config.device})
        self.vlm: Any = None
        self.entry: MethodEntry | None = None
        self.digest = ""
        self._active: MethodEntry | None = None
        self.identity = {**(known or {}), **environment.read_identity(path)}
        environment.check_identity(self.identity, {"settings": config.answer_key()}, path.parent)

    def use(self, entry: MethodEntry, digest: str) -> None:
        self.entry, self.digest = entry, digest

    def get(self) -> Any:
        if self.vlm is None:
            self.vlm = self.backend.load(self.placed)
            identity = {"settings": self.config.answer_key(), "weights": environment.weights_hash(self.vlm.model)}
            environment.check_identity(self.identity, identity, self.path.parent)
            self.identity = {"methods": {}, **self.identity, **identity, "env": environment.describe(self.vlm)}
            write_json(self.path, self.identity)
        if self._active is not self.entry:
            self._active = None
            self.vlm.set_method(self.entry.spec() if self.entry else None)
            self._keep_resolved(plain(self.vlm.method))
            self._active = self.entry
        return self.vlm

    def _keep_resolved(self, resolved: Any) -> None:
        """Remember what the checkpoint's calibration made of the method; a continued run must find the same."""
        known = self.identity["methods"]
        if known.setdefault(self.digest, resolved) != resolved:
            raise ConfigError(
                f"{self.path.parent} holds answers of {self.entry.label if self.entry else 'this method'} with other "
                f"calibrated values ({known[self.digest]} then, {resolved} now). Choose another `output`, or pass "
                "resume=false."
            )
        write_json(self.path, self.identity)

    def close(self) -> None:
        if self.vlm is not None:
            self.vlm.close()


def _describe_all(config: EvalConfig, backend: Backend) -> dict[str, Any]:
    """Every method in full by label; all problems at once, before anything runs."""
    described, problems = {}, []
    for entry in config.methods:
        try:
            described[entry.label] = backend.describe(entry.spec())
        except (ValueError, TypeError) as error:
            problems.append(f"  methods, {entry.label}: {error}")
    if problems:
        raise ConfigError("\n".join([f"{len(problems)} problem(s)", *problems]))
    return described


def local_tasks() -> list[str]:
    """Names of the tasks that ship with the package."""
    return sorted(path.stem for path in TASK_FOLDER.glob("*.yaml") if not path.stem.startswith("_"))


def _check_benchmarks(config: EvalConfig, files: bool = True) -> None:
    local = local_tasks()
    others = [entry.name for entry in config.benchmarks if entry.name not in local and not entry.is_local]
    for name in others:
        if name.startswith("scenes"):
            raise ConfigError(unknown_name("benchmark", name, local))
    if others:  # indexing lmms-eval's own tasks takes seconds
        known = [*local, *_task_manager(defaults=True).all_tasks]
        for name in others:
            if name not in known:
                raise ConfigError(unknown_name("benchmark", name, known))

    for entry in config.benchmarks:
        if files and entry.is_local:
            task = _task(config, entry)
            task.pictures.check(task.documents[: config.limit_of(entry)])


def _task(config: EvalConfig, benchmark: BenchmarkEntry) -> Any:
    """What lmms-eval is asked to run: one task object for all methods, or the name of a task of its own."""
    if benchmark.name in local_tasks():
        return _shipped(benchmark.name)
    if not benchmark.is_local:
        return benchmark.name
    from vlm_attn.evaluation.local_tasks import build

    return build(benchmark.name, str(config.data_of(benchmark)), str(config.images_of(benchmark)), benchmark.ids,
                 benchmark.prompt)  # fmt: skip


@lru_cache(maxsize=16)
def _shipped(name: str) -> Any:
    """The task object of a task that ships with the package."""
    return _task_manager(defaults=False).load_task_or_group([name], "chat")[name]


def _task_manager(*, defaults: bool) -> Any:
    from lmms_eval.tasks import TaskManager

    return TaskManager(include_path=str(TASK_FOLDER), include_defaults=defaults)


def _run_methods(
    config: EvalConfig,
    described: Mapping[str, Any],
    model: _Model,
    recorder: RunRecorder,
    folder: Path,
    console: Console,
    rank: Rank | None = None,
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """lmms-eval's results by method label (none for a ``rank``, which only answers its share), and the errors of
    methods that could not be finished."""
    from vlm_attn.evaluation.lmms import VlmAttnChat

    manager = _task_manager(defaults=any(b.name not in local_tasks() and not b.is_local for b in config.benchmarks))
    harness: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    with RunProgress(console, len(config.methods)) as progress:
        chat = VlmAttnChat.from_vlm(
            model.get,
            batch_size=config.batch_size,
            seed=config.seed,
            max_new_tokens=config.max_new_tokens,
            recorder=recorder,
            bar=progress.bar,
            rank=rank,
            cache=config.cache,
        )
        for entry in config.methods:
            digest = method_hash(described[entry.label])
            model.use(entry, digest)
            recorder.use(entry.label, digest)
            merged: dict[str, Any] = {}
            try:
                for benchmark in config.benchmarks:
                    chat.warmup = config.warmup
                    progress.title = f"{entry.label}: {benchmark.name}"
                    with _harness_output(folder), contextlib.suppress(ShareDone):
                        limit = config.limit_of(benchmark)
                        _merge(merged, _evaluate(chat, _task(config, benchmark), limit, config.seed, manager))
            except Exception as error:  # one method's failure must not cost the others' results
                logger.debug("method %s failed", entry.label, exc_info=True)
                if entry.is_baseline or isinstance(error, ConfigError | OSError):  # OSError: the disk, not the method
                    raise
                failed[entry.label] = f"{type(error).__name__}: {error}"
            else:
                harness[entry.label] = merged
            progress.finish_method(entry.label)
    return harness, failed


def _evaluate(chat: Any, task: Any, limit: int | None, seed: int, manager: Any) -> dict[str, Any]:
    from lmms_eval.evaluator import simple_evaluate

    result: dict[str, Any] = simple_evaluate(
        model=chat,
        tasks=[task],
        limit=limit,
        task_manager=manager,
        bootstrap_iters=0,
        log_samples=False,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
        process_docs_parallel=1,
    )
    return _clean(result)


def _clean(value: Any) -> Any:
    """Plain data without memory addresses, so that equal runs write equal files."""
    if isinstance(value, Mapping):
        return {str(key): _clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(item) for item in value]
    if isinstance(value, float) and value != value:
        return None
    if value is None or isinstance(value, bool | int | float):
        return value
    return _ADDRESS.sub("", str(value)) if not hasattr(value, "item") else _clean(value.item())


def _merge(total: dict[str, Any], part: Mapping[str, Any]) -> None:
    """Add one task's result to a method's: mappings are united, the rest is taken from the first."""
    for key in ("results", *HARNESS_KEYS):
        total.setdefault(key, {}).update(part.get(key) or {})


@contextlib.contextmanager
def _harness_output(folder: Path) -> Iterator[None]:
    """Send what lmms-eval prints (bars of its own, notes) to ``harness.log``; our bar keeps the terminal."""
    from loguru import logger as harness_logger

    harness_logger.disable("lmms_eval")
    try:
        with (
            (folder / "harness.log").open("a", encoding="utf-8") as log,
            contextlib.redirect_stderr(log),
            contextlib.redirect_stdout(log),
        ):
            yield
    finally:
        harness_logger.enable("lmms_eval")
