"""Second passes over the prompt that edits ask for: without its image, or ahead to a layer that must be read first."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .request import Request

if TYPE_CHECKING:
    from .session import Session

Choose = Callable[[Tensor], None]


class TextStream:
    """The prompt without its image: head outputs ``[B, H, d]`` of its last row, layer by layer.

    The stream runs once, unedited. A paired stream is run a second time in step with the image prompt, its heads
    scaled by the factors that the image prompt gets.
    """

    def __init__(self, session: Session, ids: Tensor, mask: Tensor | None, paired: bool):
        start = time.perf_counter()
        self.session, self.paired = session, paired
        self.last: dict[int, Tensor] = {}
        self.calls: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self.next = 0
        self.hidden: Tensor | None = None
        text_ids, text_mask = session.family.text_only(ids, mask)
        with session.suspended(), torch.no_grad(), self._recording():
            session.family.read_text(text_ids, text_mask)
        self.seconds = time.perf_counter() - start

    @contextlib.contextmanager
    def _recording(self) -> Iterator[None]:
        """Inside, the arguments of every decoder layer and its last row before ``o_proj`` are kept."""

        def keep_call(number: int) -> Callable[..., None]:
            def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                self.calls[number] = (args, dict(kwargs))

            return hook

        def keep_row(number: int) -> Callable[..., None]:
            def hook(_: Any, args: tuple[Any, ...]) -> None:
                self.last[number] = self._row(args[0])

            return hook

        handles = []
        try:
            family = self.session.family
            if self.paired:
                for number, layer in enumerate(family.layers):
                    handles.append(layer.register_forward_pre_hook(keep_call(number), with_kwargs=True))
            for number, attention in family.attentions():
                handles.append(family.output_projection(attention).register_forward_pre_hook(keep_row(number)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _row(self, x: Tensor) -> Tensor:
        return x[:, -1].reshape(x.shape[0], self.session.info.heads, -1)

    def restarted(self) -> TextStream:
        """The same stream before its first step."""
        again = copy.copy(self)
        again.next, again.hidden = 0, None
        return again

    def meet(self, layer: int, choose: Choose, scale: Callable[[Tensor], Tensor]) -> None:
        """Hands the last row of ``layer`` to ``choose``; a paired stream then goes on with ``scale``d heads."""
        if not self.paired:
            choose(self.last[layer])
            return
        while self.next < layer:
            self._step(None)

        def hook(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
            choose(self._row(args[0]))
            return (scale(args[0]), *args[1:])

        self._step(hook)

    def _step(self, hook: Callable[..., Any] | None) -> None:
        """Runs the next decoder layer on the stream."""
        number = self.next
        args, kwargs = self.calls[number]
        if self.hidden is not None and args:
            args = (self.hidden, *args[1:])
        elif self.hidden is not None:
            kwargs = {**kwargs, "hidden_states": self.hidden}
        family, handle = self.session.family, None
        if hook is not None:
            handle = family.output_projection(family.attention(number)).register_forward_pre_hook(hook)
        try:
            with self.session.suspended(), torch.no_grad():
                out = family.layers[number](*args, **kwargs)
        finally:
            if handle is not None:
                handle.remove()
        self.hidden = out[0] if isinstance(out, tuple) else out
        self.next += 1


class _Stop(Exception):
    """Ends a pass that has seen enough."""


def read_ahead(session: Session, layer: int, kwargs: dict[str, Any]) -> None:
    """Runs the prompt up to ``layer`` with row edits waiting, so that they can act in earlier layers afterwards."""

    def stop(*_: Any) -> None:
        raise _Stop

    request = session.last
    scratch = Request(tokens=request.tokens, entered=request.entered, words=request.words, encoder=request.encoder)
    scratch.stages = list(request.stages)
    scratch.text, scratch.prefilled = None if request.text is None else request.text.restarted(), True
    following = session.family.layers[layer].register_forward_hook(stop)
    session.request = scratch
    try:
        with contextlib.suppress(_Stop), torch.no_grad():
            # forward, not a call: the decoder's own hooks would take this for a new request.
            session.family.lm.forward(**{**kwargs, "past_key_values": None, "use_cache": False})
    finally:
        following.remove()
        session.request = request
    request.memory = scratch.memory
