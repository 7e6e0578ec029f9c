"""Answers kept across runs, found again only if nothing that could change them has changed. Off by default.

The key is a SHA-256 over: weights, configuration, generation defaults and processor of the model; the methods with all
their values, and the code of this package and of theirs; versions of the libraries; device, dtype, attention backend,
threads; prompts, pictures, generation settings, the sample's seed, and its companions in a padded batch. Entries are
JSON files, written whole or not at all; a damaged one counts as absent. A cached answer has no times.
"""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Mapping, Sequence
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from vlm_attn.evaluation import environment
from vlm_attn.evaluation.answers import STATS, Produced, plain
from vlm_attn.evaluation.store import dumps, write_text

__all__ = ["ResponseCache"]

logger = logging.getLogger(__name__)

_PACKAGES = ("vlm_attn", "vlm_attn_methods", "vlm_attn_kernels")


class ResponseCache:
    """Answers below a folder."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.hits = 0
        self._model: tuple[Any, dict[str, Any]] | None = None
        self._broken = False

    def keys(self, vlm: Any, chats: Sequence[Any], settings: Mapping[str, Any], seed: int) -> list[str]:
        """One key per conversation of a batch."""
        asked = [_conversation(chat) for chat in chats]
        shared = {**self._setup(vlm), "settings": plain(settings), "seed": seed, "batch": asked}
        return [sha256(dumps({**shared, "place": place}).encode()).hexdigest() for place in range(len(asked))]

    def get(self, key: str) -> Produced | None:
        """The stored answer, or None."""
        path = self._path(key)
        try:
            row = json.loads(path.read_text(encoding="utf-8"))
            text, n_tokens, stats = row["text"], row["n_tokens"], row["stats"]
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("%s is damaged (%r); the sample is answered again", path, error)
            return None
        if row.get("key") != key or not isinstance(text, str) or type(n_tokens) is not int or type(stats) is not dict:
            logger.warning("%s does not hold the answer of its name; the sample is answered again", path)
            return None
        self.hits += 1
        return Produced(text, n_tokens, stats)

    def put(self, key: str, produced: Produced) -> None:
        """Store an answer. A folder that cannot be written ends caching, not the run."""
        stats = {name: plain(produced.stats[name]) for name in STATS if name in produced.stats}
        row = {"key": key, "text": produced.text, "n_tokens": produced.n_tokens, "stats": stats}
        if self._broken:
            return
        try:
            write_text(self._path(key), dumps(row) + "\n")
        except OSError as error:
            logger.warning("no more answers are cached: %s", error)
            self._broken = True

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"

    def _setup(self, vlm: Any) -> dict[str, Any]:
        if self._model is None or self._model[0] is not vlm.model:
            self._model = (vlm.model, _model_facts(vlm))
        methods = getattr(vlm, "methods", ())
        return {
            **self._model[1],
            "method": plain(vlm.method),
            "method_code": [_code(Path(inspect.getfile(type(method)))) for method in methods],
        }


def _model_facts(vlm: Any) -> dict[str, Any]:
    model, processor = vlm.model, getattr(vlm, "processor", None)
    described = {name: getattr(model, name).to_dict() for name in ("config", "generation_config")
                 if hasattr(model, name)}  # fmt: skip
    facts = environment.describe(vlm)
    return {
        "weights": _weights(model),
        "class": type(model).__qualname__,
        "described": sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest(),
        "processor": sha256(_processor_text(processor).encode()).hexdigest(),
        "env": {key: facts[key] for key in ("versions", "machine", "device", "dtype", "attention", "threads")},
        "accelerator": _accelerator(model),
        "code": _own_code(),
    }


def _weights(model: Any) -> str:
    """Every value of every parameter and buffer takes part (as sums in double precision, beside names and ends)."""
    digest = sha256(environment.weights_hash(model).encode())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        values = tensor.detach().double()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {float(values.sum())!r} ".encode())
        digest.update(f"{float(values.square().sum())!r}\n".encode())
    return digest.hexdigest()


def _processor_text(processor: Any) -> str:
    parts = [getattr(processor, "chat_template", None)]
    for part in (processor, *(getattr(processor, name, None) for name in ("image_processor", "video_processor"))):
        parts.append(part.to_dict() if hasattr(part, "to_dict") else str(type(part)))
    tokenizer = getattr(processor, "tokenizer", None)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts.append(backend.to_str() if backend is not None else str(type(tokenizer)))
    return json.dumps(parts, sort_keys=True, default=str)


def _accelerator(model: Any) -> str:
    import torch

    device = getattr(model, "device", None)
    return torch.cuda.get_device_name(device) if getattr(device, "type", "") == "cuda" else ""


def _conversation(chat: Any) -> list[Any]:
    """Roles, texts and picture contents of one conversation."""
    out = []
    for message in chat.messages:
        for part in message.content:
            if part.type == "text":
                out.append([message.role, "text", part.text])
            elif part.type == "image":
                image = part.url
                if getattr(image, "palette", None):  # its bytes are places in the palette, not colours
                    image = image.convert("RGBA")
                pixels = sha256(image.tobytes()).hexdigest() if hasattr(image, "tobytes") else str(image)
                out.append([message.role, getattr(image, "mode", ""), list(getattr(image, "size", ())), pixels])
            else:
                raise ValueError(f"{part.type} input is not cached; leave `cache` out for this benchmark.")
    return out


@lru_cache(maxsize=256)
def _code(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()


@lru_cache(maxsize=1)
def _own_code() -> str:
    """The code and the shipped data of this project."""
    from importlib.util import find_spec

    digest = sha256()
    for package in _PACKAGES:
        spec = find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            for path in sorted(p for p in Path(folder).rglob("*") if p.suffix in (".py", ".json", ".yaml")):
                digest.update(f"{path.relative_to(folder)} {_code(path)}\n".encode())
    return digest.hexdigest()
