"""Attention maps on the visual grid: the raw map, and the contrast of two instructions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image

from ..errors import UnsupportedError
from ..stages import Probe
from ..tokens import Layout
from .recorder import Recorder

if TYPE_CHECKING:
    from ..session import Session
    from ..wrap import VLM

GENERAL = "Write a general description of the image."
TimeMode = Literal["t_start", "t_end", "T_full"]


def default_layers(total: int) -> tuple[int, ...]:
    """Layers 20..25, or the span ``[0.62 L, 0.80 L]`` of models with fewer than 26 layers."""
    if total >= 26:
        return tuple(range(20, 26))
    first = int(0.62 * total)
    return tuple(range(first, max(first, min(int(0.80 * total), total - 1)) + 1))


class ModelProbe:
    """Asks the bare model (methods suspended) for attention maps."""

    def __init__(self, vlm: VLM, session: Session):
        self.vlm, self.session = vlm, session
        self.layers = session.info.layers
        self._layout: Layout | None = None

    def maps(self, image: Image.Image, text: str, *, layers: Sequence[int], steps: int) -> np.ndarray:
        """Head-mean attention of the newest row on the picture's visual tokens, float32 ``[steps, layers, n]``."""
        for layer in layers:
            if not 0 <= layer < self.layers:
                raise ValueError(f"layer {layer} does not exist; the model has layers 0..{self.layers - 1}")
        inputs = self.vlm.inputs([image], text)
        recorder = Recorder(layers)
        with self.session.suspended(), self.session.recording(recorder):
            self.vlm.model.generate(**inputs, max_new_tokens=steps, do_sample=False)
        tokens = self.session.family.token_map(
            inputs["input_ids"], inputs.get("attention_mask"), list(recorder.media.values())
        )
        self._layout = tokens.layouts[0][0]
        slots = (tokens.vis[0] & (tokens.img_id[0] == 0)).nonzero()[:, 0]
        return recorder.on(slots).cpu().numpy()

    def to_pixels(self, values: np.ndarray, image: Image.Image, *, stretch: bool = False) -> np.ndarray:
        """Values of the visual tokens of the picture asked about last, ``[n]``, in original pixels ``(H, W)``.

        Where several views show a pixel (whole picture and tile), it gets their mean.
        """
        if self._layout is None:
            raise ValueError("no picture was asked about yet: call maps() first")
        return self._project(values, image, self._layout, stretch)

    def _project(self, values: np.ndarray, image: Image.Image, layout: Layout, stretch: bool = False) -> np.ndarray:
        if not layout.views or layout.video:
            raise UnsupportedError("this model's visual tokens have no grid, so there is no map on the picture")
        processor = getattr(self.vlm.processor, "image_processor", self.vlm.processor)
        total = np.zeros((image.height, image.width), dtype=np.float32)
        seen = np.zeros_like(total)
        view, cell = layout.view.numpy(), layout.cell.numpy()
        for number, box in enumerate(self.session.family.geometry(processor, image.size, layout)):
            grid = np.zeros(box.grid, dtype=np.float32)
            grid[tuple(cell[view == number].T)] = values[view == number]
            total += box.to_pixels(grid, stretch=stretch)
            seen += box.to_pixels(np.ones(box.grid, dtype=np.float32), stretch=stretch)
        return total / np.maximum(seen, 1.0)

    def kept(self, image: Image.Image, text: str) -> np.ndarray:
        """1 where the pipeline keeps a visual token after its last stage, 0 where it drops it, ``(H, W)``."""
        self.vlm.ask(image, text, max_new_tokens=1)
        return self.kept_last(image)

    def kept_last(self, image: Image.Image, row: int = 0) -> np.ndarray:
        """The same of the request that ran last; ``image`` is the first picture of sample ``row``."""
        request = self.session.last
        layout = request.tokens.layouts[row][0]
        left = request.tokens_at(self.layers - 1)
        values = np.zeros(len(layout), dtype=np.float32)
        values[left.order[row][left.vis[row] & (left.img_id[row] == 0)].cpu().numpy()] = 1.0
        # A pixel counts as kept if half of the views that show it keep it; rounding must not decide the tie.
        return (self._project(values, image, layout) >= 0.5 - 1e-4).astype(np.float32)


def attention_map(probe: Probe, image: Image.Image, text: str, *, layers: Sequence[int] | None = None) -> np.ndarray:
    """Head-mean attention of the last prompt row, averaged over layers, float32 ``[n]`` over visual tokens."""
    chosen = tuple(layers) if layers is not None else default_layers(probe.layers)
    return probe.maps(image, text, layers=chosen, steps=1)[0].mean(0)


def contrast_map(
    probe: Probe,
    image: Image.Image,
    text: str,
    *,
    general: str = GENERAL,
    layers: Sequence[int] | None = None,
    mode: TimeMode = "t_end",
    steps: int = 32,
    lam: float = 1e-8,
    lam_rel: float = 0.0,
) -> np.ndarray:
    """Contrast of the task question and a general instruction: ``sum_t w_t sum_l a^Q / (a^G + lambda)``.

    Args:
        mode: ``"t_start"`` the last prompt row only, ``"t_end"`` the last common step, ``"T_full"`` all common steps
            with weights ``t + 1``.
        steps: most new tokens of the two passes.
        lam: lambda; lam_rel: adds ``lam_rel * mean(a^G)`` to it.

    Returns:
        float32 ``[n]`` over the picture's visual tokens.
    """
    if mode not in ("t_start", "t_end", "T_full"):
        raise ValueError(f"unknown time mode '{mode}': choose 't_start', 't_end' or 'T_full'")
    chosen = tuple(layers) if layers is not None else default_layers(probe.layers)
    count = 1 if mode == "t_start" else steps
    question = probe.maps(image, text, layers=chosen, steps=count)
    neutral = probe.maps(image, general, layers=chosen, steps=count)
    common = min(len(question), len(neutral))
    used = [0] if mode == "t_start" else [common - 1] if mode == "t_end" else list(range(common))
    total = np.zeros(question.shape[2:], dtype=np.float64)
    for t in used:
        base = neutral[t].astype(np.float64)
        total += (t + 1) * (question[t] / (base + lam + lam_rel * base.mean(1, keepdims=True))).sum(0)
    return total.astype(np.float32)
