"""One generated answer, and the small rules around it that need no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

from vlm_attn.evaluation.matching import unknown_name

__all__ = ["Produced", "cut_at", "generation_settings", "plain", "sample_seed"]

GENERATION_KEYS = ("max_new_tokens", "temperature", "top_p", "top_k", "num_beams", "do_sample", "repetition_penalty")


STATS = ("visual_tokens", "kept_tokens", "edited_heads", "decoder_tokens", "kept_mask")
"""The session's numbers that stay with a stored answer; times do not."""


@dataclass
class Produced:
    """One answer: text without the prompt, number of new tokens, the session's numbers, generation settings."""

    text: str
    n_tokens: int
    stats: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


def generation_settings(
    asked: Mapping[str, Any], max_new_tokens: int | None = None
) -> tuple[dict[str, Any], list[str]]:
    """Arguments for ``generate`` and the stop strings, from a task's ``generation_kwargs``.

    Temperature 0 means greedy; sampling settings are then dropped. Keys that ``generate`` would not understand raise.
    """
    settings = dict(asked)
    until = settings.pop("until", None) or []
    until = [until] if isinstance(until, str) else list(until)
    for key in settings:
        if key not in GENERATION_KEYS:
            raise ValueError(unknown_name("generation setting", key, (*GENERATION_KEYS, "until")))
    if max_new_tokens is not None:
        settings["max_new_tokens"] = max_new_tokens
    settings.setdefault("max_new_tokens", 128)
    settings.setdefault("do_sample", bool(settings.get("temperature")))
    if not settings["do_sample"] or settings.get("temperature") == 0:
        settings["do_sample"] = False
        for key in ("temperature", "top_p", "top_k"):
            settings.pop(key, None)
    return {key: value for key, value in settings.items() if value is not None}, until


def cut_at(text: str, until: Sequence[str]) -> str:
    """The text before the earliest stop string."""
    places = [place for stop in until if stop and (place := text.find(stop)) >= 0]
    return text[: min(places)] if places else text


def sample_seed(seed: int, task: str, doc_id: int) -> int:
    """A seed per sample that depends on nothing but the run's seed and the sample's identity."""
    return int.from_bytes(sha256(f"{seed}/{task}/{doc_id}".encode()).digest()[:4], "big")


def plain(value: Any) -> Any:
    """Numbers, strings, lists and dicts only: what a JSON file can hold. NaN and infinities become None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((plain(item) for item in value), key=str)
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if hasattr(value, "to_dict"):
        return plain(value.to_dict())
    return plain(vars(value)) if hasattr(value, "__dict__") else str(value)
