"""One method pipeline attached to one model: install, per-request state, detach.

Attach is all-or-nothing: whatever was installed before a failure is taken back. Detach restores hooks, instance
attributes and the attention implementation, so that the model is bit-identical afterwards.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from torch import Tensor, nn

from . import draft, dry, probe, profiles, pruning, words
from .attention import interface
from .attention.call import Call
from .capture import Capture, brings_media, by_name
from .contrast import ContrastProcessor
from .edits import Edits
from .encoder import EncoderReader
from .errors import AttachError, UnsupportedError
from .explain import Explanation, explain
from .families import resolve
from .families.base import KINDS
from .guards import check_generate, check_processor
from .installation import Installation
from .profiles import Profile
from .pruner import Pruner
from .readouts.recorder import Recorder
from .recipe import MethodLike, pipeline
from .request import Request
from .stages import Contrast, Edit, Method, Prune, Refine
from .streams import TextStream, read_ahead
from .tokens import TokenMap

_LOCKS: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_ATTACHED: WeakSet[nn.Module] = WeakSet()
_GUARD = threading.Lock()


def lock_of(model: nn.Module) -> threading.RLock:
    """The lock of one model object, shared by every session on it."""
    with _GUARD:
        return _LOCKS.setdefault(model, threading.RLock())


def attach(model: Any, method: MethodLike = None, processor: Any = None, *, profile: Profile | None = None) -> Session:
    """Attaches a method pipeline to a loaded model; use it as a context manager, or call ``detach()``.

    Args:
        model: a transformers vision-language model.
        method: a name, a method object, a mapping, a YAML path, or a list of them (a pipeline).
        processor: the model's processor (only needed for picture geometry).
        profile: per-checkpoint data; by default the one found for the checkpoint's name.

    Raises:
        AttachError: not a supported vision-language model, another model's processor, or attached already.
        ValueError: unknown method, or parameters that do not fit the model.
        MissingProfileError: a method needs per-checkpoint data that was never calibrated.
    """
    return Session(model, method, processor, profile=profile)


class Session:
    """A pipeline on a model. Facts about the newest request stand in ``last``."""

    def __init__(self, model: Any, method: MethodLike, processor: Any = None, *, profile: Profile | None = None):
        self.family = resolve(model)
        self.model, self.processor = model, check_processor(self.family, processor)
        self.info = self.family.info()
        self.profile = profile or profiles.find(self.info.checkpoint, self.info.signature)
        self.methods: tuple[Method, ...] = tuple(m.resolve(self.info, self.profile) for m in pipeline(method))
        windows = [w for n in range(self.info.layers) if (w := self.family.window(n)) is not None]
        self.window: int | None = min(windows, default=None)
        for m in self.methods:
            if m.stage in self.family.refused:
                raise UnsupportedError(f"{m.name} on {self.family.name}: {self.family.refused[m.stage]}")
        self.prune = next((m for m in self.methods if isinstance(m, Prune)), None)
        self.refine = next((m for m in self.methods if isinstance(m, Refine)), None)
        self.contrast = next((m for m in self.methods if isinstance(m, Contrast) and m.active), None)
        self.edits = Edits(self.methods, self.info, [n for n, _ in self.family.attentions()])
        self.request: Request | None = None
        self.image_sizes: list[list[tuple[int, int]]] | None = None
        self.refined = self.attached = False
        self.recorder: Recorder | None = None
        self._suspended = 0
        self._drafted: draft.Drafted | None = None
        self._positions_given = True
        self._dry: int | None = None
        self.capture = Capture(self.family)
        reading = ", ".join(m.name for m in self.methods if isinstance(m, Edit) and m.encoder_scores)
        tap = self.prune.encoder_layer if self.prune else None
        reading = ", ".join(filter(None, (reading, self.prune.name if self.prune and tap is not None else "")))
        self.encoder = EncoderReader(self.model, self.edits.encoder_scores, reading, tap)
        self._lm_start: float | None = None
        self._installed = Installation()
        self._install()

    # --------------------------------------------------------------------------------------------- attach, detach

    def _install(self) -> None:
        with lock_of(self.model):
            if self.model in _ATTACHED:
                raise AttachError(
                    "a session is attached to this model already: detach it first (session.detach(), vlm.close() or "
                    "vlm.set_method(...)), or attach both methods as one list"
                )
            self.backend: str = self.family.lm.config._attn_implementation
            self.pruner = Pruner(self.prune, self.family, self.backend, self._visible, self._dry_run, self.encoder)
            self.sites = self.pruner.sites
            try:
                self._install_on(self._installed)
                probe.check(self)
                self.pruner.time(self)
                self.attached = True
            except BaseException:
                self.detach()
                raise

    def _install_on(self, installed: Installation) -> None:
        family = self.family
        _ATTACHED.add(self.model)
        installed.add(functools.partial(_ATTACHED.discard, self.model))
        installed.attention(family, self.backend, self)
        for number, layer in enumerate(family.layers):
            installed.pre_hook(layer, functools.partial(self._before_layer, number))
        for number, attention in family.attentions():
            if self.pruner.cuts_heads or number in self.edits.gated_layers:
                installed.pre_hook(family.output_projection(attention), functools.partial(self._before_o_proj, number))
        if self.pruner.projector is not None:
            installed.pre_hook(self.pruner.projector, self._before_projector)
        installed.pre_hook(self.model, self._before_model)
        installed.pre_hook(family.base, self._before_base)
        installed.pre_hook(family.lm, self._before_lm)
        installed.hook(family.lm, self._after_lm)
        for kind in KINDS:
            if family.features(kind) is not None:
                features = functools.partial(self._get_features, kind)
                installed.shadow(family.base, f"get_{kind}_features", features)
        pruned = self.pruner.shadows(lambda: None if self._suspended else self._running)
        for owner, name, wrapper in (*family.shadows(lambda: self._running), *pruned):
            installed.shadow(owner, name, wrapper)
        installed.shadow(self.model, "generate", self._generate)

    def detach(self) -> None:
        """Takes everything back; calling it again does nothing."""
        with lock_of(self.model):
            self._installed.undo()
            self.attached, self._suspended, self.recorder = False, 0, None
            self.capture.clear()
            if self.request is not None:
                self.request.prompt_kwargs, self.request.media = {}, {}

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def explain(self) -> Explanation:
        """Per layer, what will run and why; ``print(session.explain())`` shows a table."""
        return explain(self)

    @property
    def last(self) -> Request:
        """State of the newest request: kept tokens, edited rows, scores, times."""
        if self.request is None:
            raise ValueError("no request has run in this session yet")
        return self.request

    @property
    def _running(self) -> Request | None:
        """The request whose prompt has entered the decoder, if any."""
        return self.request if self.request is not None and self.request.prefilled else None

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """Inside, the model runs as if nothing were attached (second branches, probes)."""
        self._suspended += 1
        try:
            yield
        finally:
            self._suspended -= 1

    @contextlib.contextmanager
    def recording(self, recorder: Recorder) -> Iterator[Recorder]:
        """Inside, ``recorder`` receives attention rows; nothing else changes."""
        if self.recorder is not None and not self._suspended:
            raise ValueError("a recording is under way in this session already")
        before, self.recorder = self.recorder, recorder
        try:
            yield recorder
        finally:
            self.recorder = before

    # ------------------------------------------------------------------------------------------------ model hooks

    def _generate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with lock_of(self.model):
            if self._suspended:
                return original(*args, **kwargs)
            kwargs = check_generate(self, args, kwargs)
            self._drafted = None
            if self.edits.drafting is not None:
                i, edit = self.edits.drafting
                self._drafted = draft.run(self, edit, self.edits.layers[i], original, args, kwargs)
            if self.contrast is None or not self.contrast.active:
                return self.capture.generate(original, args, kwargs)
            branch = ContrastProcessor(self, self.contrast)
            kwargs["logits_processor"] = [branch, *(kwargs.get("logits_processor") or [])]
            out = self.capture.generate(original, args, kwargs)
            if not branch.called:
                raise UnsupportedError(
                    f"{self.contrast.name}: the generate() of {type(self.model).__name__} does not pass logits "
                    "processors on, so the second branch took no part; use an edit or a pruning method"
                )
            return out

    def _get_features(self, kind: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._suspended:
            store = self.recorder.media if self.recorder is not None else None
            return self.capture.features(kind, store, original, args, kwargs)
        with self.encoder.reading():
            return self.capture.features(kind, self.capture.media, original, args, kwargs)

    def _before_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._suspended:
            return
        bound = by_name(module, args, kwargs)
        if bound.get("labels") is not None and self.sites:
            raise UnsupportedError(
                "labels cannot be used while tokens are pruned: the logits are shorter than the labels"
            )
        if self._is_prefill(bound.get("past_key_values")):
            self.capture.model_prompt(bound)

    def _before_base(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._suspended:
            return
        bound = by_name(module, args, kwargs)
        self._positions_given = bound.get("position_ids") is not None
        if self._is_prefill(bound.get("past_key_values")):
            self.capture.base_prompt(bound)
        elif self._acts() and brings_media(bound):
            raise UnsupportedError("a later turn brings a new image: send the whole conversation as one prompt")

    def _acts(self) -> bool:
        """Whether some method changes the decoder's forward pass."""
        return any(m.stage in ("prune", "edit") for m in self.methods)

    def _is_prefill(self, cache: Any) -> bool:
        return cache is None or cache.get_seq_length() == 0

    def _begin(self, kwargs: dict[str, Any]) -> Request | None:
        """The request whose prompt enters the decoder now; None when nothing is known about it and nothing acts."""
        prompt, media = self.capture.take()
        rows = kwargs.get("inputs_embeds")
        rows = kwargs.get("input_ids") if rows is None else rows
        if prompt is None or prompt.ids is None or rows is None:
            self.request = None
            if self._acts() and prompt is None:
                raise UnsupportedError("call the model itself, not its decoder, while a method is attached")
            if self._acts():
                raise UnsupportedError(
                    "methods need input_ids to find the visual tokens; inputs_embeds alone cannot do"
                )
            return None
        ids, mask = prompt.repeated(rows.shape[0])
        tokens = self.family.token_map(ids, mask, list(media.values()))
        media = {kind: self.family.placed(m, ids, mask) for kind, m in media.items()}
        request = Request(tokens=tokens, entered=tokens, prompt_kwargs=prompt.kwargs, media=media)
        request.seen, request.prefilled = tokens.length, True
        request.times["encode_s"] = sum(m.seconds for m in media.values())
        request.encoder = self.encoder.take(tokens)
        if self.edits.wants_words:
            names = ", ".join(m.name for m in self.methods if isinstance(m, Edit) and m.wants_words)
            request.words = words.roles(self.processor, ids, tokens, names)
        self.pruner.ask(self.processor, ids, request)
        self.edits.remember_draft(self._drafted, request)
        self._drafted = None
        self.request = request
        if self.edits.text_stream_layers:
            request.text = TextStream(self, ids, mask, self.edits.paired)
            request.times["text_stream_s"] = request.text.seconds
        return request

    # -------------------------------------------------------------------------------------------- decoder hooks

    def _before_lm(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._suspended:
            return None
        cache = kwargs.get("past_key_values")
        rows = kwargs.get("inputs_embeds")
        rows = kwargs.get("input_ids") if rows is None else rows
        queries = rows.shape[1] if isinstance(rows, Tensor) else 0
        if self._is_prefill(cache):
            request = self._begin(kwargs)
            if request is None:
                return None
            self.fits_window(queries)
            self._lm_start = time.perf_counter()
            inputs = self.pruner.enter(request, kwargs)
            if self.edits.reads_ahead is not None:
                read_ahead(self, self.edits.reads_ahead, inputs or kwargs)
            return None if inputs is None else (args, inputs)
        request = self._running
        if request is None:
            if self._acts():
                raise UnsupportedError("this cache was filled before the method was attached: start with a new prompt")
            return None
        entered = request.entered or request.tokens
        past = int(cache.get_seq_length()) if cache is not None else 0
        if past != entered.length + request.seen - request.tokens.length or (
            request.cache_id is not None and request.cache_id != id(cache)
        ):
            raise UnsupportedError(
                "this cache does not belong to the newest request of the session: caches cannot be mixed, cropped or "
                "reused across prompts while a method is attached"
            )
        request.seen += queries
        self.fits_window(request.seen)
        if (pruned := request.stage_at(0)) is None:
            return None
        return args, pruning.lm_decode(pruned, request, kwargs, past, self._positions_given)

    def fits_window(self, length: int) -> None:
        """Sliding-window layers forget keys by physical count: beyond the window nothing here would be exact."""
        if self._acts() and self.window is not None and length > self.window:
            names = ", ".join(m.name for m in self.methods if m.stage in ("prune", "edit"))
            raise UnsupportedError(
                f"{names}: prompt and answer ({length} tokens) exceed the sliding window of {self.window} tokens of "
                "this model's attention; use a shorter prompt, or load the model with a larger sliding_window"
            )

    def _after_lm(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._suspended or self.request is None:
            return
        if self._lm_start is not None:
            self.request.times["prefill_s"] = time.perf_counter() - self._lm_start
            self._lm_start = None
            cache = getattr(output, "past_key_values", None)
            self.request.cache_id = None if cache is None else id(cache)

    def _before_layer(self, number: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        request = self._running
        if self._suspended or request is None or self.family.attention(number) is None:
            return None
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        cache = kwargs.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length(number))
        if past > 0:
            later = self.pruner.decode(number, hidden, kwargs, past, request)
            return None if later is None else (args, later)
        left, inputs = self.pruner.prefill(number, hidden, args, kwargs, request)
        self.edits.prepare(number, left, request)
        if left is hidden and inputs is kwargs:
            return None
        return ((left, *args[1:]), inputs) if args else (args, {**inputs, "hidden_states": left})

    def _before_projector(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._suspended:
            self.pruner.before_projector(module, args, kwargs)

    def _visible(self, tokens: TokenMap) -> Tensor:
        return pruning.visible(tokens, self.family, self.processor, self.image_sizes)

    def _dry_run(self, number: int, *inputs: Any) -> dry.Ahead:
        """The attention call that a layer would make (:func:`dry.attention_call`), without letting it happen."""
        self._dry = number
        try:
            with self.suspended():
                return dry.attention_call(self.family, number, *inputs)
        finally:
            self._dry = None

    # ------------------------------------------------------------------------------------------------- attention

    def attend(
        self,
        base: interface.AttentionFunction,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        kwargs: dict[str, Any],
    ) -> interface.Result:
        """One attention call of one layer (called by the registered function)."""
        layer: int = module.layer_idx
        request = None if self._suspended else self._running
        reading = self.recorder is not None and layer in self.recorder.layers
        stopping = self._dry == layer
        untouched = request is None or (query.shape[2] == 1 < key.shape[2] and layer not in self.edits.decode_layers)
        if untouched and not reading and not stopping:
            return base(module, query, key, value, mask, **kwargs)
        causal = kwargs.get("is_causal")
        if kwargs.get("s_aux") is not None:
            raise UnsupportedError(
                f"{self.family.name}: attention with learned sinks (s_aux) is not supported by edits, pruning scores "
                "and readouts"
            )
        call = Call(
            query=query,
            key=key,
            value=value,
            mask=mask,
            scaling=kwargs["scaling"],
            causal=interface.is_causal(module) if causal is None else bool(causal),
            softcap=kwargs.get("softcap"),
            bias=None,
            backend=self.backend,
        )
        if stopping:
            raise dry.Stopped(call)

        def run(q: Tensor, k: Tensor, v: Tensor, m: Any) -> interface.Result:
            return base(module, q, k, v, m, **kwargs)

        if request is None:
            out, weights = run(query, key, value, mask)
        else:
            call, out, weights = self.edits.attend(layer, call, request, run)
            if call.queries == call.keys:
                self.pruner.read(layer, call, request)
        if reading and self.recorder is not None:
            self.pruner.readable(layer, call, request)
            self.recorder.take(layer, call)
        return out, weights

    def _before_o_proj(self, number: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        request = self._running
        if self._suspended or request is None:
            return None
        x: Tensor = args[0]
        scaled = self.pruner.cut_heads(number, x, request)
        self.edits.choose_factors(number, scaled, request)
        scaled = self.edits.scale_heads(number, scaled, request)
        return None if scaled is x else ((scaled, *args[1:]), kwargs)


__all__ = ["Session", "attach", "lock_of"]
