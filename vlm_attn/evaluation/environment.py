"""What a run was made with, and whether a folder's earlier part was made with the same."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from vlm_attn.evaluation.config import ConfigError

__all__ = ["check_identity", "describe", "read_identity", "weights_hash"]

_PACKAGES = ("vlm-attn", "torch", "transformers", "lmms-eval", "datasets", "numpy", "pillow")
_EDGE = 64


def describe(vlm: Any) -> dict[str, Any]:
    """Versions, machine, device, dtype and attention backend of a loaded model."""
    import torch

    model = getattr(vlm, "model", None)
    config = getattr(model, "config", None)
    text = getattr(config, "text_config", config)
    return {
        "versions": {name: _version(name) for name in _PACKAGES} | {"python": platform.python_version()},
        "machine": platform.machine(),
        "system": platform.system(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(getattr(model, "device", "unknown")),
        "dtype": str(getattr(model, "dtype", "unknown")).removeprefix("torch."),
        "attention": str(getattr(text, "_attn_implementation", "unknown")),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def weights_hash(model: Any) -> str:
    """Identity of loaded weights: names, shapes and both ends of every parameter. Cheap for models of any size."""
    digest = sha256()
    for name, tensor in sorted(getattr(model, "named_parameters", lambda: ())(), key=lambda item: item[0]):
        flat = tensor.detach().reshape(-1)
        ends = [flat[:_EDGE], flat[-_EDGE:]]
        values = [part.float().cpu().numpy().tobytes() for part in ends]
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        for value in values:
            digest.update(value)
    return digest.hexdigest()[:16]


def read_identity(path: Path) -> dict[str, Any]:
    """The identity an earlier part of this run left behind, or an empty dict."""
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read ({error}). Choose another output folder.") from error
    return data if isinstance(data, dict) else {}


def check_identity(earlier: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    """Refuse to continue a run whose answers were produced with other settings or weights."""
    for part, value in now.items():
        if part not in earlier or earlier[part] == value:
            continue
        if isinstance(value, Mapping):
            changed = ", ".join(
                f"{key}: {earlier[part].get(key)!r} then, {value[key]!r} now"
                for key in value
                if earlier[part].get(key) != value[key]
            )
        else:
            changed = f"{part} differ"
        raise ConfigError(
            f"{folder} holds a run with other settings ({changed}). Choose another `output`, or pass "
            "resume=false to start this folder anew."
        )
