"""Readings of the vision encoder's attention, taken while it encodes: one row per picture, never a whole map kept."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .attention import interface
from .attention.call import Call
from .attention.rows import chunks
from .errors import UnsupportedError
from .shrink import Shrinker
from .stages import EncoderScore, Prune
from .tokens import TokenMap


class EncoderReader:
    """Reads asked-for scores during a call of the feature function; in between, the encoder is as it was."""

    def __init__(self, model: PreTrainedModel, scores: Sequence[EncoderScore], names: str, tap: int | None = None):
        """``tap``: a layer whose query, key, value ``[P, H, n, d]`` and scaling shall stand in ``tapped``."""
        self.scores, self.names = tuple(scores), names
        self.taken: dict[EncoderScore, Tensor] = {}
        self.tapped: tuple[Tensor, Tensor, Tensor, float] | None = None
        self.shrinker: Shrinker | None = None
        self.idle = not self.scores and tap is None
        if self.idle:
            return
        self.tower: Any = model.get_encoder(modality="image")
        self.config = model.config
        self.blocks, self.attentions = _blocks(self.tower)
        if not self.attentions or not hasattr(self.tower, "set_attn_implementation"):
            raise UnsupportedError(f"{names}: the vision encoder of {type(model).__name__} shows no attention layers")
        self.layers = {score: range(len(self.attentions))[score.layer] for score in self.scores}
        if tap is not None and not -len(self.attentions) <= tap < len(self.attentions):
            raise UnsupportedError(f"{names}: the vision encoder has no layer {tap}")
        self.tap = None if tap is None else range(len(self.attentions))[tap]
        embeddings = [m for m in self.tower.modules() if hasattr(m, "class_embedding")]
        self.class_token = bool(embeddings)

    def shrink(self, prune: Prune) -> None:
        """From now on, patches leave inside the encoder as ``prune`` says."""
        layers = len(self.blocks)
        chosen = getattr(self.config, "vision_feature_layer", None)
        last = max((self._output(n) for n in ([chosen] if isinstance(chosen, int) else chosen or [-1])), default=-1)
        self.shrinker = Shrinker(prune, self.blocks, self.attentions, range(layers)[last], self.class_token)

    def _output(self, state: int) -> int:
        """The layer whose output is this one of all hidden states, of which the first is no layer's."""
        return state - 1 if state > 0 else state + len(self.blocks) if state < 0 else 0

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Inside, the attention of the encoder passes through :meth:`attend`."""
        if self.idle:
            yield
            return
        self.taken, self.tapped = {}, None
        self.backend = self.tower.config._attn_implementation
        self.tower.set_attn_implementation(interface.register(self.backend))
        try:
            for module in self.attentions:
                interface.connect(module, self)
            with self.shrinker.running() if self.shrinker is not None else contextlib.nullcontext():
                yield
        finally:
            for module in self.attentions:
                interface.disconnect(module)
            self.tower.set_attn_implementation(self.backend)

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
        """Runs the call unchanged and keeps the scores of its layer, ``[pictures, patches]``."""
        layer = next(n for n, m in enumerate(self.attentions) if m is module)
        if layer == self.tap:
            if self.tapped is not None:
                raise UnsupportedError(f"{self.names}: this vision encoder attends in several pieces per layer")
            self.tapped = query, key, value, float(kwargs["scaling"])
        call = Call(query, key, value, mask, kwargs["scaling"], False, None, None, self.backend)
        for score in self.scores:
            if self.layers[score] == layer:
                if score in self.taken:
                    raise UnsupportedError(f"{self.names}: this vision encoder attends in several pieces per layer")
                self.taken[score] = self._read(call, score)
        if self.shrinker is not None:
            return self.shrinker.attend(base, module, query, key, value, mask, kwargs)
        return base(module, query, key, value, mask, **kwargs)

    def _read(self, call: Call, score: EncoderScore) -> Tensor:
        skip = int(self.class_token)
        if self.class_token and score.rows == "summary":
            return call.weights(torch.zeros(1, dtype=torch.long, device=call.query.device)).mean(1)[:, 0, 1:]
        rows = torch.arange(skip, call.queries, device=call.query.device)
        parts = (call.weights(p).mean(1).sum(1) for p in chunks(rows, len(call.query), call.query.shape[1], call.keys))
        return sum(parts)[:, skip:] / rows.numel()  # type: ignore[index]

    def take(self, tokens: TokenMap) -> dict[EncoderScore, Tensor]:
        """The scores laid onto the prompt's visual tokens, ``[B, N]``, 0 elsewhere.

        Raises:
            UnsupportedError: finished features were given, or visual tokens are no patches of the encoder.
        """
        out = {}
        for score in self.scores:
            if score not in self.taken and bool(tokens.vis.any()):
                raise UnsupportedError(
                    f"{self.names} reads the vision encoder at work: pass pixel_values, not finished image features"
                )
            out[score] = self._laid(tokens, self.taken.get(score, torch.zeros(0, 1)))
        self.taken = {}
        return out

    def _laid(self, tokens: TokenMap, values: Tensor) -> Tensor:
        runs = [
            ((tokens.img_id[row] == image) & tokens.vis[row]).nonzero()[:, 0]
            for row in range(tokens.batch)
            for image in range(tokens.images(row))
        ]
        owners = [row for row in range(tokens.batch) for _ in range(tokens.images(row))]
        if len(runs) % max(len(values), 1) or any(len(run) != values.shape[1] for run in runs):
            raise UnsupportedError(
                f"{self.names} needs one visual token per patch of the encoder ({values.shape[1]} patches in each of "
                f"{len(values)} pictures); this prompt has runs of {sorted({len(run) for run in runs})} visual tokens"
            )
        out = torch.zeros(tokens.vis.shape, device=tokens.vis.device)
        times = len(runs) // max(len(values), 1)
        for number, (row, run) in enumerate(zip(owners, runs, strict=True)):
            out[row, run] = values[self._source(tokens, number, times)].to(out.device)
        return out

    @staticmethod
    def _source(tokens: TokenMap, number: int, times: int) -> int:
        """Picture of the encoder that the ``number``-th run shows, when each sample stands ``times`` times."""
        start = 0
        for row in range(0, tokens.batch, times):
            count = tokens.images(row)
            if number < start * times + count * times:
                return start + (number - start * times) % count
            start += count
        raise ValueError(f"run {number} lies behind the last picture")


def _blocks(tower: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """The encoder's layers and their attention modules, in order."""
    for module in tower.modules():
        if isinstance(module, nn.ModuleList) and len(module):
            found = [getattr(layer, "self_attn", None) or getattr(layer, "attention", None) for layer in module]
            if all(isinstance(a, nn.Module) for a in found):
                return list(module), [a for a in found if a is not None]
    return [], []
