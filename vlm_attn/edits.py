"""Attention edits at work: prepared once per request and layer, applied in every attention call."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .attention import columns, fused, soft
from .attention.call import Call, RowMap, Run
from .attention.labelled import SPARE
from .attention.plans import FUSED_ROWS, Gated, Labelled, Remembered, edit_decode, edit_rows, edit_weights
from .draft import Drafted
from .errors import UnsupportedError
from .request import Request
from .stages import (
    Edit,
    EditView,
    EncoderScore,
    HeadScale,
    KeyBias,
    KeyMap,
    LogitMap,
    Method,
    ModelInfo,
    RowEdit,
    Rows,
    SegmentEdit,
    SoftMask,
)


class Edits:
    """The Edit methods of one pipeline. Holds no request state: that is passed in and kept there.

    Raises:
        ValueError: none of a method's layers has attention (models that mix tokens by convolution in between).
    """

    def __init__(self, methods: Sequence[Method], info: ModelInfo, attention: Collection[int]):
        self.heads = info.heads
        self.all: list[tuple[int, Edit]] = [(i, m) for i, m in enumerate(methods) if isinstance(m, Edit)]
        self.maps = [(i, m) for i, m in self.all if isinstance(m, LogitMap)]
        self.biases = [(i, m) for i, m in self.all if isinstance(m, KeyBias)]
        self.soft = [(i, m) for i, m in self.all if isinstance(m, SoftMask)]
        self.rows = [(i, m) for i, m in self.all if isinstance(m, RowEdit)]
        self.segments = [(i, m) for i, m in self.all if isinstance(m, SegmentEdit)]
        self.scales = [(i, m) for i, m in self.all if isinstance(m, HeadScale)]
        self.layers = {i: _with_attention(m, m.edit_layers(info), attention, info) for i, m in self.all}
        self.scale_layers = {i: frozenset(m.scale_layers(info)).intersection(attention) for i, m in self.scales}
        inside = (LogitMap, KeyBias, RowEdit, SegmentEdit)
        # Layers whose heads are scaled, and those whose attention may change in decoding: no other pays for it.
        self.gated_layers = frozenset(n for layers in self.scale_layers.values() for n in layers)
        self.decode_layers = frozenset(n for i, m in self.all if isinstance(m, inside) for n in self.layers[i])

    @property
    def text_stream_layers(self) -> frozenset[int]:
        """Layers whose text-only head outputs some method asks for."""
        return frozenset(n for i, m in self.scales if m.wants_text_stream for n in self.scale_layers[i])

    @property
    def paired(self) -> bool:
        """Whether the text-only stream must be scaled with the same factors."""
        return any(m.paired for _, m in self.scales)

    @property
    def wants_words(self) -> bool:
        """Whether some edit needs roles that only the tokenizer knows."""
        return any(m.wants_words for _, m in self.all)

    @property
    def encoder_scores(self) -> tuple[EncoderScore, ...]:
        """Readings of the vision encoder that some edit needs."""
        return tuple(dict.fromkeys(score for _, m in self.all for score in m.encoder_scores))

    @property
    def drafting(self) -> tuple[int, RowEdit] | None:
        """The edit that wants a draft, with its place in the pipeline."""
        return next(((i, m) for i, m in self.rows if m.draft_tokens), None)

    def remember_draft(self, drafted: Drafted | None, request: Request) -> None:
        """Hands the draft to the edit that wanted it."""
        if self.drafting is None:
            return
        i, edit = self.drafting
        if drafted is None:
            raise UnsupportedError(f"{edit.name} drafts inside generate(): call model.generate or vlm.ask")
        view = self._view(edit, 0, None, request)
        request.memory[i] = edit.read_draft(view, drafted.of(request.tokens.batch))

    @property
    def reads_ahead(self) -> int | None:
        """Last layer that must be read before a layer below it is edited: the prompt then runs to it twice."""
        late = [
            m.source for i, m in self.rows if m.source is not None and min(self.layers[i], default=m.source) < m.source
        ]
        return max(late, default=None)

    # -------------------------------------------------------------------------------------------------- prepare

    def _view(self, edit: Edit, layer: int, hidden: Tensor | None, request: Request) -> EditView:
        encoder = {score: request.encoder[score] for score in edit.encoder_scores}
        return EditView(
            layer,
            request.tokens_at(layer),
            request.tokens,
            hidden if edit.wants_hidden else None,
            encoder=encoder,
            words=request.words if edit.wants_words else None,
        )

    def prepare(self, number: int, hidden: Tensor, request: Request) -> None:
        """Asks the methods for labels, biases and maps of one layer's prompt keys (prefill, before the layer runs)."""
        for i, edit in self.all:
            if number not in self.layers[i]:
                continue
            view = self._view(edit, number, hidden, request)
            if isinstance(edit, LogitMap):
                request.maps[i, number] = self._map(i, edit, view, request)
            if isinstance(edit, KeyBias):
                bias = self._in_heads(edit.bias(view), self._chosen(edit, number, hidden.device))
                if bool(bias.any()):
                    request.biases[i, number] = bias
            if isinstance(edit, SegmentEdit) and not edit.wants_columns:
                self._label(i, edit, number, edit.labels(view), request)

    def _map(self, i: int, edit: LogitMap, view: EditView, request: Request) -> KeyMap:
        """The map of a layer's keys; layers with the same keys share it."""
        found = request.shared_maps.get(i)
        if found is None or found[0] is not view.tokens:
            found = request.shared_maps[i] = view.tokens, _acting(edit.key_map(view))
        return found[1]

    def _label(self, i: int, edit: SegmentEdit, layer: int, labels: Tensor, request: Request) -> None:
        request.labels[i, layer] = labels
        heads = self._chosen(edit, layer, labels.device)
        mask = None
        if heads is not None:
            mask = torch.zeros(self.heads, dtype=torch.bool, device=labels.device)
            mask[heads] = True
        request.labelled[i, layer] = Labelled.of(edit, labels, mask)

    def _in_heads(self, bias: Tensor, heads: Tensor | None) -> Tensor:
        """The bias ``[B, H or 1, N]``, 0 in heads that were not chosen."""
        if heads is None:
            return bias
        out = bias.new_zeros(bias.shape[0], self.heads, bias.shape[2])
        out[:, heads] = bias.expand(-1, self.heads, -1)[:, heads]
        return out

    @staticmethod
    def _chosen(edit: Edit, layer: int, device: torch.device) -> Tensor | None:
        heads = edit.heads_at(layer)
        return None if heads is None else torch.tensor(sorted(heads), dtype=torch.long, device=device)

    def bias(self, layer: int, keys: int, request: Request) -> Tensor | None:
        """Sum of the key biases of one layer, ``[B, H or 1, keys]``; generated tokens get 0; None = nothing to add."""
        total = None
        for i, _ in self.biases:
            found = request.biases.get((i, layer))
            if found is not None:
                if found.shape[-1] < keys:
                    found = request.biases[i, layer] = _pad(found, keys + SPARE)
                part = found[..., :keys]
                total = part if total is None else total + part
        return total

    def _maps(self, layer: int, call: Call, request: Request) -> tuple[RowMap, ...]:
        out = []
        for i, edit in self.maps:
            found = request.maps.get((i, layer), KeyMap())
            if (found.scale is None and found.boost is None) or self._idle(edit.rows, layer, request):
                continue
            known = next(x.shape[-1] for x in (found.scale, found.boost) if x is not None)
            if known < call.keys:
                length = call.keys + SPARE
                scale = None if found.scale is None else _pad(found.scale, length, 1.0)
                found = request.maps[i, layer] = KeyMap(
                    scale, None if found.boost is None else _pad(found.boost, length)
                )
            scale, boost = (x if x is None else x[:, : call.keys] for x in (found.scale, found.boost))
            out.append(RowMap(scale, boost, self._gate(edit.rows, layer, call, request), edit.rows == "all"))
        return tuple(out)

    @staticmethod
    def _idle(rows: Rows, layer: int, request: Request) -> bool:
        """Whether an edit of such rows has none, because no sample shows a picture."""
        return rows != "all" and not request.pictured(layer).some

    @staticmethod
    def _gate(rows: Rows, layer: int, call: Call, request: Request) -> Tensor:
        """bool ``[B, Q]``: the rows of this call that an edit acts in."""
        tokens, has_image = request.tokens_at(layer), request.pictured(layer).rows
        prefill = call.queries == call.keys
        if rows == "all":
            return tokens.valid if prefill else torch.ones_like(has_image).expand(-1, call.queries)
        if rows == "sees_image":
            return tokens.sees_image if prefill else has_image.expand(-1, call.queries)
        if call.queries == 1:
            return has_image
        gate = torch.zeros(tokens.batch, call.queries, dtype=torch.bool, device=has_image.device)
        gate[:, -1:] = has_image
        return gate

    # ---------------------------------------------------------------------------------------------------- apply

    def attend(self, layer: int, call: Call, request: Request, run: Run) -> tuple[Call, Tensor, Tensor | None]:
        """One attention call of one layer with all edits but head scales.

        Args:
            run: the backend's own attention.

        Returns:
            The call with all that enters its logits, the output ``[B, Q, H, d]`` and the backend's weights, if any.
        """
        bias, maps = self.bias(layer, call.keys, request), self._maps(layer, call, request)
        if bias is not None or maps:
            call = replace(call, bias=bias, maps=maps)
        if call.queries == 1 and call.keys > 1:
            row = self._decode(layer, call, request)
            if row is not None:
                return call, row, None
        call, out, weights = fused.attend(call, run, self._wants_lse(layer, call, request))
        if call.queries == call.keys:
            self.read(layer, call, request)
            out = self._soften(layer, call, out, request)
        if call.queries > 1 or call.keys == 1:
            out = self._edit(layer, call, out, request)
        return call, out, weights

    def _wants_lse(self, layer: int, call: Call, request: Request) -> bool:
        """Whether some edit of all rows, or of many, starts from each row's LSE."""
        if call.queries != call.keys:
            return False
        if any(layer in self.layers[i] for i, _ in self.soft):
            return True
        here = [m for i, m in self.segments if layer in self.layers[i]]
        return any(
            m.wants_columns or int(self._gate(m.rows, layer, call, request).any(0).sum()) >= FUSED_ROWS for m in here
        )

    def _items(self, layer: int, call: Call, request: Request, frozen: bool = True) -> list[Gated]:
        """Row edits, then segment edits of a layer with the rows they act in."""
        items: list[Gated] = []
        for i, edit in self.rows:
            waiting = edit.source is not None and i not in request.memory
            if layer in self.layers[i] and not waiting and not self._idle("last", layer, request):
                items.append((self._remembered(i, edit, layer, request), self._gate("last", layer, call, request)))
        for i, segment in self.segments:
            if self._idle(segment.rows, layer, request):
                continue
            labelled = request.labelled.get((i, layer))
            if labelled is not None and not labelled.neutral and (frozen or not segment.wants_columns):
                items.append((labelled, self._gate(segment.rows, layer, call, request)))
        return items

    def _remembered(self, i: int, edit: RowEdit, layer: int, request: Request) -> Remembered:
        """A row edit with what it knows: the same in every step, once the prompt has gone through."""
        found, memory = request.remembered.get((i, layer)), request.memory.get(i)
        if found is None or found.memory is not memory or found.view.tokens is not request.tokens_at(layer):
            found = request.remembered[i, layer] = Remembered(edit, self._view(edit, layer, None, request), memory)
        return found

    def weights(self, layer: int, call: Call, rows: Tensor, request: Request) -> Tensor:
        """fp32 ``[B, H, R, N]`` weights of the query rows ``rows [R]`` after every edit that changes weights."""
        return edit_weights(call.weights(rows), rows, call.queries - 1, self._items(layer, call, request))

    def _decode(self, layer: int, call: Call, request: Request) -> Tensor | None:
        """Output ``[B, 1, H, d]`` of a decode step whose row some map or edit changes, else None."""
        items = self._items(layer, call, request)
        if not items and not call.maps:
            return None
        out, edited = edit_decode(call, items, request.pictured(layer).every)
        rows = sum(isinstance(item, Remembered) for item, _ in items)  # counted by comparing whole rows
        request.count(layer, edited, 2 * rows * call.query.shape[0] * call.query.shape[1] * call.keys)
        return out

    def _soften(self, layer: int, call: Call, out: Tensor, request: Request) -> Tensor:
        for i, edit in self.soft:
            if layer in self.layers[i]:
                images = request.tokens_at(layer).img_id
                out, edited = soft.soften(call, out, images, edit.pairs, edit.sigma, edit.mode)
                self._count(layer, edited, request)
        return out

    def _edit(self, layer: int, call: Call, out: Tensor, request: Request) -> Tensor:
        prefill = call.queries == call.keys
        out, edited = edit_rows(call, out, self._items(layer, call, request, frozen=not prefill))
        self._count(layer, edited, request)
        for i, edit in self.segments:
            if prefill and edit.wants_columns and layer in self.layers[i]:
                out = self._edit_columns(i, edit, layer, call, out, request)
        return out

    def _edit_columns(
        self, i: int, edit: SegmentEdit, layer: int, call: Call, out: Tensor, request: Request
    ) -> Tensor:
        """Labels from the column means of this very call, then the edit of all rows."""
        heads = self._chosen(edit, layer, out.device)
        heads = torch.arange(self.heads, device=out.device) if heads is None else heads
        valid = request.tokens_at(layer).valid
        means, lse = columns.column_means(call, valid, heads)
        full = means.new_zeros(means.shape[0], self.heads, means.shape[2])
        full[:, heads] = means
        view = replace(self._view(edit, layer, None, request), columns=full)
        self._label(i, edit, layer, edit.labels(view), request)
        out, edited = columns.edit_labelled(call, out, request.labelled[i, layer], heads, lse, valid)
        self._count(layer, edited, request)
        return out

    def read(self, layer: int, call: Call, request: Request) -> None:
        """Hands the prompt rows that row edits ask for to their methods (prefill)."""
        for i, edit in self.rows:
            if edit.source != layer or i in request.memory:
                continue
            view = self._view(edit, layer, None, request)
            rows = edit.read_rows(view).any(0).nonzero()[:, 0]
            request.memory[i] = edit.read(view, call.weights(rows), rows)

    @staticmethod
    def _count(layer: int, edited: int, request: Request) -> None:
        if edited:
            request.count(layer, lambda: edited)

    # -------------------------------------------------------------------------------------------------- head scale

    def choose_factors(self, number: int, x: Tensor, request: Request) -> None:
        """Fixes the head factors of one layer for the request, from the ``o_proj`` input ``x [B, Q, H * d]``."""
        here = [(i, m) for i, m in self.scales if number in self.scale_layers[i]]
        undecided = [(i, m) for i, m in here if (i, number) not in request.factors]
        if not undecided:
            return
        last = x[:, -1].reshape(x.shape[0], self.heads, -1)
        has_image = request.tokens.vis.any(1, keepdim=True)

        def choose(text_last: Tensor | None) -> None:
            for i, edit in undecided:
                factors = edit.factors(number, last, text_last)
                # Samples without an image have nothing to be reinforced against.
                request.factors[i, number] = torch.where(has_image, factors, 1.0)

        if request.text is None or number not in self.text_stream_layers:
            choose(None)
        else:
            request.text.meet(number, choose, lambda text: self._scaled(number, text, request))

    def scale_heads(self, number: int, x: Tensor, request: Request) -> Tensor:
        """Plan P0: scales the heads inside the ``o_proj`` input ``[B, Q, H * d]``."""
        found = (request.factors.get((i, number)) for i, _ in self.scales)
        self._count(number, sum(int((factors != 1).sum()) for factors in found if factors is not None), request)
        return self._scaled(number, x, request)

    def _scaled(self, number: int, x: Tensor, request: Request) -> Tensor:
        for i, _ in self.scales:
            factors = request.factors.get((i, number))
            if factors is not None and bool((factors != 1).any()):
                shape = (*x.shape[:-1], self.heads, -1)
                x = (x.reshape(shape) * factors[:, None, :, None].to(x.dtype)).reshape(x.shape)
        return x


def _with_attention(edit: Edit, wanted: frozenset[int], attention: Collection[int], info: ModelInfo) -> frozenset[int]:
    found = frozenset(wanted).intersection(attention)
    if wanted and not found:
        raise UnsupportedError(
            f"{edit.name}: none of its layers {sorted(wanted)} has attention in {info.family}; choose among "
            f"{sorted(attention)}"
        )
    return found


def _pad(x: Tensor, keys: int, value: float = 0.0) -> Tensor:
    return torch.nn.functional.pad(x, (0, keys - x.shape[-1]), value=value)


def _acting(found: KeyMap) -> KeyMap:
    """The map without the parts that change nothing."""
    scale = None if found.scale is None or bool((found.scale == 1).all()) else found.scale
    boost = None if found.boost is None or not bool(found.boost.any()) else found.boost
    return KeyMap(scale, boost)
