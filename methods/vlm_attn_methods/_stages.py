"""Shared by pruning methods that cut at several decoder layers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from vlm_attn.kit.budgets import scaled_layers
from vlm_attn.stages import ModelInfo, check_layer


def stage_layers(
    name: str, layers: Sequence[int] | None, published: Sequence[int], model: ModelInfo, offset: int = 0
) -> tuple[int, ...]:
    """The given layers, or the published ones carried over from 32 layers to this model's depth [ours].

    Args:
        offset: distance from the named layer to the cut (1 where the cut is at the layer's output).

    Raises:
        ValueError: a layer does not exist, or the layers do not ascend.
    """
    chosen = tuple(layers) if layers is not None else scaled_layers(published, model.layers, 1 - offset)
    for layer in chosen:
        check_layer(name, "layers", layer, model, lowest=1 - offset)
        check_layer(name, "layers", layer + offset, model)
    if any(b <= a for a, b in itertools.pairwise(chosen)):
        raise ValueError(f"{name}: layers={list(chosen)} must ascend")
    return chosen


def check_lengths(name: str, layers: Sequence[object], keep: Sequence[object]) -> None:
    """Raises ValueError unless there is one budget per stage."""
    if len(layers) != len(keep):
        raise ValueError(f"{name}: {len(layers)} layers need as many budgets, got keep={list(keep)}")
