"""What a prompt costs on this machine: the decoder's prefill time by length, measured when a method is attached."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from .errors import UnsupportedError

if TYPE_CHECKING:
    from .session import Session

LENGTHS = (32, 128, 512, 1024)
REPEATS = 3


@dataclass(frozen=True)
class Latency:
    """Seconds that one decoder layer takes for a prompt of one sample, between and beyond the measured lengths.

    Attributes:
        lengths, seconds: ascending points; seconds do not fall.
        layers: of the decoder.
    """

    lengths: tuple[int, ...]
    seconds: tuple[float, ...]
    layers: int

    def layer(self, tokens: int) -> float:
        """Linear between the points, in proportion to the length beyond the last one."""
        beyond = max(1.0, tokens / self.lengths[-1])
        return float(np.interp(tokens, self.lengths, self.seconds)) * beyond

    def budget(self, target: float, text: int, visual: int, first: int) -> int:
        """Most of ``visual`` tokens with which a prefill that is cut before layer ``first`` takes ``target`` seconds.

        0 where even a single one would be too many.
        """
        left = target - first * self.layer(text + visual)
        allowed = left / (self.layers - first)
        low, high = 0, visual
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.layer(text + middle) <= allowed else (low, middle - 1)
        return low


def measure(session: Session) -> Latency:
    """Median times of the bare decoder on prompts of several lengths, one sample, one warm-up each.

    Raises:
        UnsupportedError: the decoder does not run on embeddings alone.
    """
    weight = session.model.get_input_embeddings().weight
    lengths = [n for n in LENGTHS if session.window is None or n < session.window]
    if not lengths:
        raise UnsupportedError("a latency target needs prompts of 32 tokens, this model's window is shorter")
    seconds: list[float] = []
    with torch.no_grad(), session.suspended():
        for n in lengths:
            rows = weight[torch.arange(n, device=weight.device) % len(weight)][None]
            runs = [_timed(session, rows) for _ in range(REPEATS + 1)][1:]
            seconds.append(max(statistics.median(runs) / session.info.layers, *seconds[-1:], 0.0))
    return Latency(tuple(lengths), tuple(seconds), session.info.layers)


def _timed(session: Session, rows: torch.Tensor) -> float:
    def settled() -> float:
        if rows.is_cuda:
            torch.cuda.synchronize(rows.device)
        return time.perf_counter()

    start = settled()
    try:
        session.family.lm(inputs_embeds=rows, use_cache=False)
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise UnsupportedError(
            f"a latency target cannot be measured on {session.family.name}: its decoder does not run on embeddings "
            f"alone ({type(error).__name__}: {error}); give a count, a share, or keep='auto'"
        ) from error
    return settled() - start
