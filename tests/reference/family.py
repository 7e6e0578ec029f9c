"""The dense references on any family: the family's own stock model, with explicit weights in place of its attention.

Nothing is removed and nothing is fused: a reference reads or edits the full softmax matrix of one unpadded sample, and
a dropped token is a key that nobody else may see.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, LogitsProcessor
from transformers.masking_utils import eager_mask

from tests.reference import edits, pruning
from tests.reference.llava import HIDDEN, Dense

NAME = "dense-reference"
_ACTIVE: list[OnModel] = []


class Force(LogitsProcessor):
    """Dictates the next tokens."""

    def __init__(self, tokens: Tensor, prompt: int) -> None:
        self.tokens, self.prompt = tokens, prompt

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Everything but the dictated token is impossible."""
        step = input_ids.shape[1] - self.prompt
        if not 0 <= step < len(self.tokens):
            return scores
        out = torch.full_like(scores, -torch.inf)
        out[:, self.tokens[step]] = 0.0
        return out


class OnModel(Dense):
    """Runs the hooks of `Dense` inside a stock model's `generate`."""

    def __init__(self, model: Any) -> None:
        self.model, self.lm = model, model.get_decoder()
        self.depth = len(self.lm.layers)
        self.image_id = model.config.image_token_id

    def answer(self, inputs: dict[str, Tensor], forced: Tensor) -> Tensor:
        """Logits `[len(forced), V]` at the prompt's end and after each forced token but the last."""
        self.visual = self.find_visual(inputs["input_ids"][0])
        self.begin(inputs)
        with self._attention_replaced():
            out = self.model.generate(
                **inputs, max_new_tokens=len(forced), do_sample=False, return_dict_in_generate=True,
                output_logits=True, logits_processor=[Force(forced, inputs["input_ids"].shape[1])],
            )  # fmt: skip
        return torch.stack([step[0] for step in out.logits])

    def begin(self, inputs: dict[str, Tensor]) -> None:
        """Before a prompt."""

    @contextlib.contextmanager
    def _attention_replaced(self) -> Iterator[None]:
        before = self.lm.config._attn_implementation
        handles = [
            layer.register_forward_pre_hook(self._layer_hook(number), with_kwargs=True)
            for number, layer in enumerate(self.lm.layers)
        ]
        _ACTIVE.append(self)
        self.lm.set_attn_implementation(NAME)
        try:
            yield
        finally:
            self.lm.set_attn_implementation(before)
            _ACTIVE.pop()
            for handle in handles:
                handle.remove()

    def _layer_hook(self, number: int) -> Any:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            self.on_layer_input(number, x[0].float(), prefill=x.shape[1] > 1)

        return hook

    def attend(self, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        """Head outputs `[1, rows, H, d]`, every weight explicit."""
        layer, (heads, rows), total = module.layer_idx, q.shape[1:3], k.shape[2]
        self.heads, group = heads, heads // k.shape[1]
        i, j = torch.arange(total - rows, total)[:, None], torch.arange(total)[None]
        hidden = self.hidden_keys(layer, total)
        weights = torch.empty(heads, rows, total)
        for head in range(heads):
            scores = q[0, head] @ k[0, head // group].T * scaling
            if mask is not None:
                scores = scores + mask[0, 0, :, :total]
            if hidden is not None:
                scores = scores.masked_fill(hidden[None] & (i != j), HIDDEN)
            weights[head] = scores.softmax(-1)
        weights = self.edit_weights(layer, weights, prefill=rows > 1)
        outputs = torch.stack([weights[head] @ v[0, head // group] for head in range(heads)])
        return self.edit_heads(layer, outputs, prefill=rows > 1).transpose(0, 1)[None]


def _dense(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
    return _ACTIVE[-1].attend(module, query, key, value, attention_mask, kwargs["scaling"]).contiguous(), None


AttentionInterface.register(NAME, _dense)
AttentionMaskInterface.register(NAME, eager_mask)


class FastV(OnModel, pruning.Masked):
    """Per picture, the visual tokens to which the last prompt row attends most in layer K - 1; row ends stay."""

    def __init__(
        self, model: Any, per_picture: list[int], row_ends: Tensor, layer: int = 2, keep: float = 0.5
    ) -> None:
        OnModel.__init__(self, model)
        self.per_picture, self.row_ends, self.layer, self.keep = per_picture, row_ends, layer, keep

    def begin(self, inputs: dict[str, Tensor]) -> None:
        """Nothing is dropped yet."""
        self.kept, self.dropped = None, None

    def edit_weights(self, layer: int, weights: Tensor, prefill: bool) -> Tensor:
        """Selects in layer K - 1; changes nothing."""
        if prefill and layer == self.layer - 1:
            row = weights[:, -1].mean(0)
            kept = []
            for positions in self.visual.nonzero()[:, 0].split(self.per_picture):
                ends = [i for i in range(len(positions)) if self.row_ends[positions[i]]]
                cells = [i for i in range(len(positions)) if i not in ends]
                order = sorted(cells, key=lambda i: (-float(row[positions[i]]), i))
                kept.append(positions[sorted(ends + order[: pruning.budget(self.keep, len(cells))])])
            self.kept = kept
            self._drop(self.visual, kept)
        return weights


class Var(OnModel, edits.Var):
    """Redistribution from sinks, see `edits.Var`."""

    def __init__(self, model: Any, **params: Any) -> None:
        OnModel.__init__(self, model)
        stored = edits.Var.__init__.__defaults__ or ()
        names = ("visual_mass_min", "rho_nonsink", "keep", "first_layer", "skip_last", "include_text_sinks",
                 "need_visual_sink")  # fmt: skip
        values = {**dict(zip(names, stored, strict=True)), **params}
        self.dims, self.tau = list(values["sink_dims"]), values["tau"]
        for name in ("visual_mass_min", "rho_nonsink", "keep", "include_text_sinks", "need_visual_sink"):
            setattr(self, name, values[name])
        self.layers = range(values["first_layer"], self.depth - int(values["skip_last"]))
        self.margin, self.edited, self.candidates = float("inf"), 0, 0

    def begin(self, inputs: dict[str, Tensor]) -> None:
        """No sinks known."""
        self.sinks = {}


class LastRow(OnModel, edits.LastRow):
    """Head outputs of the last prompt row."""

    def begin(self, inputs: dict[str, Tensor]) -> None:
        """Nothing recorded."""
        self.rows = {}


class Vhr(OnModel, edits.Vhr):
    """Reinforced heads; the text-only prompt is given, as the family's processor makes it."""

    def __init__(self, model: Any, text_inputs: dict[str, Tensor], alpha: float = 2.0) -> None:
        OnModel.__init__(self, model)
        self.text_inputs, self.alpha, self.filter_outliers = text_inputs, alpha, True
        self.paired, self.squared = False, False
        self.layers = set(range(self.depth - max(1, round(14 * self.depth / 32)), self.depth)) | {1}

    def begin(self, inputs: dict[str, Tensor]) -> None:
        """The text-only stream, without reinforcement."""
        text = LastRow(self.model)
        text.answer(self.text_inputs, torch.tensor([5]))
        self.text_rows, self.selected, self.margin = text.rows, {}, float("inf")
