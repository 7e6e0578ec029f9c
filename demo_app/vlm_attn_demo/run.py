"""The model behind the page, and the server in front of it."""

from __future__ import annotations

import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

MAX_EDGE = 1536
"""Uploads are scaled down to this many pixels on their longer side before a session keeps them."""
MAX_UPLOAD = "20mb"
MAX_QUESTION = 500


@dataclass
class Reply:
    """One answer on its way.

    Attributes:
        text: what has been said so far.
        done: whether that is all.
        seconds: time since the question, measured here.
        stats: the facts of `Answer.stats`, once done.
        picture: what a method that changes pictures made of it, once done; None when it left it alone.
    """

    text: str = ""
    done: bool = False
    seconds: float = 0.0
    stats: dict[str, Any] = field(default_factory=dict)
    picture: Image.Image | None = None


class Runner:
    """Asks one model, one question at a time.

    Args:
        vlm: a wrapped model (`vlm_attn.wrap`).
        name: what the page calls it.
    """

    def __init__(self, vlm: Any, name: str) -> None:
        self.vlm, self.name = vlm, name
        self._lock = threading.Lock()

    @classmethod
    def load(cls, model: str) -> Runner:
        """Wraps a model by name and runs it once, so that the first visitor does not pay for the warm-up."""
        import vlm_attn

        runner = cls(vlm_attn.wrap(model), Path(model).name if os.path.isdir(model) else model)
        for _ in runner.answer(Image.new("RGB", (96, 96), (120, 160, 200)), "Describe this image.", None, 2):
            pass
        return runner

    def answer(self, picture: Image.Image, question: str, method: Any, max_new_tokens: int = 64) -> Iterator[Reply]:
        """Streams one answer; the last reply is ``done`` and holds the stats.

        Args:
            picture: RGB picture.
            question: text as a person typed it.
            method: method object, or None for the plain model.
            max_new_tokens: length limit.

        Raises:
            ValueError: whatever the core refuses, in its own words.
        """
        text = question.strip()
        if not text:
            raise ValueError("Type a question first.")
        if len(text) > MAX_QUESTION:
            raise ValueError(f"The question has {len(text)} characters; at most {MAX_QUESTION} are allowed.")
        from transformers import StoppingCriteriaList

        with self._lock:
            self.vlm.set_method(method)
            streamer, gone = _streamer(self.vlm.processor), _Gone()
            result: dict[str, Any] = {}

            def work() -> None:
                try:
                    result["answer"] = self.vlm.ask(
                        picture,
                        text,
                        streamer=streamer,
                        max_new_tokens=max_new_tokens,
                        do_sample=False,
                        stopping_criteria=StoppingCriteriaList([gone]),
                    )
                except Exception as error:
                    result["error"] = error
                finally:
                    streamer.text_queue.put(streamer.stop_signal)

            start = time.perf_counter()
            thread = threading.Thread(target=work, name="vlm-attn-demo-answer", daemon=True)
            thread.start()
            reply = Reply()
            try:
                for piece in streamer:
                    if piece:
                        reply.text, reply.seconds = reply.text + piece, time.perf_counter() - start
                        yield reply
                thread.join()
                seconds = time.perf_counter() - start
                if "error" in result:
                    raise result["error"]
                refined = self._refined(picture, text, method)
            finally:
                gone.set()
                thread.join()
                self.vlm.set_method(None)
        answer = result["answer"]
        yield Reply(answer.text, True, seconds, dict(answer.stats), refined)

    def _refined(self, picture: Image.Image, text: str, method: Any) -> Image.Image | None:
        if getattr(method, "stage", "") != "refine":
            return None
        pictures, _ = self.vlm.refine(picture, text)
        changed = pictures[-1]
        return None if changed.size == picture.size and changed.tobytes() == picture.tobytes() else changed

    def heatmap(self, picture: Image.Image, question: str, kind: str) -> np.ndarray:
        """Where the plain model looks, float ``(H, W)`` in pixels of the picture."""
        with self._lock:
            self.vlm.set_method(None)
            return np.asarray(self.vlm.heatmap(picture, question.strip(), kind=kind), dtype=np.float32)

    def cell_boxes(self, picture: Image.Image, grid: tuple[int, int]) -> dict[tuple[int, int], Any]:
        """(row, column) -> box in pixels of the picture, for every visual token."""
        from vlm_attn.tokens import Layout  # the page appears before torch is loaded

        layout = Layout.of_views(grid)
        geometry = self.vlm.family.geometry(self.vlm.processor.image_processor, picture.size, layout)[0]
        return {(r, c): geometry.cell_box(r, c) for r in range(grid[0]) for c in range(grid[1])}


class _Gone:
    """Stops a generation whose reader has left."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def set(self) -> None:
        self._event.set()

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        import torch

        return torch.full((input_ids.shape[0],), self._event.is_set(), dtype=torch.bool, device=input_ids.device)


def _streamer(processor: Any) -> Any:
    from transformers import TextIteratorStreamer

    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    streamer.text_queue = queue.Queue()
    return streamer


def open_upload(path: str | Path) -> Image.Image:
    """A picture that a visitor sent: upright, RGB, at most ``MAX_EDGE`` pixels a side.

    Raises:
        ValueError: not a picture, damaged, or too large; the message names the file as the visitor knows it.
    """
    from vlm_attn.images import load_image

    try:
        picture = load_image(Path(path))
    except ValueError as error:
        raise ValueError(str(error).replace(str(path), Path(path).name)) from error
    picture = ImageOps.exif_transpose(picture)
    picture.thumbnail((MAX_EDGE, MAX_EDGE), Image.Resampling.LANCZOS)
    return picture


def free_port(host: str) -> int:
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def serve(
    model: str = "scenes",
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    ready: Callable[[str], None] = lambda url: None,
    block: bool = True,
    runner: Runner | None = None,
) -> Any:
    """Serves the page until interrupted.

    Args:
        model: 'scenes', a checkpoint folder or a hub id.
        host: address to listen on; the default is reachable from this machine only.
        port: 0 takes a free one.
        ready: called with the page's address once it answers.
        block: False returns the running page (a Gradio Blocks; ``close()`` stops it).
        runner: a loaded model to use instead of ``model``.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    from vlm_attn_demo.ui import build, launch_options

    page = build(runner or Runner.load(model))
    address = {"server_name": host, "server_port": port or free_port(host)}
    try:
        _, url, _ = page.launch(**address, prevent_thread_lock=True, quiet=True, **launch_options())
    except OSError as error:
        raise ValueError(
            f"cannot listen on {host}:{port}: choose another port, or 0 for a free one ({error})"
        ) from error
    ready(url.rstrip("/"))
    if block:
        try:
            page.block_thread()
        finally:
            page.close()
    return page
