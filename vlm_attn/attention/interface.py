"""The attention function and mask function that transformers calls while a session is attached.

One name per backend is registered on first use (``vlm_attn-sdpa``, ...). The function finds the session of the
calling attention module and falls through, with unchanged arguments, to the backend's own function; so whatever a
session does not touch is bit-identical to the unwrapped model.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, Protocol
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..errors import UnsupportedError
from .masks import BACKENDS, FLASH

PREFIX = "vlm_attn-"
Result = tuple[Tensor, Tensor | None]
AttentionFunction = Callable[..., Result]


class Engine(Protocol):
    """What the registered function calls back into."""

    def attend(
        self,
        base: AttentionFunction,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        kwargs: dict[str, Any],
    ) -> Result:
        """Runs one attention call of one layer."""


# Weak on both sides: the model's hooks keep its session alive, these tables must keep neither.
_ENGINES: WeakKeyDictionary[nn.Module, ReferenceType[Engine]] = WeakKeyDictionary()


def connect(module: nn.Module, engine: Engine) -> None:
    """From now on, calls of this attention module go to ``engine``."""
    _ENGINES[module] = ref(engine)


def disconnect(module: nn.Module) -> None:
    """Undoes :func:`connect`."""
    _ENGINES.pop(module, None)


def is_causal(module: nn.Module) -> bool:
    """Whether an absent mask means causal attention in this module."""
    return bool(getattr(module, "is_causal", True))


def base_function(backend: str, module: nn.Module) -> AttentionFunction:
    """The backend's own attention function for this module."""
    if backend == "eager":
        # Eager attention is a function of the modelling file and in no registry.
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[backend]


def _forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *,
    backend: str,
    **kwargs: Any,
) -> Result:
    base = base_function(backend, module)
    found = _ENGINES.get(module)
    engine = found() if found is not None else None
    if engine is None:
        return base(module, query, key, value, attention_mask, **kwargs)
    return engine.attend(base, module, query, key, value, attention_mask, kwargs)


@functools.cache
def register(backend: str) -> str:
    """Registers (once) the attention and mask functions for a backend and returns their common name.

    Raises:
        UnsupportedError: the backend is none of those the engine reads masks of.
    """
    if backend not in BACKENDS:
        raise UnsupportedError(
            f"attention backend '{backend}' is not supported; call model.set_attn_implementation('sdpa') first "
            f"(supported: {', '.join(BACKENDS)})"
        )
    if backend in FLASH and not torch.cuda.is_available():
        raise UnsupportedError(
            f"attention backend '{backend}' needs a CUDA device and there is none here: call "
            "model.set_attn_implementation('sdpa') first"
        )
    name = PREFIX + backend
    AttentionInterface.register(name, functools.partial(_forward, backend=backend))
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[backend])
    return name
