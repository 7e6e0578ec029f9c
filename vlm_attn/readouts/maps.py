"""Attention maps on the visual grid: the raw map, and the contrast of two instructions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image

from ..errors import UnsupportedError
from ..stages import Probe
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

    def _grid(self, tokens: Any) -> tuple[int, int]:
        grid = tokens.grids[0][0] if tokens.images(0) else None
        if grid is None:
            raise UnsupportedError("this model's visual tokens have no grid, so there is no map on the picture")
        return grid

    def maps(self, image: Image.Image, text: str, *, layers: Sequence[int], steps: int) -> np.ndarray:
        """Head-mean attention of the newest row on the picture, float32 ``[steps, layers, rows, columns]``."""
        for layer in layers:
            if not 0 <= layer < self.layers:
                raise ValueError(f"layer {layer} does not exist; the model has layers 0..{self.layers - 1}")
        inputs = self.vlm.inputs([image], text)
        tokens = self.session.family.token_map(inputs["input_ids"], inputs.get("attention_mask"))
        grid = self._grid(tokens)
        recorder = Recorder(layers)
        with self.session.suspended(), self.session.recording(recorder):
            self.vlm.model.generate(**inputs, max_new_tokens=steps, do_sample=False)
        slots = (tokens.vis[0] & (tokens.img_id[0] == 0)).nonzero()[:, 0]
        rows = recorder.on(slots)
        return rows.reshape(rows.shape[0], rows.shape[1], *grid).cpu().numpy()

    def to_pixels(self, grid_map: np.ndarray, image: Image.Image, *, stretch: bool = False) -> np.ndarray:
        """A grid map in original pixels, float32 ``(H, W)``."""
        processor = getattr(self.vlm.processor, "image_processor", self.vlm.processor)
        rows, columns = grid_map.shape
        geometry = self.session.family.geometry(processor, image.size, (rows, columns))
        return geometry.to_pixels(grid_map, stretch=stretch)

    def kept(self, image: Image.Image, text: str) -> np.ndarray:
        """1 where the pipeline keeps a visual token after its last stage, 0 where it drops it, ``(H, W)``."""
        answer = self.vlm.ask(image, text, max_new_tokens=1)
        grid = answer.stats["grid"][0]
        if grid is None:
            raise UnsupportedError("this model's visual tokens have no grid, so there is no map on the picture")
        cells = answer.stats["kept_cells"]
        mask = np.full(grid, 1.0 if cells is None else 0.0, dtype=np.float32)
        for row, column in cells[0] if cells else []:
            mask[row, column] = 1.0
        return (self.to_pixels(mask, image) >= 0.5).astype(np.float32)


def attention_map(probe: Probe, image: Image.Image, text: str, *, layers: Sequence[int] | None = None) -> np.ndarray:
    """Head-mean attention of the last prompt row, averaged over layers, float32 ``[rows, columns]``."""
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
        float32 ``[rows, columns]``.
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
        total += (t + 1) * (question[t] / (base + lam + lam_rel * base.mean((1, 2), keepdims=True))).sum(0)
    return total.astype(np.float32)
