"""YAML / JSON / dict / name / list <-> a pipeline of methods, in composition order, conflicts refused."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from . import registry
from .stages import (
    Contrast,
    Edit,
    HeadScale,
    KeyBias,
    LogitMap,
    Method,
    Noop,
    Prune,
    Refine,
    RowEdit,
    SegmentEdit,
    SoftMask,
)

MethodLike = str | Method | Mapping[str, Any] | Sequence[Any] | Path | None

# Inside a layer: logits, softmax, rows rewritten, then segment mixes on the biased masses; head scales come last.
_ORDER: tuple[type[Method], ...] = (
    Noop, Refine, Prune, LogitMap, KeyBias, SoftMask, RowEdit, SegmentEdit, HeadScale, Contrast,
)  # fmt: skip
_ONE_ONLY: tuple[type[Method], ...] = (Refine, Prune, SoftMask, RowEdit, HeadScale, Contrast)
_LIMIT = 1 << 20


def pipeline(method: MethodLike) -> tuple[Method, ...]:
    """The methods to run, in composition order.

    Args:
        method: a name, a method object, a mapping ``{"name": ..., parameters...}``, a path to a YAML or JSON file
            holding any of these, or a list of them.

    Raises:
        ValueError: unknown method or parameter, bad file, or two methods that cannot run together.
    """
    found = _flatten(method)
    for kind in _ONE_ONLY:
        same = [m.name for m in found if isinstance(m, kind) and not (kind is Contrast and not _contrasts(m))]
        if len(same) > 1:
            raise ValueError(
                f"{' and '.join(same)} both fill the same place ({kind.__name__}) of the pipeline; keep one of them"
            )
    _refuse_conflicts(found)
    return tuple(sorted(found, key=lambda m: next(i for i, kind in enumerate(_ORDER) if isinstance(m, kind))))


def _contrasts(method: Method) -> bool:
    """Whether a second branch would run."""
    return isinstance(method, Contrast) and method.active


def _refuse_conflicts(found: Sequence[Method]) -> None:
    """Edits whose masses or rows would contradict each other, or that label keys which leave the cache."""
    edits = [m.name for m in found if isinstance(m, Edit)]
    compacting = [m.name for m in found if isinstance(m, Prune) and m.compacts]
    if edits and compacting:
        raise ValueError(
            f"{compacting[0]} drops keys from the cache of early layers that {edits[0]} has labelled by then; "
            "use compact=False"
        )
    segments = [m for m in found if isinstance(m, SegmentEdit)]
    moving = [m.name for m in segments if m.redistributes]
    if len(moving) > 1:
        raise ValueError(f"{' and '.join(moving)} both redistribute attention of the same heads; keep one of them")
    for method in segments:
        others = [m.name for m in [*segments, *found] if m is not method and isinstance(m, SegmentEdit | SoftMask)]
        if method.wants_columns and others:
            raise ValueError(
                f"{method.name} reads the columns of the whole attention matrix, which {others[0]} changes after the "
                "softmax; keep one of them"
            )


def _flatten(method: MethodLike) -> list[Method]:
    if method is None:
        return []
    if isinstance(method, Method):
        if not isinstance(method, _ORDER):
            raise TypeError(f"{type(method).__name__} derives from no stage class of vlm_attn.stages")
        return [method]
    if isinstance(method, Path):
        return _flatten(load(method))
    if isinstance(method, str):
        looks_like_file = method.endswith((".yaml", ".yml", ".json"))
        return _flatten(load(Path(method))) if looks_like_file else [registry.method(method)]
    if isinstance(method, Mapping):
        return [from_dict(method)]
    if isinstance(method, Sequence):
        return [m for item in method for m in _flatten(item)]
    raise TypeError(
        f"a method is a name, a method object, a mapping, a list or a YAML path, not {type(method).__name__}"
    )


def from_dict(data: Mapping[str, Any]) -> Method:
    """Builds one method from ``{"name": ..., parameters...}``."""
    if not isinstance(data.get("name"), str):
        raise ValueError(f"a method mapping needs a 'name' (got keys {sorted(map(str, data))})")
    params = {str(k): v for k, v in data.items() if k != "name"}
    return registry.method(data["name"], **params)


def load(path: Path) -> Any:
    """Reads a recipe: YAML or JSON data, never code.

    Raises:
        ValueError: missing, oversized or malformed file.
    """
    if not path.is_file():
        raise ValueError(f"recipe {path} does not exist")
    if path.stat().st_size > _LIMIT:
        raise ValueError(f"recipe {path} is larger than {_LIMIT} bytes; is it really a recipe?")
    try:
        text = path.read_text(encoding="utf-8")
        data = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (yaml.YAMLError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"recipe {path} is not valid {path.suffix[1:].upper()}: {error}") from error
    if isinstance(data, Mapping) and "name" not in data and set(data) <= {"method", "methods"} and data:
        data = next(iter(data.values()))
    if not isinstance(data, str | Mapping | list):
        raise ValueError(f"recipe {path} holds neither a method name, a mapping nor a list")
    if isinstance(data, str) and data.endswith((".yaml", ".yml", ".json")):
        raise ValueError(f"recipe {path} points to another recipe; name the method itself")
    return data


def dump(methods: Sequence[Method]) -> list[dict[str, Any]]:
    """The pipeline as plain data, loadable by :func:`pipeline`."""
    return [m.to_dict() for m in methods]
