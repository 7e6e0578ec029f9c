"""Where visual tokens really lie: a bright square is drawn, and the tokens that change must have boxes over it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from vlm_attn.families import resolve
from vlm_attn.families.base import Family, Media
from vlm_attn.families.zoo import Sample, Specimen
from vlm_attn.geometry import ImageGeometry
from vlm_attn.tokens import Layout

Size = tuple[int, int]
Box = tuple[float, float, float, float]

# Last projections of residual branches, by the names that vision towers give them.
BRANCH_ENDS = ("out_proj", "o_proj", "proj", "projection", "fc2", "linear_fc2", "down_proj", "lin2", "dense")


@dataclass(frozen=True)
class Painted(Sample):
    """A black picture, with a white square where one is given."""

    square: tuple[int, int, int, int] | None = None

    def images(self) -> list[Image.Image]:
        """The one picture."""
        picture = Image.new("RGB", self.pictures[0])
        if self.square is not None:
            picture.paste((255, 255, 255), self.square)
        return [picture]


@torch.no_grad()
def keep_patches_in_place(model: Any) -> None:
    """Zeroes the residual branches of the vision tower: no patch hears of another one."""
    decoder = {id(module) for module in model.get_decoder().modules()}
    for path, module in model.named_modules():
        *above, name = path.split(".")
        inside_a_layer = any(part.isdigit() for part in above)
        if id(module) not in decoder and inside_a_layer and name in BRANCH_ENDS and isinstance(module, nn.Linear):
            module.weight.zero_()
            if module.bias is not None:
                module.bias.zero_()


@torch.no_grad()
def features(model: Any, family: Family, inputs: dict[str, Tensor]) -> tuple[Layout, Tensor]:
    """Layout and features ``[n, D]`` of the one picture of a prompt."""
    seen: list[Media] = []
    original = family.features("image")

    @functools.wraps(original)
    def watch(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        seen.append(Media("image", family.bind("image", args, kwargs), output))
        return output

    family.base.__dict__["get_image_features"] = watch
    try:
        model(**inputs)
    finally:
        del family.base.__dict__["get_image_features"]
    (layout,) = family.token_map(inputs["input_ids"], inputs["attention_mask"], seen).layouts[0]
    flat = torch.cat([part.flatten(0, -2) for part in seen[0].output.pooler_output])
    assert len(flat) == len(layout)
    return layout, flat.float()


def overlap(box: Box, square: tuple[int, int, int, int]) -> bool:
    """Whether two boxes (x0, y0, x1, y1) share some area."""
    across = min(box[2], square[2]) - max(box[0], square[0])
    down = min(box[3], square[3]) - max(box[1], square[1])
    return across > 0 and down > 0


def outline(view: ImageGeometry) -> Box:
    """What a view shows of the picture."""
    rows, columns = view.grid
    return (*view.cell_box(0, 0)[:2], *view.cell_box(rows - 1, columns - 1)[2:])


def check(specimen: Specimen, sizes: Sequence[Size], *, draws: int = 5, share: float = 0.3, reach: int = 0) -> None:
    """In every view that shows the square, the token that changes most has a box over the square.

    Args:
        specimen: the family.
        sizes: original (width, height) of the pictures.
        draws: squares per size.
        share: side of the square as a share of the picture's shorter side.
        reach: cells by which convolutions of the tower carry a patch to its neighbours.
    """
    model = specimen.build()
    keep_patches_in_place(model)
    family = resolve(model)
    images = specimen.processor().image_processor
    draw = np.random.default_rng(0)
    for size in sizes:
        sample = Painted(pictures=(size,))
        layout, black = features(model, family, specimen.inputs([sample]))
        views = family.geometry(images, size, layout)
        assert [view.grid for view in views] == list(layout.views), f"{size}: a geometry per view"
        side = max(int(share * min(size)), 2)
        for _ in range(draws):
            left, top = (int(draw.integers(0, length - side + 1)) for length in size)
            square = (left, top, left + side, top + side)
            if not any(overlap(outline(view), square) for view in views):
                continue  # cropped away
            again, bright = features(model, family, specimen.inputs([replace(sample, square=square)]))
            assert torch.equal(again.view, layout.view), "the layout depends on the size alone"
            change = (bright - black).norm(dim=-1)
            assert bool(change.max() > 0), f"{size}: the square {square} changes nothing"
            for number, view in enumerate(views):
                mine = torch.where(layout.view == number, change, -1.0)
                token = int(mine.argmax())
                row, column = layout.cell[token].tolist()
                if mine[token] > 0.5 * change.max():
                    near, far = view.cell_box(row - reach, column - reach), view.cell_box(row + reach, column + reach)
                    box = (*near[:2], *far[2:])
                    assert overlap(box, square), f"{size}, view {number}, cell {(row, column)}: {box} not at {square}"
