"""Name -> method class. Built-in methods and third parties come in by the same door: entry points."""

from __future__ import annotations

import difflib
import functools
import warnings
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
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
def _classes() -> tuple[dict[str, type[Method]], dict[str, str]]:
    """Method classes by name, and why other plug-ins cannot be used: none of them stops the rest."""
    found: dict[str, type[Method]] = {}
    broken: dict[str, str] = {}
    offers: dict[str, set[str]] = {}
    for point in sorted(entry_points(group=GROUP), key=lambda p: p.name):
        offers.setdefault(point.name, set()).add(point.value)
        try:
            found[point.name] = _checked(point)
        except Exception as error:
            broken[point.name] = f"{point.value}: {type(error).__name__}: {error}"
    for name, values in offers.items():
        if len(values) > 1:
            broken[name] = f"several packages offer it ({', '.join(sorted(values))}): uninstall all but one"
    for name, reason in broken.items():
        found.pop(name, None)
        warnings.warn(f"method '{name}' cannot be used: {reason}", stacklevel=2)
    return found, broken


def _checked(point: EntryPoint) -> type[Method]:
    cls = point.load()
    if not (isinstance(cls, type) and issubclass(cls, Method)):
        raise TypeError("not a vlm_attn Method class")
    if cls.name != point.name:
        raise ValueError(f"the method calls itself '{cls.name}'")
    if cls.stage not in STAGES:
        raise ValueError(f"it fills the unknown stage '{cls.stage}'; stages are {STAGES}")
    return cls


def methods() -> list[MethodRow]:
    """The catalogue: one row per installed method, sorted by name."""
    return [MethodRow(c.name, c.stage, c.summary, c.paper, c.needs, c) for c in _classes()[0].values()]


def closest(word: str, words: list[str] | tuple[str, ...]) -> str:
    """``"; did you mean 'x'?"`` or an empty string."""
    match = difflib.get_close_matches(str(word), list(words), n=1, cutoff=0.5)
    return f"; did you mean '{match[0]}'?" if match else ""


def method_class(name: str) -> type[Method]:
    """The class of a method.

    Raises:
        ValueError: no such method (the message offers the closest name), or a plug-in that cannot be used.
    """
    classes, broken = _classes()
    if name in broken:
        raise ValueError(f"method '{name}' cannot be used: {broken[name]}")
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
