"""One timed run of the language model; its decode steps in turn with stock's, because a step is bound by memory and
what others leave of that drifts."""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from transformers import DynamicCache, LlavaForConditionalGeneration

from . import setup
from .setup import Request


def twin(model: LlavaForConditionalGeneration) -> LlavaForConditionalGeneration:
    """A second model with the very same weights, to which nothing that is attached to the first one happens."""
    shared = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


class StockSteps:
    """Stock decode steps behind the prompt, one per call, on a twin of the model.

    Args:
        now: the clock.
    """

    def __init__(self, model: LlavaForConditionalGeneration, job: Request, now: Callable[[], float]):
        self.model, self.job, self.now = twin(model), job, now
        self.cache: DynamicCache | None = None

    def restart(self) -> None:
        """The next step follows the prompt again."""
        if self.cache is None:
            self.cache = setup.prefill(self.model, self.job)
        behind = self.cache.get_seq_length() - self.job.ids.shape[1]
        if behind:
            self.cache.crop(-behind)

    def __call__(self) -> float:
        """Seconds of one step."""
        if self.cache is None:
            self.restart()
        start = self.now()
        setup.decode(self.model, self.job, self.cache, 1)
        return self.now() - start


@dataclass
class Taken:
    """One run in seconds: prefill, a decoded token, a stock one taken in turn with it.

    Attributes:
        apart: a part of the prefill that the table shows apart: a second pass, or the choice of tokens.
        facts: what was seen of the run.
    """

    prefill: float
    decode: float = math.nan
    stock_decode: float = math.nan
    apart: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Trial:
    """What is timed: the prompt of ``job`` and ``steps`` tokens on ``model`` by the clock ``now``, between its decode
    steps those of ``beside``, if given."""

    model: LlavaForConditionalGeneration
    job: Request
    steps: int
    now: Callable[[], float]
    beside: StockSteps | None = None

    def run(self, **extra: Any) -> Taken:
        """One run with whatever is attached to the model; the median step counts."""
        start = self.now()
        cache = setup.prefill(self.model, self.job, encode=True, **extra)
        prefill = self.now() - start
        own: list[float] = []
        stock: list[float] = []
        if self.beside is not None:
            self.beside.restart()
        for _ in range(self.steps):
            if self.beside is not None:
                stock.append(self.beside())
            start = self.now()
            setup.decode(self.model, self.job, cache, 1, **extra)
            own.append(self.now() - start)
        return Taken(prefill, _median(own), _median(stock))


def _median(seconds: list[float]) -> float:
    return statistics.median(seconds) if seconds else math.nan
