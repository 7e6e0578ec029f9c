"""The projector between vision encoder and language model as a function of features: in fp32, whole or of low rank."""

from __future__ import annotations

import copy
import functools
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .installation import Installation
from .kit.scores import Project, low_rank

Factors = tuple[Tensor, Tensor]
_FACTORS: weakref.WeakKeyDictionary[nn.Linear, dict[int, tuple[Any, Factors]]] = weakref.WeakKeyDictionary()


class Projector:
    """The module that maps encoder features to the language model's width, computed and returned in fp32."""

    def __init__(self, module: nn.Module):
        self.module = module
        self._state = {name: value.float() for name, value in module.state_dict().items()}
        self._narrow: dict[nn.Linear, Factors] = {}

    def of_rank(self, rank: int | None) -> Projector:
        """The same with its linear layers as their best approximations of this rank, where that is less work; None =
        whole. The factors are computed once per weight."""
        if rank is None:
            return self
        linear = [layer for layer in self.module.modules() if isinstance(layer, nn.Linear)]
        other = copy.copy(self)
        other._narrow = {x: _factors(x, rank) for x in linear if rank * sum(x.weight.shape) < x.weight.numel()}
        return other

    def __call__(self, features: Tensor) -> Tensor:
        """``[..., d_v] -> [..., D]``."""
        return self._run(features, Installation())

    def split(self, features: Tensor) -> tuple[Project, Project]:
        """All of it but the last linear layer, and a linear map that makes differences as long as that layer does.

        The length of a difference needs the second only once.

        Where it does not end in a linear layer that runs once: the whole, and the identity.

        Args:
            features: ``[..., d_v]``, any, to see which layer that is.
        """
        seen: list[tuple[nn.Linear, Tensor]] = []
        watched = Installation()
        for layer in self.module.modules():
            if isinstance(layer, nn.Linear):
                watched.hook(layer, lambda layer, args, kwargs, out: seen.append((layer, out)))
        result = self._run(features, watched)
        last = [layer for layer, out in seen if out is result]
        if len(last) != 1 or [layer for layer, _ in seen].count(last[0]) != 1:
            return self, lambda x: x
        weight = last[0].weight.float()
        if last[0] in self._narrow:
            left, right = self._narrow[last[0]]
            weight = left.norm(dim=0)[:, None] * right  # the left factor's columns are orthogonal

        def before(features: Tensor) -> Tensor:
            stopped = Installation()
            stopped.shadow(last[0], "forward", lambda _, x: x)
            return self._run(features, stopped, last[0])

        return before, lambda x: F.linear(x, weight)

    def _run(self, features: Tensor, installed: Installation, without: nn.Linear | None = None) -> Tensor:
        """The module on fp32 weights; takes back what is installed."""
        for layer, factors in self._narrow.items():
            if layer is not without:
                installed.shadow(layer, "forward", functools.partial(_through, layer, factors))
        try:
            return torch.func.functional_call(self.module, self._state, (features.float(),))
        finally:
            installed.undo()


def _through(layer: nn.Linear, factors: Factors, _: Any, x: Tensor) -> Tensor:
    left, right = factors
    return F.linear(F.linear(x, right), left, layer.bias)  # the bias that runs: fp32


def _factors(layer: nn.Linear, rank: int) -> Factors:
    """Its factors, kept as long as the layer has the same weight."""
    weight = layer.weight.detach()
    stamp = weight.data_ptr(), weight.device, 0 if weight.is_inference() else weight._version
    kept = _FACTORS.setdefault(layer, {})
    if rank not in kept or kept[rank][0] != stamp:
        kept[rank] = stamp, low_rank(weight, rank)
    return kept[rank][1]
