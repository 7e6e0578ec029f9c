"""VCD as two cache-free forwards per step, and CARVE's map, region and refined picture as plain loops."""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from tests.reference.llava import Dense, image_features

NEAR_CONSTANT = 1e-3


def noise_schedule(steps: int = 1000) -> Tensor:
    """`sqrt(alpha_bar_t)` for t = 0 .. steps - 1, fp64."""
    u = torch.linspace(-6, 6, steps, dtype=torch.float64)
    beta = torch.sigmoid(u) * (0.5e-2 - 1e-5) + 1e-5
    product, values = 1.0, []
    for value in beta.tolist():
        product *= 1 - value
        values.append(math.sqrt(product))
    return torch.tensor(values, dtype=torch.float64)


def add_noise(pixels: Tensor, epsilon: Tensor, step: int) -> Tensor:
    """`x_t = sqrt(abar_t) x + sqrt(1 - abar_t) epsilon` on normalised pixels."""
    root = float(noise_schedule()[step])
    return root * pixels + math.sqrt(1 - root * root) * epsilon


class CacheFree(Dense):
    """Prompt and answer in one forward; a generated placeholder token is a word like any other."""

    def __init__(self, model: nn.Module, prompt: int) -> None:
        super().__init__(model)
        self.prompt = prompt

    def find_visual(self, ids: Tensor) -> Tensor:
        """Placeholders of the prompt."""
        return super().find_visual(ids) & (torch.arange(len(ids)) < self.prompt)


def vcd(
    model: nn.Module, ids: Tensor, pixels: Tensor, noised: Tensor, forced: list[int], alpha: float, beta: float
) -> Tensor:
    """Contrasted logits `[1 + len(forced), V]`; every step re-runs both branches from scratch."""
    plain, altered = image_features(model, pixels), image_features(model, noised)
    rows = []
    for step in range(len(forced) + 1):
        prompt = torch.cat([ids, torch.tensor(forced[:step], dtype=torch.long)])
        logits = CacheFree(model, len(ids)).run(prompt, plain)[0]
        other = CacheFree(model, len(ids)).run(prompt, altered)[0]
        rows.append(contrast(logits, other, alpha, beta))
    return torch.stack(rows)


def contrast(logits: Tensor, other: Tensor, alpha: float, beta: float) -> Tensor:
    """`(1 + a) l - a l'` on the tokens with `l >= max l + log beta`, minus infinity elsewhere."""
    out = (1 + alpha) * logits - alpha * other
    threshold = logits.max() + math.log(beta)
    for token in range(len(out)):
        if logits[token] < threshold:
            out[token] = -math.inf
    return out


class AttentionRows(Dense):
    """Head-mean attention of the last row over the visual tokens: `rows[layer][step]` of shape `[N]`."""

    def run(self, ids: Tensor, features: Tensor | None, forced: list[int] | Tensor = ()) -> Tensor:
        """See `Dense.run`."""
        self.rows: dict[int, list[Tensor]] = {layer: [] for layer in range(self.depth)}
        return super().run(ids, features, forced)

    def edit_weights(self, layer: int, weights: Tensor, prefill: bool) -> Tensor:
        """Reads only."""
        row = weights[:, -1].mean(dim=0)
        self.rows[layer].append(row[: len(self.visual)][self.visual])
        return weights


def carve_grid(
    task: dict[int, list[Tensor]],
    general: dict[int, list[Tensor]],
    layers: list[int],
    grid: tuple[int, int],
    lam: float,
    time: str,
) -> np.ndarray:
    """Sum over layers and steps of `a_Q / (a_G + lambda)` on the grid `[gh, gw]`."""
    steps = min(len(task[layers[0]]), len(general[layers[0]]))
    chosen = {"t_start": [(0, 1)], "t_end": [(steps - 1, 1)], "T_full": [(t, t + 1) for t in range(steps)]}[time]
    total = np.zeros(grid)
    for step, weight in chosen:
        for layer in layers:
            ratio = task[layer][step].double() / (general[layer][step].double() + lam)
            total += weight * ratio.numpy().reshape(grid)
    return total


def upsample(grid: np.ndarray, width: int, height: int) -> np.ndarray:
    """Bilinear, half-pixel centres, edges clamped: `[height, width]`."""
    rows, columns = grid.shape
    out = np.zeros((height, width))

    def taps(index: int, size: int, cells: int) -> tuple[int, int, float]:
        where = min(max((index + 0.5) * cells / size - 0.5, 0.0), cells - 1.0)
        low = min(int(where), cells - 1)
        return low, min(low + 1, cells - 1), where - low

    for y in range(height):
        y0, y1, fy = taps(y, height, rows)
        for x in range(width):
            x0, x1, fx = taps(x, width, columns)
            top = grid[y0, x0] * (1 - fx) + grid[y0, x1] * fx
            bottom = grid[y1, x0] * (1 - fx) + grid[y1, x1] * fx
            out[y, x] = top * (1 - fy) + bottom * fy
    return out


def regions(mask: np.ndarray) -> list[list[tuple[int, int]]]:
    """4-connected components as pixel lists, by flood fill."""
    left = mask.copy()
    found = []
    for y, x in zip(*np.nonzero(mask), strict=True):
        if not left[y, x]:
            continue
        left[y, x] = False
        stack, pixels = [(int(y), int(x))], []
        while stack:
            cy, cx = stack.pop()
            pixels.append((cy, cx))
            for ny, nx in ((cy + 1, cx), (cy - 1, cx), (cy, cx + 1), (cy, cx - 1)):
                if 0 <= ny < mask.shape[0] and 0 <= nx < mask.shape[1] and left[ny, nx]:
                    left[ny, nx] = False
                    stack.append((ny, nx))
        found.append(pixels)
    return found


def carve_mask(score: np.ndarray, share: float, count: int) -> np.ndarray | None:
    """Best `count` regions of the top `share` of pixels; None where the map is (nearly) constant."""
    if score.max() - score.min() < NEAR_CONSTANT * np.abs(score).max():
        return None
    threshold = np.quantile(score, 1 - share)
    found = regions(score >= threshold)
    found.sort(key=lambda pixels: -sum(score[p] for p in pixels))
    mask = np.zeros(score.shape, dtype=bool)
    for pixels in found[:count]:
        for y, x in pixels:
            mask[y, x] = True
    return mask if mask.any() else None


def carve_refine(image: Image.Image, mask: np.ndarray | None) -> Image.Image:
    """Black outside the mask, cropped to its box, enlarged by `max(W / w, H / h)`."""
    if mask is None:
        return image
    pixels = np.asarray(image.convert("RGB")) * mask[..., None]
    ys, xs = np.nonzero(mask)
    crop = pixels[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1].astype(np.uint8)
    height, width = crop.shape[:2]
    scale = max(image.width / width, image.height / height)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return Image.fromarray(crop).resize(size, Image.Resampling.LANCZOS)
