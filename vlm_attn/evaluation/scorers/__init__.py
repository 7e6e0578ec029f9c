"""Scorers: pure functions over answer files. Generation is another step; a file produced elsewhere is scored as well.

Each module holds ``score(answers, data, **options) -> Report`` for one benchmark, on top of metric functions that take
plain lists.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from vlm_attn.evaluation.matching import unknown_name
from vlm_attn.evaluation.scorers.report import Report

__all__ = ["SCORERS", "Report", "score_file"]

SCORERS: dict[str, str] = {
    "pope": "yes/no questions about objects, six parsers",
    "chair": "objects that captions mention and the picture does not show",
    "amber": "captions and yes/no questions with annotated objects, attributes, relations",
    "mme": "yes/no pairs in up to 14 categories",
    "hallusionbench": "yes/no questions about real and edited figures",
    "mmhal": "open questions, rated by a judge",
    "ghost": "requests for what is not there, in five tones",
}
"""Benchmark -> what it asks."""


def score_file(benchmark: str, answers: str | Path, data: str | Path | None = None, **options: Any) -> Report:
    """Score an answer file.

    Args:
        benchmark: one of `SCORERS`.
        answers: the file (for MME also the folder of its tab-separated files).
        data: folder of the benchmark's own files, or the folder above it.
        options: of the benchmark's ``score`` function; options that are None are left at their default.

    Raises:
        ValueError, FileNotFoundError: anything that would make the score wrong, with place and cure.
    """
    if benchmark not in SCORERS:
        raise ValueError(unknown_name("benchmark", benchmark, SCORERS))
    scorer = import_module(f"vlm_attn.evaluation.scorers.{benchmark}").score
    parameters = inspect.signature(scorer).parameters
    known = [name for name, parameter in parameters.items() if parameter.kind is parameter.KEYWORD_ONLY]
    given = {name: value for name, value in options.items() if value is not None}
    for name, value in given.items():
        if name not in known:
            raise ValueError(unknown_name(f"option of {benchmark}", name, known))
        _check_kind(benchmark, name, value, parameters[name].annotation)
    if data is None and parameters["data"].default is inspect.Parameter.empty:
        raise ValueError(f"Scoring {benchmark} needs its question and annotation files: pass their folder as data.")
    report: Report = scorer(Path(answers), *(() if data is None else (Path(data),)), **given)
    return report


def _check_kind(benchmark: str, name: str, value: Any, annotation: str) -> None:
    """Options may come from a command line, where everything is typed by hand."""
    kind = annotation.partition(" ")[0]
    fits = isinstance(value, {"str": str, "bool": bool, "int": int}.get(kind, Callable))  # type: ignore[arg-type]
    if not fits or (kind == "int" and isinstance(value, bool)):
        expected = {"str": "a text", "bool": "true or false", "int": "a whole number"}.get(kind, "a function")
        raise ValueError(f"Option {name} of {benchmark} is {expected}, got {value!r:.80}.")
