"""Attention edits at work: prepared once per request and layer, applied in every attention call."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from .attention.plans import Call, Labelled, edit_decode, edit_rows
from .request import Request
from .stages import EditView, HeadScale, KeyBias, Method, ModelInfo, SegmentEdit


class Edits:
    """The Edit methods of one pipeline. Holds no request state: that is passed in and kept there.

    Raises:
        ValueError: none of a method's layers has attention (models that mix tokens by convolution in between).
    """

    def __init__(self, methods: Sequence[Method], info: ModelInfo, attention: Collection[int]):
        self.heads = info.heads
        self.segments = [(i, m) for i, m in enumerate(methods) if isinstance(m, SegmentEdit)]
        self.biases = [(i, m) for i, m in enumerate(methods) if isinstance(m, KeyBias)]
        self.scales = [(i, m) for i, m in enumerate(methods) if isinstance(m, HeadScale)]
        self.layers: dict[int, frozenset[int]] = {}
        for i, m in [*self.segments, *self.biases, *self.scales]:
            wanted = m.edit_layers(info)
            self.layers[i] = frozenset(wanted).intersection(attention)
            if wanted and not self.layers[i]:
                raise ValueError(
                    f"{m.name}: none of its layers {sorted(wanted)} has attention in {info.family}; choose among "
                    f"{sorted(attention)}"
                )

    @property
    def text_stream_layers(self) -> frozenset[int]:
        """Layers whose text-only head outputs some method asks for."""
        return frozenset(n for i, m in self.scales if m.wants_text_stream for n in self.layers[i])

    def prepare(self, number: int, hidden: Tensor, request: Request) -> None:
        """Asks the methods for labels and biases of one layer's prompt keys (prefill, before the layer runs)."""
        tokens = request.tokens_at(number)
        for i, edit in self.segments:
            if number in self.layers[i]:
                view = EditView(number, tokens, hidden if edit.wants_hidden else None)
                request.labels[i, number] = edit.labels(view)
                request.labelled[i, number] = Labelled.of(edit, request.labels[i, number])
        for i, bias in self.biases:
            if number in self.layers[i]:
                view = EditView(number, tokens, hidden if bias.wants_hidden else None)
                request.biases[i, number] = bias.bias(view)

    def bias(self, layer: int, keys: int, request: Request) -> Tensor | None:
        """Sum of the key biases of one layer, ``[B, H or 1, keys]``; generated tokens get 0."""
        total = None
        for i, _ in self.biases:
            if (i, layer) in request.biases:
                part = _pad(request.biases[i, layer], keys)
                total = part if total is None else total + part
        return total

    def _at(self, layer: int, request: Request) -> list[Labelled]:
        return [request.labelled[i, layer] for i, _ in self.segments if (i, layer) in request.labelled]

    def decode(self, layer: int, call: Call, request: Request) -> Tensor | None:
        """Output ``[B, 1, H, d]`` of a decode step whose row some segment edit changes, else None."""
        edits = self._at(layer, request)
        if not edits or call.queries != 1 or call.keys == 1:
            return None
        out, edited = edit_decode(call, request.tokens_at(layer).vis.any(1), edits)
        request.edited[layer] = request.edited.get(layer, 0) + edited
        return out

    def apply(self, layer: int, call: Call, out: Tensor, request: Request) -> Tensor:
        """Applies the segment edits of one layer to the output ``[B, Q, H, d]`` of a longer attention call."""
        edits = self._at(layer, request)
        if not edits or call.queries == 1:
            return out
        rows, gate = self._rows(layer, call, request, edits[0].edit)
        if rows.numel() == 0:
            return out
        out, edited = edit_rows(call, out, rows, gate, edits)
        request.edited[layer] = request.edited.get(layer, 0) + edited
        return out

    @staticmethod
    def _rows(layer: int, call: Call, request: Request, edit: SegmentEdit) -> tuple[Tensor, Tensor]:
        """Query rows to look at ``[R]`` and the samples they count in ``[B, R]``."""
        tokens, device = request.tokens_at(layer), call.query.device
        has_image = tokens.vis.any(1, keepdim=True)
        if call.queries != call.keys:
            return torch.arange(call.queries, device=device), has_image.expand(-1, call.queries)
        if edit.rows == "last":
            return torch.tensor([call.queries - 1], device=device), has_image
        gate = tokens.sees_image
        rows = gate.any(0).nonzero()[:, 0]
        return rows, gate[:, rows]

    def scale_heads(self, number: int, x: Tensor, request: Request) -> Tensor:
        """Scales the heads inside the ``o_proj`` input ``[B, Q, H * d]``; the factors are fixed in the prefill."""
        for i, edit in self.scales:
            if number not in self.layers[i]:
                continue
            if (i, number) not in request.factors:
                last = x[:, -1].reshape(x.shape[0], self.heads, -1)
                factors = edit.factors(last, request.text_last.get(number))
                # Samples without an image have nothing to be reinforced against.
                request.factors[i, number] = torch.where(request.tokens.vis.any(1, keepdim=True), factors, 1.0)
            factors = request.factors[i, number]
            if bool((factors != 1).any()):
                shape = (*x.shape[:-1], self.heads, -1)
                x = (x.reshape(shape) * factors[:, None, :, None].to(x.dtype)).reshape(x.shape)
                request.edited[number] = request.edited.get(number, 0) + int((factors != 1).sum())
        return x


def _pad(x: Tensor, keys: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, keys - x.shape[-1]))
