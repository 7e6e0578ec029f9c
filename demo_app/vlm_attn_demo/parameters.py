"""The parameters of a method as page controls: read off its dataclass, written back as one method object."""

from __future__ import annotations

import dataclasses
import enum
import math
import re
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml


@dataclass(frozen=True)
class Parameter:
    """One control.

    Attributes:
        name: field of the method's dataclass.
        kind: flag (checkbox), choice (menu), whole or number (number box), text, data (text box holding YAML).
        default: the field's default.
        choices: what a menu offers.
        low, high: bounds where the field declares them.
        help: one sentence from the method's documentation.
    """

    name: str
    kind: str
    default: Any
    choices: tuple[Any, ...] = ()
    low: float | None = None
    high: float | None = None
    help: str = ""


def parameters(cls: type) -> list[Parameter]:
    """The controls of a method class, in the order of its fields."""
    hints = typing.get_type_hints(cls, include_extras=True)
    pydantic_fields = getattr(cls, "__pydantic_fields__", {})
    found = []
    for field in dataclasses.fields(cls):
        info = pydantic_fields.get(field.name)
        hint, extras = _bare(hints[field.name])
        extras += list(getattr(info, "metadata", ()))
        default = _default(field, info)
        kind, choices = _kind(hint, default)
        low = next((v for e in extras for k in ("ge", "gt") if (v := getattr(e, k, None)) is not None), None)
        high = next((v for e in extras for k in ("le", "lt") if (v := getattr(e, k, None)) is not None), None)
        text = getattr(info, "description", None) or field.metadata.get("help") or _doc(cls, field.name)
        found.append(Parameter(field.name, kind, default, choices, low, high, text))
    return found


def _bare(hint: Any) -> tuple[Any, list[Any]]:
    if typing.get_origin(hint) is typing.Annotated:
        inner, *extras = typing.get_args(hint)
        flat = [m for e in extras for m in (e, *getattr(e, "metadata", ()))]
        return inner, flat
    return hint, []


def _default(field: dataclasses.Field[Any], info: Any) -> Any:
    if info is not None:
        value = info.get_default(call_default_factory=True)
        return None if type(value).__name__ == "PydanticUndefinedType" else value
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _kind(hint: Any, default: Any) -> tuple[str, tuple[Any, ...]]:
    if hint is bool:
        return "flag", ()
    if typing.get_origin(hint) is typing.Literal:
        return "choice", typing.get_args(hint)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return "choice", tuple(member.value for member in hint)
    if hint is int:
        return "whole", ()
    if hint is float:
        return "number", ()
    if hint is str:
        return "text", ()
    return "data", ()


def _doc(cls: type, name: str) -> str:
    section = (cls.__doc__ or "").partition("Attributes:")[2]
    match = re.search(
        rf"(?:^\s*|\. ){name}\b[^:\n]*:\s*(.+?)(?=^\s*\w+\b[^:\n]*:|\. \w+: |\n\s*\n|\Z)", section, re.M | re.S
    )
    return " ".join(match[1].split()).replace("``", "").rstrip(".") if match else ""


def to_control(parameter: Parameter) -> Any:
    """The default as the control shows it."""
    if parameter.kind != "data":
        return parameter.default
    if parameter.default is None:
        return ""
    return yaml.safe_dump(_plain(parameter.default), default_flow_style=True, width=1000).removesuffix("...\n").strip()


def from_control(parameter: Parameter, shown: Any) -> Any:
    """The value a control stands for.

    Raises:
        ValueError: an empty number box, a fraction where a whole number is needed, text that is not YAML.
    """
    if parameter.kind == "data":
        try:
            value = yaml.safe_load(str(shown)) if shown not in (None, "") else None
        except yaml.YAMLError as error:
            raise ValueError(f"{parameter.name}: '{shown}' cannot be read as a value") from error
        return tuple(value) if isinstance(parameter.default, tuple) and isinstance(value, list) else value
    if parameter.kind in ("whole", "number"):
        if shown is None or not math.isfinite(shown):
            raise ValueError(f"{parameter.name} needs a number")
        if parameter.kind == "number":
            return float(shown)
        if shown != int(shown):
            raise ValueError(f"{parameter.name} needs a whole number, not {shown:g}")
        return int(shown)
    return shown


def values(wanted: Sequence[Parameter], shown: Sequence[Any]) -> dict[str, Any]:
    """Field values from the controls, in the order of :func:`parameters`; defaults are left out."""
    read = {p.name: from_control(p, s) for p, s in zip(wanted, shown, strict=True)}
    return {p.name: read[p.name] for p in wanted if read[p.name] != p.default}


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    return value if isinstance(value, bool | int | float | str) else str(value)
