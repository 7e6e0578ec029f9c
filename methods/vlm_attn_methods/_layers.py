"""Shared by edits: layer ranges that follow the depth of the model, and lists of (layer, head) pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from vlm_attn.stages import ModelInfo, check_layer

Layer = Annotated[int, Field(ge=0)]
Pairs = Sequence[Sequence[Layer]]
"""(layer, head) pairs."""


def layer_range(method: str, first: int, end: int | None, model: ModelInfo) -> tuple[int, int]:
    """``first`` and the exclusive ``end`` (None = all layers), checked against the model."""
    check_layer(method, "first_layer", first, model)
    last = model.layers if end is None else end
    if not first < last <= model.layers:
        raise ValueError(
            f"{method}: end_layer={last} must lie in {first + 1}..{model.layers} (exclusive end of the edited layers)"
        )
    return first, last


def transferred(layers: Sequence[int], reference: int, model: ModelInfo) -> tuple[int, ...]:
    """Layers given for a model of ``reference`` layers, by relative depth [unverified]: ``round(l L / L_ref)``."""
    moved = (min(round(layer * model.layers / reference), model.layers - 1) for layer in layers)
    return tuple(dict.fromkeys(moved))


def check_layers(method: str, layers: Sequence[int], model: ModelInfo) -> tuple[int, ...]:
    """The layers, each checked against the model."""
    for layer in layers:
        check_layer(method, "layers", layer, model)
    return tuple(sorted(set(layers)))


def check_pairs(method: str, field: str, pairs: Pairs, model: ModelInfo) -> tuple[tuple[int, int], ...]:
    """The pairs as tuples, each checked against the model.

    Raises:
        ValueError: something that is no pair, or a layer or head that does not exist.
    """
    found = []
    for pair in pairs:
        if len(pair) != 2 or pair[0] >= model.layers or pair[1] >= model.heads:
            raise ValueError(
                f"{method}: {field} holds {list(pair)}; give pairs [layer, head] with layers 0..{model.layers - 1} "
                f"and query heads 0..{model.heads - 1}"
            )
        found.append((int(pair[0]), int(pair[1])))
    return tuple(sorted(set(found)))


def heads_of(pairs: Pairs, layer: int) -> tuple[int, ...]:
    """The heads of one layer."""
    return tuple(pair[1] for pair in pairs if pair[0] == layer)
