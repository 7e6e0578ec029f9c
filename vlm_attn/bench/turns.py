"""One timed run of the language model, layer by layer and decode step by decode step in turn with stock's: what a
machine has to give drifts within seconds."""

from __future__ import annotations

import copy
import functools
import math
import statistics
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import DynamicCache, LlavaForConditionalGeneration

from ..installation import Installation
from . import setup
from .setup import Request


def twin(model: LlavaForConditionalGeneration) -> LlavaForConditionalGeneration:
    """A second model with the very same weights, to which nothing that is attached to the first one happens."""
    shared = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


@dataclass(frozen=True)
class LayerCall:
    """A decoder layer of the twin with what the prompt's prefill gives it, and what it makes of that."""

    layer: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any

    def __call__(self, cache: DynamicCache) -> None:
        self.layer(*self.args, **{**self.kwargs, "past_key_values": cache})


class Stock:
    """Stock on a twin of the model, in turn with what is timed.

    A prefill runs one of its decoder layers whenever the other run starts one. It is the layer half a model away, so
    that neither run finds weights in the processor's cache that the other one has just read.

    Args:
        now: the clock.
        layers: whether prefills are taken in turn; a device that works behind the host's back would wait in between.

    Attributes:
        spent: seconds that it took so far.
        prefill: seconds of the last prefill taken in turn.
    """

    def __init__(
        self, model: LlavaForConditionalGeneration, job: Request, now: Callable[[], float], layers: bool = True
    ):
        self.model, self.job, self.now, self.layers = twin(model), job, now, layers
        self.spent, self.prefill = 0.0, math.nan
        self.cache: DynamicCache | None = None

    @contextmanager
    def beside(self, model: LlavaForConditionalGeneration) -> Iterator[None]:
        """Inside, a prefill of the twin is taken in turn with the one that ``model`` runs; its rest at the end."""
        if not self.layers:
            yield
            return
        calls, before = self._calls, self.spent
        half, cache = len(calls) // 2, DynamicCache(config=self.model.config.get_text_config())
        waiting = iter([*calls[half:], *calls[:half]])

        def turn(*_: Any) -> None:
            if (call := next(waiting, None)) is not None:
                self._timed(functools.partial(call, cache))

        installed = Installation()
        for layer in model.get_decoder().layers:
            installed.pre_hook(layer, turn)
        try:
            yield
        finally:
            installed.undo()
        for call in waiting:
            self._timed(functools.partial(call, cache))
        self._timed(self._all_but_layers)
        self.prefill = self.spent - before

    def _timed(self, run: Callable[[], None]) -> None:
        start = self.now()
        run()
        self.spent += self.now() - start

    @functools.cached_property
    def _calls(self) -> list[LayerCall]:
        calls: list[LayerCall] = []
        installed = Installation()
        for layer in self.model.get_decoder().layers:
            installed.hook(layer, lambda *call: calls.append(LayerCall(*call)))
        try:
            setup.prefill(self.model, self.job, encode=True)
        finally:
            installed.undo()
        return calls

    def _all_but_layers(self) -> None:
        installed = Installation()
        for call in self._calls:
            installed.shadow(call.layer, "forward", lambda _, *__, output=call.output, **___: output)
        try:
            setup.prefill(self.model, self.job, encode=True)
        finally:
            installed.undo()

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
    """One run in seconds: prefill, a decoded token, and those of stock taken in turn with them.

    Attributes:
        apart: a part of the prefill that the table shows apart: a second pass, or the choice of tokens.
        facts: what was seen of the run.
    """

    prefill: float
    decode: float = math.nan
    stock_decode: float = math.nan
    apart: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)
    stock_prefill: float = math.nan

    @property
    def stock(self) -> Taken:
        """The stock run taken in turn with this one."""
        return Taken(self.stock_prefill, self.stock_decode)


@dataclass(frozen=True)
class Trial:
    """What is timed: the prompt of ``job`` and ``steps`` tokens on ``model`` by the clock ``now``, in turn with
    ``beside``, if given."""

    model: LlavaForConditionalGeneration
    job: Request
    steps: int
    now: Callable[[], float]
    beside: Stock | None = None

    @property
    def queued(self) -> bool:
        """Looking at the clock within a prefill would hold it up."""
        return self.beside is not None and not self.beside.layers

    def clock(self) -> float:
        """Time without stock's turns."""
        return self.now() - (self.beside.spent if self.beside is not None else 0.0)

    def in_turn(self) -> AbstractContextManager[None]:
        """Inside, a stock prefill is taken in turn with one of ``model``."""
        return nullcontext() if self.beside is None else self.beside.beside(self.model)

    def run(self, **extra: Any) -> Taken:
        """One run with whatever is attached to the model; the median step counts."""
        with self.in_turn():
            start = self.clock()
            cache = setup.prefill(self.model, self.job, encode=True, **extra)
            prefill = self.clock() - start
        own: list[float] = []
        stock: list[float] = []
        if self.beside is not None:
            self.beside.restart()
        for step in range(self.steps):
            for mine in (True, False) if step % 2 else (False, True):  # whoever is second pays for the change
                if mine:
                    start = self.now()
                    setup.decode(self.model, self.job, cache, 1, **extra)
                    own.append(self.now() - start)
                elif self.beside is not None:
                    stock.append(self.beside())
        return Taken(
            prefill, _median(own), _median(stock), stock_prefill=self.beside.prefill if self.beside else math.nan
        )


def _median(seconds: list[float]) -> float:
    return statistics.median(seconds) if seconds else math.nan
