"""Measure only: readouts never change what the model computes.

``read(session, inputs, what)`` generates and gives a :class:`Record` per sample; ``vlm.read(image, text, what)`` does
the same for one question. Importing this package is light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .plots import plot
    from .reader import read
    from .record import DEFAULT, SEGMENTS, WHAT, Record, Sink
    from .stats import request_stats

__all__ = ["DEFAULT", "SEGMENTS", "WHAT", "Record", "Sink", "plot", "read", "request_stats"]

_HOME = {
    "DEFAULT": "record",
    "Record": "record",
    "SEGMENTS": "record",
    "Sink": "record",
    "WHAT": "record",
    "plot": "plots",
    "read": "reader",
    "request_stats": "stats",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'vlm_attn.readouts' has no attribute {name!r}")
    return getattr(import_module(f"vlm_attn.readouts.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
