"""What an answer cost in decoder work, counted where the work is done."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean
from typing import Any

__all__ = ["Work", "counted", "relative"]


@dataclass
class Work:
    """Tokens that entered a decoder layer, summed over layers, passes and steps."""

    layers: int
    tokens: int = 0

    def stats(self, samples: int = 1) -> dict[str, float]:
        """``decoder_tokens``: per sample, tokens that an average decoder layer processed; empty if none was seen.

        Prompt and answer count, and so do second branches, text-only passes, drafts and padding; the part of
        attention that grows with the square of the length does not.
        """
        return {"decoder_tokens": round(self.tokens / self.layers / samples, 3)} if self.tokens else {}

    def see(self, module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Forward pre-hook of a decoder layer; runs behind those that shorten its input."""
        hidden = args[0] if args else kwargs["hidden_states"]
        self.tokens += hidden.shape[0] * hidden.shape[1]


@contextmanager
def counted(vlm: Any) -> Iterator[Work]:
    """Counts the work of everything asked inside; a model without known decoder layers counts nothing."""
    layers = list(getattr(getattr(vlm, "family", None), "layers", ()))
    work = Work(len(layers))
    hooks = [layer.register_forward_pre_hook(work.see, with_kwargs=True) for layer in layers]
    try:
        yield work
    finally:
        for hook in hooks:
            hook.remove()


def relative(results: Mapping[str, Any], label: str, tasks: Sequence[str]) -> float | None:
    """Decoder work per sample of a column over the baseline's, mean over tasks; None where it was not counted."""
    counts = results.get("decoder_tokens", {})
    mine, base = ([counts.get(name, {}).get(task) for task in tasks] for name in (label, results["baseline"]))
    return fmean(mine) / fmean(base) if all(mine) and all(base) else None
