"""Decode steps of stock and of a case taken in turn: a step is bound by memory, and what others leave of it drifts."""

from __future__ import annotations

import copy
from collections.abc import Callable

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
