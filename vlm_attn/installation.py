"""What a session puts onto a model, with the way back: hooks, shadowed methods, the attention implementation."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from .attention import interface
from .errors import AttachError
from .families import Family

Undo = Callable[[], None]


class Installation:
    """A stack of changes; :meth:`undo` takes them back in reverse order and may be called again."""

    def __init__(self) -> None:
        self._stack: list[Undo] = []

    def add(self, undo: Undo) -> None:
        """Remembers how to take one change back."""
        self._stack.append(undo)

    def undo(self) -> None:
        """Takes every change back."""
        while self._stack:
            self._stack.pop()()

    def pre_hook(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """A forward pre-hook with keyword arguments."""
        self.add(module.register_forward_pre_hook(hook, with_kwargs=True).remove)

    def hook(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """A forward hook with keyword arguments."""
        self.add(module.register_forward_hook(hook, with_kwargs=True).remove)

    def shadow(self, owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
        """Shadows a method on the instance; the signature stays visible because ``generate`` inspects it."""
        original = getattr(owner, name)
        had = owner.__dict__.get(name)
        owner.__dict__[name] = functools.wraps(original)(functools.partial(wrapper, original))

        def undo() -> None:
            if had is None:
                owner.__dict__.pop(name, None)
            else:
                owner.__dict__[name] = had

        self.add(undo)

    def attention(self, family: Family, backend: str, engine: interface.Engine) -> None:
        """Routes the decoder's attention through ``engine``.

        Raises:
            UnsupportedError: a backend that the engine cannot read.
            AttachError: an attention module that keeps its own implementation.
        """
        name = interface.register(backend)
        lm = family.lm
        self.add(lambda: setattr(lm.config, "_attn_implementation", backend))
        lm.set_attn_implementation(name)
        for number, attention in family.attentions():
            if getattr(getattr(attention, "config", None), "_attn_implementation", None) != name:
                raise AttachError(
                    f"{type(family.model).__name__}: the attention of decoder layer {number} did not accept the "
                    "attention function; load the model unmodified"
                )
            interface.connect(attention, engine)
            self.add(functools.partial(interface.disconnect, attention))
