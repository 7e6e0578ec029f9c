"""Evaluation: scorers as pure functions, a runner on top of lmms-eval, statistics, and a report.

Importing this package is light; lmms-eval and torch are loaded when a run starts.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlm_attn.evaluation.catalogue import BenchmarkRow, benchmarks
    from vlm_attn.evaluation.config import ConfigError, EvalConfig, load_config
    from vlm_attn.evaluation.runner import RunResult, run, run_config, validate_config
    from vlm_attn.evaluation.scorers import score_file

__all__ = [
    "BenchmarkRow",
    "ConfigError",
    "EvalConfig",
    "RunResult",
    "benchmarks",
    "load_config",
    "run",
    "run_config",
    "score_file",
    "validate_config",
]

_HOME = {
    "BenchmarkRow": "catalogue",
    "benchmarks": "catalogue",
    "ConfigError": "config",
    "EvalConfig": "config",
    "load_config": "config",
    "RunResult": "runner",
    "run": "runner",
    "run_config": "runner",
    "score_file": "scorers",
    "validate_config": "runner",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'vlm_attn.evaluation' has no attribute {name!r}")
    return getattr(import_module(f"vlm_attn.evaluation.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
