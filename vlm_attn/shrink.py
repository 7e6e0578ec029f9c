"""Patches leave inside the vision encoder: its later layers run on what is left.

Every layer still takes and gives the full sequence, so that nobody outside notices: survivors are gathered before a
layer and put back behind it, and what left keeps its last hidden state until the prompt drops it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .attention import interface
from .encoder_view import Picture
from .errors import UnsupportedError
from .pruning import take
from .sites import EncoderStep
from .stages import Prune

PLAIN_BLOCK = {"self_attn", "layer_norm1", "layer_norm2", "mlp"}
"""Parts of an encoder layer whose attention output is added to the layer's input as it is."""


@dataclass
class _Run:
    """One pass through the encoder.

    Attributes:
        slots: int64 ``[P, n]`` ascending slots of the full sequence that the next layer runs on.
        valid: bool ``[P, n]``, False at filler of pictures that kept fewer.
        sizes: fp32 ``[P, n]``.
        full, entered: hidden states of the layer at work, ``[P, S, D]`` and ``[P, n, D]``.
        left: what stays behind the layer at work, as positions among ``n`` and their validity.
    """

    slots: Tensor
    valid: Tensor
    sizes: Tensor
    memory: list[dict[str, Any]]
    full: Tensor
    entered: Tensor
    heads: tuple[Tensor, Tensor, Tensor, float] | None = None
    left: tuple[Tensor, Tensor] | None = None

    @property
    def padded(self) -> bool:
        """Whether keys must be hidden or weighted."""
        return not bool(self.valid.all()) or bool((self.sizes != 1).any())


@dataclass
class Shrinker:
    """Removes patches between the layers of an encoder as a method says.

    Attributes:
        layers, attentions: modules of the encoder's layers and their attention.
        features: layer whose output are the features.
        class_token: the sequence starts with one; it always stays.
    """

    prune: Prune
    layers: Sequence[nn.Module]
    attentions: Sequence[nn.Module]
    features: int
    class_token: bool
    run: _Run | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.prune.shrinks == "attention":
            for layer in self.layers:
                if {name for name, _ in layer.named_children()} != PLAIN_BLOCK:
                    raise UnsupportedError(
                        f"{self.prune.name} acts between attention and MLP of plain pre-norm encoder layers; "
                        f"{type(layer).__name__} is built otherwise"
                    )

    @property
    def alive(self) -> Tensor | None:
        """bool ``[P, N]``: patches that are left; None before the encoder ran."""
        if self.run is None:
            return None
        out = torch.zeros(self.run.full.shape[:2], dtype=torch.bool, device=self.run.full.device)
        return out.scatter(1, self.run.slots, self.run.valid)[:, int(self.class_token) :]

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Inside, the encoder sheds patches; hooks are gone afterwards."""
        self.run, handles = None, []
        try:
            for number, (layer, attention) in enumerate(zip(self.layers, self.attentions, strict=True)):
                before = functools.partial(self._before, number)
                handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
                # First of all hooks, so that captured hidden states are whole.
                after = functools.partial(self._after, number)
                handles.append(layer.register_forward_hook(after, prepend=True))
                if self.prune.shrinks == "attention":
                    between = functools.partial(self._between, number)
                    handles.append(attention.register_forward_hook(between, prepend=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    # ------------------------------------------------------------------------------------------------- one layer

    def _before(self, number: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        full = args[0] if args else kwargs["hidden_states"]
        others = [*args[1:], *(value for name, value in kwargs.items() if name != "hidden_states")]
        if not isinstance(full, Tensor) or full.dim() != 3 or any(isinstance(x, Tensor | tuple) for x in others):
            raise UnsupportedError(
                f"{self.prune.name}: the layers of this vision encoder take masks or positions along the sequence, "
                "so patches cannot leave between them"
            )
        if number == 0:
            slots = torch.arange(full.shape[1], device=full.device).expand(full.shape[0], -1)
            ones = torch.ones(slots.shape, device=full.device)
            memory: list[dict[str, Any]] = [{} for _ in range(full.shape[0])]
            self.run = _Run(slots, ones.bool(), ones, memory, full, full)
        run = self._now()
        run.full = run.entered = full
        if run.slots.shape[1] == full.shape[1]:
            return None
        run.entered = take(full, run.slots)
        return ((run.entered, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": run.entered})

    def attend(
        self,
        base: interface.AttentionFunction,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        kwargs: dict[str, Any],
    ) -> interface.Result:
        """The attention call of a layer on what is left: filler hidden, merged patches weighted by their size."""
        run = self._now()
        run.heads = query, key, value, float(kwargs["scaling"])
        if not run.padded:
            return base(module, query, key, value, mask, **kwargs)
        bias = run.sizes.log().masked_fill(~run.valid, torch.finfo(torch.float32).min / 2)[:, None, None]
        bias = bias.clamp(min=torch.finfo(query.dtype).min).to(query.dtype).expand(-1, 1, query.shape[2], -1)
        return interface.base_function("sdpa", module)(module, query, key, value, bias, **kwargs)

    def _between(self, number: int, attention: nn.Module, args: Any, output: Any) -> Any:
        run = self._now()
        added = output[0] if isinstance(output, tuple) else output
        merged = self._decide(number, run.entered + added)
        if merged is None:
            return None
        added = merged - run.entered
        return (added, *output[1:]) if isinstance(output, tuple) else added

    def _after(self, number: int, layer: nn.Module, args: Any, output: Any) -> Any:
        run = self._now()
        hidden = output[0] if isinstance(output, tuple) else output
        merged = self._decide(number, hidden) if self.prune.shrinks == "output" else None
        hidden = hidden if merged is None else merged
        shorter = run.slots.shape[1] < run.full.shape[1]
        if shorter:
            hidden = run.full.scatter(1, run.slots[..., None].expand(hidden.shape), hidden)
        if run.left is not None:
            positions, run.valid = run.left
            run.slots, run.left = run.slots.gather(1, positions), None
            run.sizes = run.sizes.gather(1, positions)
        if not shorter and merged is None:
            return None
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def _now(self) -> _Run:
        if self.run is None:
            raise UnsupportedError(f"{self.prune.name}: the layers of this vision encoder do not run in order")
        return self.run

    def _decide(self, number: int, hidden: Tensor) -> Tensor | None:
        """Asks the method about every picture; hidden states with what was merged, None if nothing leaves."""
        run = self._now()
        if number > self.features:
            return None
        if run.heads is None:
            raise UnsupportedError(
                f"{self.prune.name}: encoder layer {number} made no attention call that can be read"
            )
        stays, out, changed = run.valid.clone(), hidden, False
        skip = int(self.class_token)
        for picture in range(hidden.shape[0]):
            slots = run.valid[picture].nonzero()[:, 0]
            patches = slots[skip:]
            query, key, value = (x[picture][:, slots] for x in run.heads[:3])
            view = Picture(query, key, value, run.heads[3], self.class_token, hidden[picture, patches])
            total = run.full.shape[1] - skip
            memory = run.memory[picture]
            step = EncoderStep(number, self.features + 1, total, view, run.sizes[picture, patches], memory)
            answer = self.prune.shrink(step)
            if answer is None:
                continue
            if not changed:
                out, run.sizes, changed = hidden.clone(), run.sizes.clone(), True
            stays[picture, patches] = False
            stays[picture, patches[answer.keep]] = True
            if answer.hidden is not None:
                out[picture, patches] = answer.hidden.to(out.dtype)
            if answer.sizes is not None:
                run.sizes[picture, patches] = answer.sizes
        if not changed:
            return None
        n = int(stays.sum(1).max())
        positions = torch.argsort((~stays).int(), dim=1, stable=True)[:, :n].sort(1).values
        run.left = positions, stays.gather(1, positions)
        return out
