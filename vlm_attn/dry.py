"""A decoder layer run only as far as its attention call, with no more projected than a reading of some rows needs.

The keys are needed in full. They are given back, so that the layer need not project them once more when it runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .attention.call import Call
from .errors import UnsupportedError
from .families import Family
from .installation import Installation

Project = Callable[[Tensor], Tensor]


class Stopped(Exception):
    """Ends a dry run at the layer's attention call, which it carries."""

    def __init__(self, call: Call):
        super().__init__("dry run")
        self.call = call


@dataclass(frozen=True)
class Ahead:
    """What a dry run came to.

    Attributes:
        call: the attention call.
        keys: ``[B, N, W]`` as ``k_proj`` gave them, None where attention has no such linear layer.
    """

    call: Call
    keys: Tensor | None


def attention_call(
    family: Family, number: int, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], rows: Tensor
) -> Ahead:
    """The attention call that layer ``number`` would make on ``hidden [B, N, D]``.

    Values, and queries but for those of ``rows [R]``, are filler. The engine must raise :class:`Stopped` at the call.
    """
    args, kwargs = ((hidden, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": hidden})
    try:
        with lean(family.attention(number), rows) as projected:
            family.layers[number](*args, **{**kwargs, "past_key_values": None})
    except Stopped as stopped:
        return Ahead(stopped.call, projected[0] if projected else None)
    raise UnsupportedError(f"{family.name}: decoder layer {number} made no attention call that can be read")


@contextmanager
def lean(attention: nn.Module | None, rows: Tensor) -> Iterator[list[Tensor]]:
    """Inside, ``attention`` projects the queries of ``rows [R]`` alone and no values; the keys are listed.

    Attention whose projections are no three linear layers projects everything, as always.
    """
    installed = Installation()
    projected: list[Tensor] = []
    try:
        if (three := projections(attention)) is not None:
            query, key, value = three
            installed.shadow(query, "forward", functools.partial(_some, rows))
            installed.shadow(key, "forward", functools.partial(_noted, projected))
            installed.shadow(value, "forward", functools.partial(_none, value.out_features))
        yield projected
    finally:
        installed.undo()


def projections(attention: nn.Module | None) -> tuple[nn.Linear, nn.Linear, nn.Linear] | None:
    """``q_proj``, ``k_proj`` and ``v_proj`` of attention that has them as linear layers."""
    query, key, value = (getattr(attention, name, None) for name in ("q_proj", "k_proj", "v_proj"))
    if isinstance(query, nn.Linear) and isinstance(key, nn.Linear) and isinstance(value, nn.Linear):
        return query, key, value
    return None


def _some(rows: Tensor, project: Project, hidden: Tensor) -> Tensor:
    out = project(hidden.index_select(1, rows))
    if len(rows) == 1:
        return out.expand(*hidden.shape[:-1], -1)
    return out.new_zeros(*hidden.shape[:-1], out.shape[-1]).index_copy_(1, rows, out)


def _noted(projected: list[Tensor], project: Project, hidden: Tensor) -> Tensor:
    projected.append(project(hidden))
    return projected[-1]


def _none(width: int, project: Project, hidden: Tensor) -> Tensor:
    return hidden.new_zeros(()).expand(*hidden.shape[:-1], width)
