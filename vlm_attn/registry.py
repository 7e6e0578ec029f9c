"""Name -> method class. Built-in methods and third parties come in by the same door: entry points."""

from __future__ import annotations

import difflib
import functools
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

import pydantic

from .stages import STAGES, Method, field_names

GROUP = "vlm_attn.methods"


@dataclass(frozen=True)
class MethodRow:
    """One line of the method catalogue."""

    name: str
    stage: str
    summary: str
    paper: str
    needs: tuple[str, ...]
    cls: type[Method]

    def neutral(self) -> Method:
        """An instance at the strength that must change nothing."""
        return self.cls.neutral()

    def to_dict(self) -> dict[str, Any]:
        """The row as plain data (for ``--json``)."""
        return {
            "name": self.name,
            "stage": self.stage,
            "summary": self.summary,
            "paper": self.paper,
            "needs": list(self.needs),
            "parameters": list(field_names(self.cls)),
        }


@functools.cache
def _classes() -> dict[str, type[Method]]:
    found: dict[str, type[Method]] = {}
    for point in sorted(entry_points(group=GROUP), key=lambda p: p.name):
        cls = point.load()
        if not (isinstance(cls, type) and issubclass(cls, Method)):
            raise TypeError(f"entry point '{point.name}' of {point.value} is not a vlm_attn Method class")
        if cls.name != point.name:
            raise ValueError(f"entry point '{point.name}' names a method that calls itself '{cls.name}'")
        if cls.stage not in STAGES:
            raise ValueError(f"method '{cls.name}' fills the unknown stage '{cls.stage}'; stages are {STAGES}")
        found[point.name] = cls
    return found


def methods() -> list[MethodRow]:
    """The catalogue: one row per installed method, sorted by name."""
    return [MethodRow(c.name, c.stage, c.summary, c.paper, c.needs, c) for c in _classes().values()]


def closest(word: str, words: list[str] | tuple[str, ...]) -> str:
    """``"; did you mean 'x'?"`` or an empty string."""
    match = difflib.get_close_matches(str(word), list(words), n=1, cutoff=0.5)
    return f"; did you mean '{match[0]}'?" if match else ""


def method_class(name: str) -> type[Method]:
    """The class of a method.

    Raises:
        ValueError: no such method; the message offers the closest name.
    """
    classes = _classes()
    if name not in classes:
        raise ValueError(f"unknown method '{name}'{closest(name, tuple(classes))} (known: {', '.join(classes)})")
    return classes[name]


def method(name: str, /, **params: Any) -> Method:
    """Builds a method from its name and parameters.

    Raises:
        ValueError: unknown name or parameter, or a value out of range.
    """
    return build(method_class(name), params)


def build(cls: type[Method], params: dict[str, Any]) -> Method:
    """Builds ``cls(**params)``, turning validation errors into one readable line."""
    known = field_names(cls)
    for key in params:
        if key not in known:
            options = f"parameters: {', '.join(known)}" if known else "it takes no parameters"
            raise ValueError(f"{cls.name} has no parameter '{key}'{closest(key, known)} ({options})")
    try:
        return cls(**params)
    except pydantic.ValidationError as error:
        parts = []
        for item in error.errors():
            field = str(item["loc"][0]) if item["loc"] else "?"
            parts.append(f"{field}={params.get(field, item['input'])!r}: {item['msg']}")
        raise ValueError(f"{cls.name}: " + "; ".join(dict.fromkeys(parts))) from error
