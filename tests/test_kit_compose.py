"""Pruning beside others: edits and contrast, several pictures, and packages that shorten caches themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import vlm_attn
from tests import models
from vlm_attn.errors import UnsupportedError
from vlm_attn.families.zoo import SPECIMENS, Sample
from vlm_attn.stages import Prune, PruneView, Site, method_dataclass


class Press:
    """What `with press(model)` of kvpress does: a bound method as forward hook of every attention module."""

    def forward_hook(self, module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        """Would shorten the cache."""
        return output


Press.__module__ = "kvpress.presses.knorm_press"


@pytest.mark.parametrize("pipeline", ["fastv", "divprune", ["fastv", "vcd"], "vhr"])
def test_presses_of_kvpress_are_refused_by_name(pipeline: Any) -> None:
    model, inputs = models.build_llava(4), models.single().inputs()
    layers = model.get_decoder().layers
    handle = layers[2].self_attn.register_forward_hook(Press().forward_hook, with_kwargs=True)
    with vlm_attn.attach(model, pipeline):
        with pytest.raises(UnsupportedError, match="kvpress .Press. is active"):
            model.generate(**inputs, max_new_tokens=2)
        handle.remove()
        model.generate(**inputs, max_new_tokens=2)


# ------------------------------------------------------------------------------------ kept tokens on the picture


@method_dataclass
class Upper(Prune):
    """Keeps the upper half of every view of the first picture, or one whole view, and nothing of other pictures."""

    name = "upper"
    summary = "upper half"

    layer: int = 1
    only: int | None = None

    def sites(self) -> tuple[Site, ...]:
        return (Site(self.layer),)

    def keep_mask(self, view: PruneView) -> Tensor:
        tokens, out = view.tokens, torch.zeros_like(view.tokens.vis)
        for row, layouts in enumerate(tokens.layouts):
            for number, grid in enumerate(layouts[0].views):
                mine = (tokens.img_id[row] == 0) & (tokens.frame[row] == number)
                upper = 2 * tokens.cell[row, :, 0] < grid[0]
                out[row] |= mine & (upper if self.only is None else torch.tensor(number == self.only))
        return out


SQUARE = Sample(pictures=((112, 112),), seed=3)


def drawn(family: str, method: Upper) -> np.ndarray:
    """The map of kept tokens of a square picture."""
    specimen = SPECIMENS[family]
    vlm = vlm_attn.wrap(specimen.build(), method, processor=specimen.processor())
    # Tiny processors have no words; the prompt is theirs.
    vlm.prompt = lambda text, images=1: specimen.prompt(SQUARE)  # type: ignore[method-assign]
    with vlm:
        return vlm.heatmap(SQUARE.images()[0], "what is this", kind="kept")


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl", "qwen3_vl"])
def test_kept_tokens_are_drawn_where_they_lie(family: str, layer: int) -> None:
    """Plain pictures, whole picture beside a canvas, merged grids: the upper half is the upper half."""
    kept = drawn(family, Upper(layer=layer))
    assert kept.shape == (112, 112)
    assert (kept[:40] == 1).mean() > 0.95
    assert (kept[-40:] == 0).mean() > 0.95


@pytest.mark.parametrize("family", ["internvl", "idefics3"])
def test_kept_tokens_of_a_tile_are_drawn_on_the_tile(family: str) -> None:
    """The first tile alone is kept: the upper left quarter."""
    kept = drawn(family, Upper(only=0))
    assert (kept[:50, :50] == 1).all()
    assert not kept[62:].any() and not kept[:, 62:].any()


def test_kept_tokens_of_no_picture_or_several_are_refused() -> None:
    """A map is of one picture; answers carry the kept cells of all."""
    with vlm_attn.wrap(models.llava(4), "fastv", processor=models.tiny_processor()) as vlm:
        pictures = [models.picture(56, 56), models.picture(60, 44, seed=2)]
        with pytest.raises((TypeError, ValueError), match="picture|image"):
            vlm.heatmap(pictures, "w5", kind="kept")
        answer = vlm.ask(pictures, "w5", max_new_tokens=1)
        assert len(answer.stats["kept_cells"]) == 2
