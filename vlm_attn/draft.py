"""A short greedy draft ahead of the answer, for edits that first want to know where the model will look."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .attention.call import Call
from .attention.rows import chunks
from .errors import UnsupportedError
from .readouts.recorder import Recorder
from .stages import Draft, RowEdit

if TYPE_CHECKING:
    from .session import Session

_DROPPED = (
    *("streamer", "stopping_criteria", "logits_processor", "stop_strings"),
    *("max_length", "max_time", "min_length", "min_new_tokens"),
)


@dataclass
class Drafted:
    """A draft and the width of the batch that it was made for."""

    draft: Draft
    batch: int

    def of(self, batch: int) -> Draft:
        """The draft for ``batch`` rows; several return sequences repeat every row."""
        times = batch // self.batch
        if times == 1:
            return self.draft

        def repeat(x: Tensor, dim: int) -> Tensor:
            return x.repeat_interleave(times, dim)

        return Draft(
            steps={n: repeat(x, 1) for n, x in self.draft.steps.items()},
            rows={n: repeat(x, 0) for n, x in self.draft.rows.items()},
            index=self.draft.index,
            counted=repeat(self.draft.counted, 1),
        )


class _Reader(Recorder):
    """Keeps what the edit wants of each draft step, and head-mean weights of the prompt's text rows."""

    def __init__(self, edit: RowEdit, layers: frozenset[int], vis: Tensor, valid: Tensor):
        super().__init__(layers)
        self.edit, self.vis = edit, vis
        text = valid & ~vis & (vis.cumsum(1) > 0)
        self.index = text.any(0).nonzero()[:, 0]
        self.steps: dict[int, list[Tensor]] = {layer: [] for layer in layers}
        self.prompt: dict[int, Tensor] = {}

    def take(self, layer: int, call: Call) -> None:
        """Called after each attention call."""
        n = self.vis.shape[1]
        if call.queries == call.keys:
            parts = chunks(self.index, len(call.query), call.query.shape[1], call.keys)
            self.prompt[layer] = torch.cat([call.weights(part).mean(1) for part in parts], dim=1)
            return
        row = torch.zeros(1, dtype=torch.long, device=call.query.device)
        self.steps[layer].append(self.edit.glance(call.weights(row)[:, :, 0, :n], self.vis))


def run(session: Session, edit: RowEdit, layers: frozenset[int], original: Any, args: Any, kwargs: Any) -> Drafted:
    """Generates ``edit.draft_tokens`` greedy tokens with everything switched off and reads them.

    Raises:
        UnsupportedError: no input ids, or beam search (whose beams would need drafts of their own).
    """
    config = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None) or session.model.generation_config
    ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
    if not isinstance(ids, Tensor):
        raise UnsupportedError(f"{edit.name} drafts from input_ids: pass them to generate")
    beams = kwargs.get("num_beams") or getattr(config, "num_beams", 1) or 1
    if beams > 1:
        raise UnsupportedError(
            f"{edit.name} keeps facts per sequence and does not support beam search: set num_beams=1"
        )
    mask = kwargs.get("attention_mask")
    valid = torch.ones_like(ids).bool() if mask is None else mask.bool()
    placeholders = torch.tensor(list(session.family.placeholders.values()), device=ids.device)
    reader = _Reader(edit, layers, torch.isin(ids, placeholders) & valid, valid)
    short = {k: v for k, v in kwargs.items() if k not in _DROPPED}
    short.update(max_new_tokens=edit.draft_tokens, do_sample=False, num_return_sequences=1, num_beams=1)
    short.update(return_dict_in_generate=False)
    with session.suspended(), session.recording(reader), torch.no_grad():
        out = original(*args, **short)
    new = out[:, ids.shape[1] :]
    ends = kwargs.get("eos_token_id", getattr(config, "eos_token_id", None))
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    ended = torch.isin(new, torch.tensor(ends, device=new.device, dtype=new.dtype)).cumsum(1) > 0
    taken = len(next(iter(reader.steps.values()), []))
    empty = ids.new_zeros((0, *ids.shape), dtype=torch.float32)
    return Drafted(
        Draft(
            steps={n: torch.stack(x) if x else empty for n, x in reader.steps.items()},
            rows=reader.prompt,
            index=reader.index,
            counted=~ended[:, :taken].T,
        ),
        len(ids),
    )
