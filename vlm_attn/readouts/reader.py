"""Reads attention while a model answers, row by row: no matrix of weights is ever held."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..attention.call import Call
from ..attention.rows import chunks
from ..errors import UnsupportedError
from ..profiles import public_name
from ..recipe import dump
from ..request import Request
from ..tokens import TokenMap
from .record import BETWEEN, DEFAULT, FIRST, IMAGE, QUESTION, SYSTEM, Record, checked, ratio
from .recorder import Recorder

if TYPE_CHECKING:
    from ..session import Session

PROMPT_SEGMENTS = 5  # those of record.SEGMENTS that a prompt has


def read(
    session: Session, inputs: Mapping[str, Any], what: Sequence[str] | str = DEFAULT, **generate_kwargs: Any
) -> list[Record]:
    """Generates and returns one :class:`Record` per sample (and per return sequence).

    The session's methods act meanwhile; what they leave of the attention is what is read. Second branches, drafts and
    other passes of a method are not. Greedy with at most 32 new tokens by default; rows behind a sample's end of
    sequence do not count.

    Args:
        inputs: what the processor made, left-padded.
        what: names of :data:`vlm_attn.readouts.WHAT`. ``"vhd"`` adds one pass over the prompt without its images,
            ``"t_vhd"`` lets that pass read the answer too.
        generate_kwargs: anything ``generate`` takes, with a cache and without beams.

    Raises:
        ValueError: a readout that does not exist.
        UnsupportedError: a way of generating in which not every new token has a row of its own, or a model whose
            pictures are no tokens.
    """
    wanted, model, family = checked(what), session.model, session.family
    if "edit" in family.refused:  # what cannot be edited, attention on visual tokens, cannot be read either
        raise UnsupportedError(f"readouts on {family.name}: {family.refused['edit']}")
    settings = {"max_new_tokens": 32, "do_sample": False, **generate_kwargs, "return_dict_in_generate": False}
    config = settings.get("generation_config") or model.generation_config
    if (settings.get("num_beams") or getattr(config, "num_beams", 1) or 1) > 1:
        raise UnsupportedError("readouts follow sequences, not beams: set num_beams=1")
    reader = Reader(session, wanted)
    with torch.no_grad(), session.recording(reader), reader.outputs():
        sequences = model.generate(**inputs, **settings)
    steps = reader.steps
    if steps > sequences.shape[1] or not bool((sequences.shape[1] - steps) in (0, inputs["input_ids"].shape[1])):
        raise UnsupportedError(
            f"{steps} rows were read for a generation of another length: readouts need generate() with its default "
            "cache, without assistants and prefill chunks"
        )
    answers = sequences[:, sequences.shape[1] - steps :]
    ends = settings.get("eos_token_id", getattr(config, "eos_token_id", None))
    return reader.records(inputs, answers, _lengths(answers, ends))


def _lengths(answers: Tensor, ends: Any) -> list[int]:
    """Tokens of each answer up to its end of sequence, that one included."""
    known = torch.as_tensor([] if ends is None else ends, device=answers.device).reshape(-1)
    ended = torch.isin(answers, known.to(answers.dtype))
    return [int(row.nonzero()[0, 0]) + 1 if bool(row.any()) else len(row) for row in ended]


class Reader(Recorder):
    """Takes every attention call of the newest request; a prefill starts its layer anew."""

    def __init__(self, session: Session, what: Sequence[str]):
        super().__init__(number for number, _ in session.family.attentions())
        self.session, self.what = session, tuple(what)
        self.read: dict[int, _Layer] = {}
        self.rows_before: dict[int, list[Tensor]] = {}

    @property
    def steps(self) -> int:
        """Rows read so far that predict a token."""
        return min((len(layer.shares) for layer in self.read.values()), default=0)

    def take(self, layer: int, call: Call) -> None:
        """Called by the engine after each attention call."""
        request = self.session._running
        if self.session._suspended:
            return
        if request is None:
            raise UnsupportedError("readouts need input_ids to find the visual tokens; inputs_embeds alone cannot do")
        if call.queries == call.keys:
            self.read[layer] = _Layer(request.tokens_at(layer).to(call.query.device))
            self._take_question(layer, call, request)
        elif call.queries != 1 or layer not in self.read:
            raise UnsupportedError(
                f"{call.queries} rows came at once behind {call.keys - call.queries} cached ones: readouts follow one "
                "new token at a time, from the prompt on"
            )
        last = torch.tensor([call.queries - 1], device=call.query.device)
        self.read[layer].take_last(self.session.edits.weights(layer, call, last, request)[:, :, 0])

    def _take_question(self, layer: int, call: Call, request: Request) -> None:
        state = self.read[layer]
        rows = state.tokens.qry.any(0).nonzero()[:, 0]
        for part in chunks(rows, len(call.query), call.query.shape[1], call.keys):
            state.take_question(self.session.edits.weights(layer, call, part, request), part, call.visible(part))

    @contextlib.contextmanager
    def outputs(self) -> Iterator[None]:
        """Inside, the last row of every layer's head outputs is kept, as far as a readout wants it."""
        handles = []

        def keep(number: int, module: Any, args: tuple[Any, ...]) -> None:
            if self.session._suspended or self.session._running is None:
                return
            if args[0].shape[1] > 1:
                self.rows_before[number] = []
            rows = self.rows_before.setdefault(number, [])
            if "t_vhd" in self.what or not rows:
                rows.append(args[0][:, -1])

        try:
            if {"vhd", "t_vhd"} & set(self.what):
                # In front of the session's own hook, which scales heads.
                handles = _on_projections(self.session, keep, prepend=True)
            yield
        finally:
            for handle in handles:
                handle.remove()

    def records(self, inputs: Mapping[str, Any], answers: Tensor, lengths: Sequence[int]) -> list[Record]:
        """One record per sample.

        Args:
            answers: int64 ``[B, T]`` new tokens. lengths: how many of them belong to each answer.
        """
        request, session = self.session.last, self.session
        layers = sorted(self.read)
        vhd = self._vhd(layers, inputs, answers)
        about = {
            "checkpoint": public_name(session.info.checkpoint),
            "family": session.family.name,
            "methods": dump(session.methods),
        }
        tokens = request.tokens.to(torch.device("cpu"))
        kinds, places = segments(tokens), torch.cat([tokens.img_id[..., None], tokens.cell], dim=-1)
        found = []
        for row, length in enumerate(lengths):
            valid = tokens.valid[row]
            tensors: dict[str, Tensor | None] = {
                name: torch.stack([getattr(self.read[layer], name)(row).cpu() for layer in layers])
                for name in ("counts", "question", "question_vas")
            }
            tensors["shares"] = torch.stack([self._steps(n, "shares", row, length) for n in layers], dim=1)
            tensors["concentration"] = torch.stack(
                [self._steps(n, "concentration", row, length) for n in layers], dim=1
            )
            tensors["kinds"], tensors["places"] = kinds[row][valid], places[row][valid]
            if "sinks" in self.what:
                found_at = [self.read[n].received(row, tokens.length).cpu() for n in layers]
                tensors["received"] = torch.stack(found_at)[:, valid]
            if vhd is not None:
                tensors["vhd"] = vhd[:length, row]
            given: Any = tensors  # the required ones are always there
            found.append(
                Record(
                    what=self.what,
                    layers=tuple(layers),
                    tokens=tuple(answers[row, :length].tolist()),
                    about=about,
                    **given,
                )
            )
        return found

    def _steps(self, layer: int, name: str, row: int, length: int) -> Tensor:
        return torch.stack([step[row] for step in getattr(self.read[layer], name)[:length]]).cpu()

    def _vhd(self, layers: Sequence[int], inputs: Mapping[str, Any], answers: Tensor) -> Tensor | None:
        """fp32 ``[T, B, L, H]``: divergence of each step's head outputs from those of the text-only stream."""
        if not self.rows_before:
            return None
        steps, batch, heads = len(self.rows_before[layers[0]]), len(answers), self.session.info.heads
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        times = batch // len(ids)
        text = _text_rows(
            self.session,
            ids.repeat_interleave(times, 0),
            None if mask is None else mask.repeat_interleave(times, 0),
            answers[:, : steps - 1],
        )
        gaps = [torch.stack(self.rows_before[n]).float() - text[n].transpose(0, 1).float() for n in layers]
        return torch.stack([gap.reshape(steps, batch, heads, -1).norm(dim=-1).cpu() for gap in gaps], dim=2)


def _text_rows(session: Session, ids: Tensor, mask: Tensor | None, answers: Tensor) -> dict[int, Tensor]:
    """Per layer ``[B, T, H * d]``: head outputs of the last prompt row and of the answer's rows, without the images.

    Raises:
        UnsupportedError: the prompt's rows see the answer, so that one pass cannot stand for a step per token.
    """
    text_ids, text_mask = session.family.text_only(ids, mask)
    prompt = _last_rows(session, text_ids, text_mask, 1)
    if not answers.shape[1]:
        return prompt
    text_ids = torch.cat([text_ids, answers.to(text_ids.dtype)], dim=1)
    text_mask = torch.cat([text_mask, torch.ones_like(answers, dtype=text_mask.dtype)], dim=1)
    rows = _last_rows(session, text_ids, text_mask, answers.shape[1] + 1)
    for number, alone in prompt.items():
        change = (rows[number][:, :1] - alone).abs().max()
        if change > 0.05 * alone.abs().max():
            raise UnsupportedError(
                f"t_vhd: {session.family.name} reads its prompt in both directions, so that the answer changes it; "
                "read 'vhd' instead"
            )
    return rows


def _last_rows(session: Session, ids: Tensor, mask: Tensor, count: int) -> dict[int, Tensor]:
    """The last ``count`` rows of every output projection's input in one unedited pass."""
    kept: dict[int, Tensor] = {}

    def keep(number: int, module: Any, args: tuple[Any, ...]) -> None:
        kept[number] = args[0][:, -count:]

    handles = _on_projections(session, keep)
    try:
        with torch.no_grad(), session.suspended():
            session.family.read_text(ids, mask)
    finally:
        for handle in handles:
            handle.remove()
    return kept


def _on_projections(session: Session, hook: Any, prepend: bool = False) -> list[Any]:
    """Pre-hooks ``hook(layer, module, args)`` on every output projection."""
    family, handles = session.family, []
    for number, attention in family.attentions():

        def bound(module: Any, args: tuple[Any, ...], number: int = number) -> None:
            hook(number, module, args)

        projection = family.output_projection(attention)
        handles.append(projection.register_forward_pre_hook(bound, prepend=prepend))
    return handles


def segments(tokens: TokenMap) -> Tensor:
    """int64 ``[B, N]``: index into :data:`vlm_attn.readouts.SEGMENTS` of every slot, -1 for padding."""
    out = torch.full(tokens.valid.shape, BETWEEN, device=tokens.valid.device)
    for member, segment in ((tokens.sys, SYSTEM), (tokens.qry, QUESTION), (tokens.first, FIRST), (tokens.vis, IMAGE)):
        out[member] = segment
    return out.masked_fill(~tokens.valid, -1)


class _Layer:
    """Sums of one layer over the rows read so far."""

    def __init__(self, tokens: TokenMap):
        self.tokens = tokens
        kinds = segments(tokens)
        self.members = torch.nn.functional.one_hot(kinds + 1, PROMPT_SEGMENTS + 1)[..., 1:].float()
        self.shares: list[Tensor] = []
        self.concentration: list[Tensor] = []
        self._question: Tensor | None = None
        self._ratios: list[Tensor] = []
        self._received = tokens.valid.new_zeros(tokens.valid.shape, dtype=torch.float32)
        self._behind = torch.zeros_like(self._received)
        self._rows = tokens.qry.sum(1)
        self._logs = tokens.vis.sum(1, keepdim=True).float().log()

    def _segments(self, weights: Tensor) -> Tensor:
        """Shares ``[B, H, R, 6]`` of weights ``[B, H, R, N]``."""
        n = self.members.shape[1]
        behind = weights[..., n:].sum(-1, keepdim=True)
        return torch.cat([weights[..., :n] @ self.members[:, None], behind], dim=-1)

    def take_question(self, weights: Tensor, rows: Tensor, visible: Tensor) -> None:
        """Adds prompt rows ``rows [R]``, which see ``visible [B or 1, H or 1, R, N]``; those of other samples do not
        count."""
        counted = self.tokens.qry[:, None, rows, None]
        shares = self._segments(weights)
        system = shares[..., FIRST] + shares[..., SYSTEM]
        self._ratios.append(ratio(shares[..., IMAGE], system).masked_fill(~counted[..., 0], float("nan")))
        total = torch.where(counted, shares, 0.0).sum(2)
        self._question = total if self._question is None else self._question + total
        others = torch.arange(weights.shape[3], device=rows.device) != rows[:, None]
        seeing = counted & visible[:, :1] & others
        self._behind += seeing.sum((1, 2))
        self._received += (weights.mean(1, keepdim=True) * seeing).sum((1, 2))

    def take_last(self, weights: Tensor) -> None:
        """Adds the row ``[B, H, N]`` that predicts the next token."""
        self.shares.append(self._segments(weights[:, :, None])[:, :, 0])
        visual = weights[..., : self.members.shape[1]] * self.tokens.vis[:, None]
        mass = visual.sum(-1)
        p = visual / mass.clamp(min=torch.finfo(torch.float32).tiny)[..., None]
        entropy = -torch.special.xlogy(p, p).sum(-1)
        spread = torch.where(self._logs > 0, entropy / self._logs.clamp(min=1e-12), 0.0)
        self.concentration.append(torch.where(mass > 0, 1 - spread, float("nan")))

    def counts(self, row: int) -> Tensor:
        """int64 ``[5]`` prompt keys per segment."""
        return self.members[row].sum(0).long()

    def question(self, row: int) -> Tensor:
        """``[H, 6]``, NaN without question rows."""
        if self._question is None or not self._rows[row]:
            return torch.full_like(self.shares[0][row], float("nan"))
        return self._question[row] / self._rows[row]

    def question_vas(self, row: int) -> Tensor:
        """``[H]``, mean over the rows in which it is defined."""
        if not self._ratios:
            return torch.full_like(self.shares[0][row, :, 0], float("nan"))
        return torch.cat([part[row] for part in self._ratios], dim=-1).nanmean(-1)

    def received(self, row: int, width: int) -> Tensor:
        """``[width]`` mean weight on each prompt position, NaN where too few rows look back at it."""
        out = self.members.new_full((width,), float("nan"))
        here = self.tokens.valid[row] & (self._behind[row] > 0) & (2 * self._behind[row] >= self._rows[row])
        out[self.tokens.index[row][here]] = (self._received[row] / self._behind[row])[here]
        return out
