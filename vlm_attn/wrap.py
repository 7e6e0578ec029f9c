"""The one-call object: a model, its processor and a method pipeline behind ``ask``, ``generate`` and ``heatmap``."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from .families import Family
from .images import ImageLike, load_image
from .profiles import BUNDLED, Profile
from .readouts.maps import ModelProbe, attention_map, contrast_map
from .readouts.reader import read
from .readouts.record import DEFAULT, Record
from .readouts.stats import request_stats
from .recipe import MethodLike, dump
from .session import Session, attach, lock_of
from .stages import Method


@dataclass(frozen=True)
class Answer:
    """What ``ask`` returns: the text, its token ids, and what happened on the way.

    ``stats`` keys: ``times`` (seconds: encode_s, prefill_s, decode_s_per_token, total_s, text_stream_s if any),
    ``visual_tokens`` (of the prompt), ``kept_tokens`` ({"mean", "last", "stages": {layer: kept}}), ``kept_cells``
    (per image, (row, column) of the tokens left after the last stage; None without pruning), ``grid`` (per image),
    ``edited_heads`` (sample-head-row triples edited, per layer), ``new_tokens``.
    """

    text: str
    tokens: list[int]
    stats: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.text


class VLM:
    """A wrapped vision-language model. ``model`` stays an ordinary transformers object."""

    def __init__(self, model: Any, processor: Any, method: MethodLike = None, *, profile: Profile | None = None):
        self.model, self.processor = model, processor
        self._profile = profile
        self.session: Session | None = attach(model, method, processor, profile=profile)

    def __enter__(self) -> VLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _live(self) -> Session:
        if self.session is None or not self.session.attached:
            raise ValueError("this VLM is closed: wrap the model again, or call set_method(...)")
        return self.session

    @property
    def family(self) -> Family:
        """The adapter of the model's family."""
        return self._live().family

    @property
    def method(self) -> list[dict[str, Any]]:
        """The attached pipeline as plain data."""
        return dump(self._live().methods)

    @property
    def methods(self) -> tuple[Method, ...]:
        """The attached method objects, model-dependent values filled in."""
        return self._live().methods

    def set_method(self, method: MethodLike) -> VLM:
        """Swaps the pipeline; on an error the old one is attached again."""
        with lock_of(self.model):
            old = self.session.methods if self.session is not None and self.session.attached else ()
            if self.session is not None:
                self.session.detach()
            try:
                self.session = attach(self.model, method, self.processor, profile=self._profile)
            except BaseException:
                self.session = attach(self.model, list(old), self.processor, profile=self._profile)
                raise
        return self

    def close(self) -> None:
        """Detaches; the model is as it was before ``wrap``."""
        if self.session is not None:
            self.session.detach()
            self.session = None

    # ------------------------------------------------------------------------------------------------- asking

    def prompt(self, text: str, images: int = 1) -> str:
        """The chat prompt of one user turn with ``images`` pictures before the text.

        Raises:
            ValueError: the text contains the model's image placeholder.
        """
        placeholder = getattr(self.processor, "image_token", None)
        if not isinstance(text, str) or not text.strip():
            raise ValueError("the question is empty: ask with a non-empty text")
        if placeholder and placeholder in text:
            raise ValueError(
                f"the text contains the image placeholder {placeholder!r}: pass pictures as images, not in the text"
            )
        content = [{"type": "image"}] * images + [{"type": "text", "text": text}]
        if getattr(self.processor, "chat_template", None):
            return self.processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True
            )
        return f"USER: {(placeholder or '<image>') * images}\n{text} ASSISTANT:"

    def inputs(self, images: Sequence[Image.Image], text: str) -> Any:
        """Model inputs of one prompt, on the model's device."""
        prompt = self.prompt(text, len(images))
        batch = self.processor(images=list(images) or None, text=prompt, return_tensors="pt")
        floats = {k for k, v in batch.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
        moved = batch.to(self.model.device)
        for key in floats:
            moved[key] = moved[key].to(self.model.dtype)
        return moved

    def refine(self, image: ImageLike | Sequence[ImageLike], text: str) -> tuple[list[Image.Image], str]:
        """Pictures and text after the Refine method of the pipeline (unchanged when there is none)."""
        session = self._live()
        pictures = [load_image(i) for i in _listed(image)]
        if session.refine is None or not session.refine.active or not pictures:
            return pictures, text
        with lock_of(self.model):
            return session.refine.refine(pictures, text, ModelProbe(self, session))

    def ask(self, image: ImageLike | Sequence[ImageLike] | None, text: str, **generate_kwargs: Any) -> Answer:
        """Asks one question about a picture (or several, or none) and returns the answer with its statistics.

        Args:
            image: PIL image, uint8 array or local path; a list for several pictures; None for text alone.
            text: the question.
            generate_kwargs: anything ``generate`` takes; greedy with at most 64 new tokens by default.
        """
        session = self._live()
        generate_kwargs = {"max_new_tokens": 64, "do_sample": False, **generate_kwargs}
        with lock_of(self.model), _refined(session):
            start = time.perf_counter()
            pictures, text = self.refine(image, text) if image is not None else ([], text)
            refine_s = time.perf_counter() - start
            inputs = self.inputs(pictures, text)
            session.image_sizes = [[p.size for p in pictures]]
            try:
                output = self.model.generate(**inputs, **generate_kwargs)
            finally:
                session.image_sizes = None
            total = time.perf_counter() - start
            sequences = output if isinstance(output, torch.Tensor) else output.sequences
            new = sequences[0, inputs["input_ids"].shape[1] :].tolist()
            answer = self.processor.decode(new, skip_special_tokens=True).strip()
            stats = request_stats(session.last, session.info.layers, len(new), total)
            if session.refine is not None:
                stats["times"]["refine_s"] = refine_s
                stats["images"] = len(pictures)
        return Answer(answer, new, stats)

    def read(
        self,
        image: ImageLike | Sequence[ImageLike] | None,
        text: str,
        what: Sequence[str] | str = DEFAULT,
        **generate_kwargs: Any,
    ) -> Record:
        """Asks one question and returns what the model attended to meanwhile, the pipeline attached.

        Args:
            image, text: as for :meth:`ask`.
            what: readouts (``vlm_attn.readouts.WHAT``).
            generate_kwargs: anything ``generate`` takes; greedy with at most 32 new tokens by default.
        """
        session = self._live()
        with lock_of(self.model), _refined(session):
            pictures, text = self.refine(image, text) if image is not None else ([], text)
            session.image_sizes = [[p.size for p in pictures]]
            try:
                return read(session, self.inputs(pictures, text), what, **generate_kwargs)[0]
            finally:
                session.image_sizes = None

    def generate(self, **inputs: Any) -> Any:
        """``model.generate`` with the pipeline attached: Hugging Face semantics, unchanged."""
        self._live()
        return self.model.generate(**inputs)

    def heatmap(self, image: ImageLike, text: str, kind: str = "contrast", **options: Any) -> np.ndarray:
        """Where the model looks, float32 ``(H, W)`` in original pixels.

        Args:
            kind: ``"contrast"`` (attention for the question divided by attention for a general instruction),
                ``"attention"`` (head-mean attention of the last prompt row, middle-to-late layers), or ``"kept"``
                (1 where the pipeline keeps a visual token, 0 where it drops it).
            options: ``layers`` and, for ``"contrast"``, ``mode``, ``steps``, ``general``.
        """
        session = self._live()
        picture = load_image(image)
        with lock_of(self.model):
            probe = ModelProbe(self, session)
            if kind == "contrast":
                return probe.to_pixels(contrast_map(probe, picture, text, **options), picture)
            if kind == "attention":
                return probe.to_pixels(attention_map(probe, picture, text, **options), picture)
            if kind == "kept":
                return probe.kept(picture, text)
        raise ValueError(f"unknown heatmap kind '{kind}': choose 'contrast', 'attention' or 'kept'")

    def kept_map(self, image: ImageLike, row: int = 0) -> np.ndarray:
        """Which visual tokens the request that ran last kept, as in ``heatmap(kind="kept")``, without asking again.

        Args:
            image: the one picture of the sample.
            row: the sample's place in the batch.

        Raises:
            UnsupportedError: the model's visual tokens have no grid.
        """
        with lock_of(self.model):
            return ModelProbe(self, self._live()).kept_last(load_image(image), row)

    def measure(self, image: ImageLike, text: str, *, rounds: int = 5, **generate_kwargs: Any) -> dict[str, float]:
        """Median times of ``ask`` over ``rounds`` runs after one warm-up, in seconds."""
        if rounds < 1:
            raise ValueError(f"rounds={rounds}: measure at least one run")
        runs = [self.ask(image, text, **generate_kwargs).stats["times"] for _ in range(rounds + 1)][1:]
        return {key: float(np.median([run[key] for run in runs])) for key in runs[0]}


def _listed(image: ImageLike | Sequence[ImageLike]) -> list[ImageLike]:
    if isinstance(image, list | tuple):
        return list(image)
    return [image]  # type: ignore[list-item]


@contextlib.contextmanager
def _refined(session: Session) -> Iterator[None]:
    """Tells the session that pictures went through Refine, so that ``generate`` need not refuse."""
    session.refined = True
    try:
        yield
    finally:
        session.refined = False


def wrap(
    model: Any, method: MethodLike = None, *, processor: Any = None, profile: Profile | None = None, **load_kwargs: Any
) -> VLM:
    """Wraps a vision-language model in one call.

    Args:
        model: hub id, local folder, ``"scenes"`` (the small model that ships with the project), or a loaded model.
        method: a name, a method object, a mapping, a YAML path, or a list of them.
        processor: the processor of a loaded model (loaded by its checkpoint name when absent).
        profile: per-checkpoint data to use instead of the one found by name.
        load_kwargs: passed to ``from_pretrained`` (``dtype``, ``device_map``, ``revision``, ...).

    Raises:
        ValueError: the model cannot be found or carries no method; an unknown or impossible method.
    """
    if not isinstance(model, str | Path):
        if load_kwargs:
            raise TypeError(f"{', '.join(load_kwargs)}: loading options make no sense for a loaded model")
        if processor is None:
            name = str(getattr(model.config, "_name_or_path", "") or "") if hasattr(model, "config") else ""
            processor = _load_processor(name) if name else None
        return VLM(model, processor, method, profile=profile)
    name = str(BUNDLED.get(str(model), model))
    if "://" in name:
        raise ValueError("a model is a hub id, a local folder or 'scenes', not an address")
    trust = {"trust_remote_code": load_kwargs["trust_remote_code"]} if "trust_remote_code" in load_kwargs else {}
    if processor is None:
        processor = AutoProcessor.from_pretrained(name, **trust)
    loaded = AutoModelForImageTextToText.from_pretrained(name, **load_kwargs).eval()
    return VLM(loaded, processor, method, profile=profile)


def _load_processor(name: str) -> Any:
    try:
        return AutoProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"no processor found for '{name}': pass processor=... ({error})") from error
