"""A pruning method at work: reads scores, asks the method at its sites, hands the layers what is left."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import dry, latency, pruning, words
from .attention import interface
from .attention.call import Call
from .encoder import EncoderReader
from .encoder_view import encoder_view
from .errors import UnsupportedError
from .families import Family
from .families.base import Shadow
from .readings import TABLES, Readings
from .request import PruneStage, Request
from .stages import Merged, Prune, PruneView, RowScore
from .tokens import TokenMap

if TYPE_CHECKING:
    from .session import Session

ENCODER, LIVE, QUESTIONS = "vision encoder", "live heads", "questions"
PROJECTORS = ("multi_modal_projector", "aligner")
"""Names of the module that maps single patches to the language model's width."""
Running = Callable[[], Request | None]
DryRun = Callable[[int, Tensor, tuple[Any, ...], dict[str, Any], Tensor], dry.Ahead]


class Pruner:
    """The Prune method of one session, if it has one. Holds no request state: that is passed in and kept there.

    Args:
        visible: bool ``[B, N]`` of a token map, False at visual tokens that show only padding.
        dry_run: the attention call that a layer would make on an input, without letting it happen.
        encoder: reader of the vision encoder, tapped at the method's ``encoder_layer``.
    """

    def __init__(
        self,
        prune: Prune | None,
        family: Family,
        backend: str,
        visible: Callable[[TokenMap], Tensor],
        dry_run: DryRun,
        encoder: EncoderReader,
    ):
        self.prune, self.family, self.backend, self.encoder = prune, family, backend, encoder
        self.latency: latency.Latency | None = None
        self.projected: Tensor | None = None
        self.projector: Any = None
        if prune is not None and prune.encoder_layer is not None:
            self.projector = next((p for n in PROJECTORS if (p := getattr(family.base, n, None)) is not None), None)
            if not isinstance(self.projector, nn.Module) or len(signature(self.projector.forward).parameters) != 1:
                raise UnsupportedError(f"{prune.name} on {family.name}: no projector of single patches was found")
            if prune.shrinks is not None:
                encoder.shrink(prune)
        self.heads = family.info().heads
        self.readings = Readings(prune)
        self.sites = self.readings.sites
        self._visible, self._dry_run = visible, dry_run

    def time(self, session: Session) -> None:
        """Measures prefill times if the budget is one; the session must be installed."""
        if self.prune is not None and self.prune.wants_latency:
            self.latency = latency.measure(session)

    def before_projector(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keeps what the projector receives, ``[P, N, d_v]``, until the prompt enters the decoder."""
        self.projected = args[0] if args else next(iter(kwargs.values()))

    def ask(self, processor: Any, ids: Tensor, request: Request) -> None:
        """Reads the user's question off the prompt ``ids [B, N]``, if the method wants it."""
        if self.prune is not None and self.prune.wants_question:
            request.notes[QUESTIONS] = words.questions(processor, ids, request.tokens, self.prune.name)

    def enter(self, request: Request, kwargs: dict[str, Any]) -> dict[str, Any] | None:
        """The prompt enters the decoder: its arguments after the site at layer 0, None if nothing leaves there."""
        embeds = kwargs.get("inputs_embeds")
        self.readings.begin(request, embeds)
        if self.projector is not None and self.prune is not None and bool(request.tokens.vis.any()):
            features, self.projected = self.projected, None
            tapped, self.encoder.tapped = self.encoder.tapped, None
            shrinker = self.encoder.shrinker
            alive = None if shrinker is None else shrinker.alive
            request.notes[ENCODER] = encoder_view(
                tapped, features, self.encoder.class_token, self.projector, request.tokens, self.prune.name, alive
            )
        cut = self._cut(0, request, embeds)
        request.notes.pop(ENCODER, None)
        self.projected = None  # a method that asked the projector left what it gave
        if cut is None:
            return None
        stage, _, embeds = cut
        request.entered = stage.tokens
        inputs = pruning.lm_prefill(stage, {**kwargs, "inputs_embeds": embeds}, self.backend)
        return self.family.prune_inputs(stage, inputs)

    def prefill(
        self, number: int, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], request: Request
    ) -> tuple[Tensor, dict[str, Any]]:
        """Hidden states and arguments with which a layer runs on the prompt; the same objects if nothing changes."""
        self._read_ahead(self.readings.own(number), number, hidden, args, kwargs, request)
        cut = self._cut(number, request, hidden) if number > 0 else None
        if cut is not None:
            self._left_of_keys(number, cut[1] if cut[2] is hidden else None, request)
            hidden = pruning.take(cut[2], cut[1])
            if self.prune is not None and self.prune.compacts:
                self._compact(cut[0], kwargs.get("past_key_values"), request)
        self._read_ahead(self.readings.bare(number), number, hidden, args, kwargs, request)
        kwargs = self._left(number, hidden, kwargs, request)
        if self.readings.wants_tables(number):
            request.notes[TABLES] = kwargs.get("position_embeddings")
        return hidden, kwargs

    def shadows(self, running: Running) -> Iterator[Shadow]:
        """What a layer that runs dry needs shadowed: its key projection takes over what was projected then."""
        for number in self.readings.ahead():
            if (three := dry.projections(self.family.attention(number))) is not None:
                yield three[1], "forward", functools.partial(_keys, number, running)

    def decode(
        self, number: int, hidden: Tensor, kwargs: dict[str, Any], past: int, request: Request
    ) -> dict[str, Any] | None:
        """Arguments of a later call of a layer, None if they stay."""
        pruned = request.stage_at(number)
        if pruned is None:
            return None
        mask = pruning.decode_mask(pruned, hidden.shape[1], past, self.backend, hidden.dtype)
        return {**pruning.shift_decode(pruned, self.family, hidden, kwargs), "attention_mask": mask}

    def read(self, layer: int, call: Call, request: Request) -> None:
        """Takes the readings of a layer that runs on the prompt."""
        scores = self.readings.passing(layer)
        if scores:
            self.readings.take(scores, call, request, request.notes.pop(TABLES, None))

    @property
    def cuts_heads(self) -> bool:
        """Whether whole heads are silenced, before ``o_proj``."""
        return self.prune is not None and self.prune.cuts_heads

    def cut_heads(self, number: int, x: Tensor, request: Request) -> Tensor:
        """The ``o_proj`` input ``[B, Q, H * d]`` of a layer with the heads silenced that were cut in the prefill."""
        if self.prune is None or not self.cuts_heads:
            return x
        notes, here = request.notes, f"{LIVE} {number}"
        prefill = here not in notes
        live: Tensor | None = notes.get(LIVE) if prefill else notes[here]
        split = x.unflatten(-1, (self.heads, -1))
        if live is not None and not bool(live.all()):
            split = split * live[:, None, :, None]
        if prefill:
            rows = request.tokens_at(number).valid
            without_image = ~request.tokens.vis.any(1, keepdim=True)  # such samples are not pruned at all
            notes[here] = live
            notes[LIVE] = self.prune.live_heads(number, split, rows, notes) | without_image
        return split.flatten(-2)

    def _compact(self, stage: PruneStage, cache: Any, request: Request) -> None:
        """Drops from the caches of the layers before a site what left there."""
        if cache is None:
            return
        pruning.compact(stage, cache, [n for n, _ in self.family.attentions() if n < stage.layer])
        request.compacted, request.entered = stage, stage.tokens

    def readable(self, layer: int, call: Call, request: Request | None) -> None:
        """Refuses readouts of rows behind the prompt whose keys are no longer those that the prompt had.

        Raises:
            UnsupportedError: the layer's cache was compacted.
        """
        stage = None if request is None else request.compacted
        if stage is not None and layer < stage.layer and call.queries != call.keys and self.prune is not None:
            raise UnsupportedError(
                f"{self.prune.name} drops tokens from the cache of layer {layer}, which readouts of generated tokens "
                "cannot follow: use compact=False"
            )

    def _read_ahead(
        self,
        scores: Sequence[RowScore],
        number: int,
        hidden: Tensor,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        request: Request,
    ) -> None:
        """Takes scores off the input of a layer, by running it dry."""
        for score in scores:
            given = self._left(number, hidden, kwargs, request)
            turned = self._without_rope(given) if score.rope == "free" else given
            ahead = self._dry_run(number, hidden, args, turned, self.readings.index(score, request))
            self.readings.take([score], ahead.call, request, given.get("position_embeddings"))
            if ahead.keys is not None:
                request.keys[number] = ahead.keys
                request.spared[number] = 1.0

    def _left_of_keys(self, number: int, slots: Tensor | None, request: Request) -> None:
        """Of the keys that a dry run projected, those of the slots ``[B, n]`` that are left; None: all are others."""
        keys = request.keys.pop(number, None)
        if keys is None:
            return
        if slots is None:
            del request.spared[number]
            return
        request.keys[number] = pruning.take(keys, slots)
        request.spared[number] = slots.shape[1] / keys.shape[1]

    def _left(self, number: int, hidden: Tensor, kwargs: dict[str, Any], request: Request) -> dict[str, Any]:
        """Layer arguments of the prefill on the slots that are left."""
        pruned = request.stage_at(number)
        if pruned is None or pruned.layer == 0:
            return kwargs
        causal = interface.is_causal(self.family.attention(number))
        along = self.family.sequence_arguments
        out = pruning.prefill_inputs(pruned, kwargs, self.backend, hidden.dtype, causal, along)
        if pruned.before is not None:
            pruning.shift_prefill(pruned, self.family, hidden, kwargs, out)
        return out

    def _cut(self, number: int, request: Request, hidden: Any) -> tuple[PruneStage, Tensor, Any] | None:
        """The new stage at a site, its slots among those that arrived, and the hidden states they are taken from."""
        site, prune = self.sites.get(number), self.prune
        if site is None or prune is None:
            return None
        if site.hidden and hidden is None:
            raise UnsupportedError(f"{prune.name} needs the input embeddings, which this model does not show")
        tokens = request.tokens_at(number)
        visible = self._visible(tokens) if prune.wants_padding else None
        scores = request.scores.get(site.score) if site.score else None
        if scores is not None and (len(scores), scores.shape[-1]) != tokens.valid.shape:
            raise ValueError(f"{prune.name}: tokens left between layer {site.score and site.score.layer} and the site")
        shown = hidden if site.hidden else None
        live = request.notes.get(f"{LIVE} {site.score.layer}") if site.score else None
        notes = request.notes
        view = PruneView(
            site,
            tokens,
            scores,
            visible,
            shown,
            notes.get(ENCODER),
            live,
            notes.get(QUESTIONS, ()),
            self.latency,
            notes,
        )
        answer = prune.keep_mask(view)
        keep = answer.keep if isinstance(answer, Merged) else answer
        if isinstance(answer, Merged) and answer.hidden is not None:
            hidden = answer.hidden
        cut = pruning.stage(tokens, keep, number, request.stage_at(number))
        if cut is None:
            return None
        stage, slots = cut
        if prune.positions == "renumber":
            stage = pruning.renumbered(stage, request.tokens if number == 0 else request.entered or request.tokens)
        request.stages.append(stage)
        return stage, slots, hidden

    def _without_rope(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        tables = kwargs.get("position_embeddings")
        if not isinstance(tables, tuple):
            raise UnsupportedError(f"{self.family.name}: attention without rotary positions cannot be read here")
        return {**kwargs, "position_embeddings": (torch.ones_like(tables[0]), torch.zeros_like(tables[1]))}


def _keys(number: int, running: Running, project: dry.Project, hidden: Tensor) -> Tensor:
    """The keys of a layer: those that its dry run projected, if this is the run they wait for."""
    request = running()
    keys = None if request is None else request.keys.pop(number, None)
    return project(hidden) if keys is None else keys
