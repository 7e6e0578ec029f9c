"""A decoder layer run only as far as its attention call, with no more projected than a reading of some rows needs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


def attention_call(
    family: Family, number: int, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], rows: Tensor
) -> Call:
    """The attention call that layer ``number`` would make on ``hidden [B, N, D]``.

    Queries but for ``rows [R]``, and values, may be 0. The engine has to raise :class:`Stopped` at the call.
    """
    args, kwargs = ((hidden, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": hidden})
    try:
        with lean(family.attention(number), rows):
            family.layers[number](*args, **{**kwargs, "past_key_values": None})
    except Stopped as stopped:
        return stopped.call
    raise UnsupportedError(f"{family.name}: decoder layer {number} made no attention call that can be read")


@contextmanager
def lean(attention: nn.Module | None, rows: Tensor) -> Iterator[None]:
    """Inside, ``attention`` projects the queries of ``rows [R]`` alone and no values: the rest is 0.

    Attention whose projections are no three linear layers projects everything, as always.
    """
    installed = Installation()
    query, key, value = (getattr(attention, name, None) for name in ("q_proj", "k_proj", "v_proj"))
    try:
        if isinstance(query, nn.Linear) and isinstance(key, nn.Linear) and isinstance(value, nn.Linear):
            installed.shadow(query, "forward", functools.partial(_some, rows))
            installed.shadow(value, "forward", functools.partial(_none, value.out_features))
        yield
    finally:
        installed.undo()


def _some(rows: Tensor, project: Project, hidden: Tensor) -> Tensor:
    out = project(hidden.index_select(1, rows))
    return out.new_zeros(*hidden.shape[:-1], out.shape[-1]).index_copy_(1, rows, out)


def _none(width: int, project: Project, hidden: Tensor) -> Tensor:
    return hidden.new_zeros(*hidden.shape[:-1], width)
