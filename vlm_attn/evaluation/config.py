"""The evaluation config: what a YAML file under ``eval_configs/`` may say.

Command line beats YAML beats defaults. Unknown keys are refused with the closest match, at every level.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from vlm_attn.evaluation.matching import unknown_name

__all__ = ["BenchmarkEntry", "ConfigError", "EvalConfig", "MethodEntry", "load_config"]

BASELINE = "baseline"
LOCAL_KEYS = ("data", "images", "ids", "prompt")
_MAX_CONFIG_BYTES = 1_000_000
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+=,\- ]{0,63}")
_TASK = re.compile(r"[A-Za-z0-9][A-Za-z0-9_\-.]{0,99}")


class ConfigError(ValueError):
    """A config that cannot be run; the message says which key, what was given and what to do."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), validate_default=False)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: Any) -> Any:
        if isinstance(data, Mapping):
            for key in data:
                if key not in cls.model_fields:
                    raise ValueError(unknown_name("key", key, cls.model_fields))
        return data


class _Named(_Strict):
    """An entry that may be written as its bare name."""

    _expected: ClassVar[str]

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, data: Any) -> Any:
        if isinstance(data, str):
            return {"name": data}
        if not isinstance(data, Mapping):
            raise ValueError(f"{cls._expected}, got {type(data).__name__}.")
        return data


def _checked_label(what: str, label: str) -> str:
    if not _LABEL.fullmatch(label):
        raise ValueError(f"{what} {label!r}: use 1-64 letters, digits, blanks and _ . + = , - only.")
    return label


def _short(value: Any) -> str:
    """A parameter's value in a label: a list joined by +."""
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)


class MethodEntry(_Named):
    """One column of the table: a method by name with parameters, or a pipeline of several.

    - ``name``: registered method, or ``baseline`` for the plain model.
    - ``params``: the method's parameters; whatever is left out keeps its default.
    - ``pipeline``: instead of ``name``: list of ``{name, params}`` applied together.
    - ``label``: how the report calls it; unique within a config; default: the name.
    - ``sweep``: ``{parameter: [values]}``: one column per value, labelled ``label parameter=value``; several
      parameters have lists of one length and change together.
    - ``series``: columns of one curve (score against kept visual tokens) share this name; a sweep is one by itself.
    """

    _expected: ClassVar[str] = "A method is a name or a mapping with name/params/label"

    name: str | None = None
    params: dict[str, Any] = Field(default_factory=dict)
    pipeline: list[MethodEntry] | None = None
    label: str = ""
    sweep: dict[str, Annotated[list[Any], Field(min_length=1)]] | None = Field(default=None, min_length=1)
    series: str = ""

    @model_validator(mode="after")
    def _one_kind(self) -> MethodEntry:
        if (self.name is None) == (self.pipeline is None):
            raise ValueError("Give a method either `name` or `pipeline`.")
        if self.pipeline is not None and (self.params or not self.pipeline):
            raise ValueError("A pipeline lists at least one method; parameters belong to its entries.")
        if self.name == BASELINE and self.params:
            raise ValueError("The baseline takes no parameters.")
        label = self.label or self.name or "+".join(entry.name or "" for entry in self.pipeline or [])
        object.__setattr__(self, "label", _checked_label("Label", label))
        if self.series:
            _checked_label("Series", self.series)
        return self

    @model_validator(mode="after")
    def _one_sweep(self) -> MethodEntry:
        if any(entry.sweep or entry.series for entry in self.pipeline or ()):
            raise ValueError("A sweep or series is of a whole column; entries of a pipeline take neither.")
        if self.sweep is None:
            return self
        if self.name is None or self.is_baseline:
            raise ValueError("A sweep varies parameters of one method: give it a `name` other than the baseline.")
        if both := sorted(self.sweep.keys() & self.params.keys()):
            raise ValueError(f"{', '.join(both)}: given in `params` and in `sweep`; keep one.")
        if len({len(values) for values in self.sweep.values()}) > 1:
            lengths = ", ".join(f"{key}: {len(values)}" for key, values in self.sweep.items())
            raise ValueError(f"Parameters of a sweep change together and need lists of one length, got {lengths}.")
        return self

    @property
    def is_baseline(self) -> bool:
        return self.name == BASELINE

    def columns(self) -> list[MethodEntry]:
        """The entry itself, or one entry per point of its sweep."""
        if self.sweep is None:
            return [self]
        points = [dict(zip(self.sweep, values, strict=True)) for values in zip(*self.sweep.values(), strict=True)]
        return [
            MethodEntry(
                name=self.name,
                params=self.params | point,
                label=f"{self.label} " + ", ".join(f"{key}={_short(value)}" for key, value in point.items()),
                series=self.series or self.label,
            )
            for point in points
        ]

    def plain(self) -> dict[str, Any]:
        """The entry as a config file would say it."""
        series = {"series": self.series} if self.series else {}
        if self.pipeline is not None:
            return {"label": self.label, "pipeline": [entry.plain() for entry in self.pipeline]} | series
        params = {"params": dict(self.params)} if self.params else {}
        return {"label": self.label, "name": self.name} | params | series

    def spec(self) -> Any:
        """What `vlm_attn.wrap(model, method=...)` takes: None, a dict, or a list of dicts."""
        if self.is_baseline:
            return None
        if self.pipeline is not None:
            return [entry.spec() for entry in self.pipeline]
        return {"name": self.name, **self.params}


class BenchmarkEntry(_Named):
    """One benchmark: an lmms-eval task name, and how many of its samples (``limit``; default: the config's).

    Benchmarks from local folders (names with ``local_``, see ``vlm-attn ls benchmarks``) also take ``data`` and
    ``images`` (default: the config's), ``ids`` (CHAIR's images: a published list by name, or a JSON file) and
    ``prompt`` (what follows a yes/no question: llava, plain, vcd, clearsight or mme).
    """

    _expected: ClassVar[str] = "A benchmark is a task name or a mapping with name/limit"

    name: str
    limit: int | None = Field(default=None, ge=1)
    data: str | None = None
    images: str | None = None
    ids: str | None = None
    prompt: str | None = None

    @field_validator("name")
    @classmethod
    def _plain_name(cls, name: str) -> str:
        if not _TASK.fullmatch(name):
            raise ValueError(
                f"Benchmark {name!r} is not a task name (letters, digits, _ - .). Paths are not accepted."
            )
        return name

    @model_validator(mode="after")
    def _local_keys(self) -> BenchmarkEntry:
        from vlm_attn.evaluation.local_docs import SUFFIXES, kind_of

        if self.is_local:
            kind_of(self.name)
            if self.prompt is not None and self.prompt not in SUFFIXES:
                raise ValueError(unknown_name("prompt", self.prompt, SUFFIXES))
        elif given := [key for key in LOCAL_KEYS if getattr(self, key) is not None]:
            raise ValueError(f"{', '.join(given)}: only benchmarks from local folders (local_...) take this.")
        return self

    @property
    def is_local(self) -> bool:
        return self.name.startswith("local_")


class EvalConfig(_Strict):
    """A whole evaluation: model x methods x benchmarks.

    - ``model``: hub id, local folder, or ``scenes`` (the checkpoint that ships with the package).
    - ``methods``: see `MethodEntry`. The baseline is always run, and first: everything is compared with it.
    - ``benchmarks``: see `BenchmarkEntry`; ``limit`` caps all of them unless they have their own.
    - ``data``, ``images``: folders of the published question files and pictures, for benchmarks named ``local_...``.
    - ``batch_size``: above 1 latency is per batch, and methods that rewrite the request are still asked one by one.
    - ``seed``: of every sample (mixed with task and sample id, so it does not depend on order or resuming).
    - ``dtype``, ``device``, ``attention``: passed when the model is loaded; ``threads``: CPU threads of torch.
    - ``max_new_tokens``: replaces every task's own; ``warmup``: discarded generations before timing starts.
    - ``resamples``: bootstrap size of the intervals; ``parser``: POPE parser of the headline figures.
    - ``cache``: folder of answers kept across runs; an answer is taken from it only if nothing that could change it
      has changed (`cache`). Off by default; cached answers have no times.
    - ``output``: result folder, default ``runs/<name of the config file>``; ``report``: also write the HTML report.
    - ``resume``: continue what the output folder holds (default); false starts it anew.
    - ``quiet``: no tables and bars in the terminal.
    """

    model: str = "scenes"
    methods: tuple[MethodEntry, ...] = (MethodEntry(name=BASELINE),)
    benchmarks: tuple[BenchmarkEntry, ...] = Field(min_length=1)
    limit: int | None = Field(default=None, ge=1)
    data: str = "data"
    images: str = "data/images"
    batch_size: int = Field(default=1, ge=1, le=1024)
    seed: int = Field(default=0, ge=0, lt=2**31)
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "auto"
    device: str | None = Field(default=None, pattern=r"^(cpu|cuda(:\d+)?|mps|auto)$")
    attention: Literal["sdpa", "eager", "flash_attention_2", "flex_attention"] | None = None
    threads: int | None = Field(default=None, ge=1, le=512)
    max_new_tokens: int | None = Field(default=None, ge=1, le=8192)
    warmup: int = Field(default=3, ge=0, le=1000)
    resamples: int = Field(default=2000, ge=100, le=100_000)
    parser: Literal["pope", "opera", "vcd", "strict", "vlmevalkit", "ours"] = "pope"
    cache: str | None = None
    output: str = ""
    report: bool = True
    resume: bool = True
    quiet: bool = False

    @field_validator("methods", "benchmarks", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str | Mapping) else value

    @model_validator(mode="after")
    def _consistent(self) -> EvalConfig:
        methods = [column for entry in self.methods for column in entry.columns()]
        baseline = next((m for m in methods if m.is_baseline), MethodEntry(name=BASELINE))
        methods = [baseline, *(m for m in methods if not m.is_baseline)]
        object.__setattr__(self, "methods", tuple(methods))
        for what, names in (
            ("Method label", [m.label for m in self.methods]),
            ("Benchmark", [b.name for b in self.benchmarks]),
        ):
            for name in names:
                if names.count(name) > 1:
                    raise ValueError(f"{what} {name!r} occurs twice. Give each entry its own `label`, or drop one.")
        return self

    def limit_of(self, benchmark: BenchmarkEntry) -> int | None:
        return benchmark.limit if benchmark.limit is not None else self.limit

    def data_of(self, benchmark: BenchmarkEntry) -> str | None:
        return (benchmark.data or self.data) if benchmark.is_local else None

    def images_of(self, benchmark: BenchmarkEntry) -> str | None:
        return (benchmark.images or self.images) if benchmark.is_local else None

    def answer_key(self) -> dict[str, Any]:
        """The settings that change what the model answers; two runs may share a folder only if these agree."""
        return {
            key: getattr(self, key)
            for key in ("model", "batch_size", "seed", "dtype", "device", "attention", "max_new_tokens")
        }

    def resolved(self) -> dict[str, Any]:
        """Plain data of the whole config, every default filled in; `build_config` reads it back."""
        data: dict[str, Any] = json.loads(self.model_dump_json())
        data["methods"] = [m.plain() for m in self.methods]
        data["benchmarks"] = [
            {"name": b.name, "limit": self.limit_of(b)}
            | ({"data": self.data_of(b), "images": self.images_of(b), "ids": b.ids, "prompt": b.prompt}
               if b.is_local else {})
            for b in self.benchmarks
        ]  # fmt: skip
        return data


def method_hash(spec: Any) -> str:
    """Twelve hex digits that identify a method and its parameters."""
    return sha256(json.dumps(spec, sort_keys=True, default=str).encode()).hexdigest()[:12]


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a config file: YAML, safely, at most 1 MB, a mapping at the top."""
    path = Path(path)
    if path.suffix.lower() not in (".yaml", ".yml"):
        raise ConfigError(f"An evaluation config is a .yaml file, got {path.name!r}.")
    if not path.is_file():
        near = (
            unknown_name("config", path.name, [p.name for p in path.parent.glob("*.yaml")])
            if path.parent.is_dir()
            else "The folder does not exist."
        )
        raise ConfigError(f"There is no file {path}. {near}")
    if path.stat().st_size > _MAX_CONFIG_BYTES:
        raise ConfigError(f"{path.name} is larger than {_MAX_CONFIG_BYTES} bytes; that is no evaluation config.")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path.name} is not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path.name} must hold a mapping (key: value lines), got {type(data).__name__}.")
    return data


def build_config(data: Mapping[str, Any], source: str = "config", name: str = "") -> EvalConfig:
    """Validate plain data; errors name the key, what was given and what is allowed."""
    try:
        config = EvalConfig.model_validate(dict(data))
    except ValidationError as error:
        lines = []
        for item in error.errors():
            place = ".".join(str(part) for part in item["loc"]) or "top level"
            message = item["msg"].removeprefix("Value error, ")
            given = "" if item["type"] in ("value_error", "missing") else f" (given: {item['input']!r:.80})"
            lines.append(f"  {place}: {message}{given}")
        raise ConfigError(f"{source}: {len(lines)} problem(s)\n" + "\n".join(lines)) from None
    return config if config.output or not name else config.model_copy(update={"output": f"runs/{name}"})


def load_config(path: str | Path, overrides: Mapping[str, Any] | None = None) -> EvalConfig:
    """Read, override (values of None are ignored) and validate a config file."""
    data = read_yaml(path)
    data |= {key: value for key, value in (overrides or {}).items() if value is not None}
    return build_config(data, source=Path(path).name, name=Path(path).stem)
