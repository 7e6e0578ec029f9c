"""Tiled families: canvases with row ends, tiles of several pictures in one prompt, frames, places of tokens."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import vlm_attn
from tests import geometry_check
from tests.runs import distance, greedy
from vlm_attn.errors import UnsupportedError
from vlm_attn.families import resolve
from vlm_attn.families.anyres import LlavaNext
from vlm_attn.families.zoo import SPECIMENS, Sample, Specimen
from vlm_attn.families.zoo.llava import VideoLlava
from vlm_attn.families.zoo.tiles import Idefics3, LlavaOneVision, PerceptionLM
from vlm_attn.stages import Prune, PruneView, Site, method_dataclass
from vlm_attn.tokens import TokenMap

SIZES = [(56, 56), (100, 50), (61, 113), (120, 118), (150, 201)]
ONE = Sample(seed=1)
TWO = Sample(pictures=((100, 50), (56, 80)), seed=2, before=5, after=9)
TEXT = Sample(pictures=(), seed=3)
FILM = Sample(pictures=((64, 48),), frames=3, seed=4, after=4)

CANVAS = ["llava_next", "llava_next_video", "llava_onevision"]
# Tiles of the two pictures of TWO, the whole picture included.
TILES = {"internvl": (3, 3), "aya_vision": (3, 3), "cohere2_vision": (3, 3), "idefics3": (3, 5), "smolvlm": (3, 5)}


class Margin(Idefics3):
    """Tiles of 60 pixels in patches of 14: four pixels of every tile show nothing."""

    def config(self, **changes: Any) -> Any:
        config = super().config(**changes)
        config.vision_config.image_size = 60
        return config

    def image_processor(self) -> Any:
        images = super().image_processor()
        images.size, images.max_image_size = {"longest_edge": 120}, {"longest_edge": 60}
        return images


class Shrunk(LlavaOneVision):
    """A limit of one tile on the canvas."""

    def config(self, **changes: Any) -> Any:
        config = super().config(**changes)
        config.vision_aspect_ratio = "anyres_max_1"
        return config

    def processor(self) -> Any:
        processor = super().processor()
        processor.vision_aspect_ratio = "anyres_max_1"
        return processor


class FourTiles(PerceptionLM):
    """Up to four tiles, for single pictures."""

    def processor(self) -> Any:
        processor = super().processor()
        processor.image_processor.max_num_tiles = 4
        return processor


@functools.cache
def built(name: str) -> Any:
    return SPECIMENS[name].build()


def token_map(specimen: Specimen | str, *samples: Sample) -> TokenMap:
    """Roles of the tokens of a batch, as a session without methods sees them."""
    known = isinstance(specimen, str)
    specimen, model = (SPECIMENS[specimen], built(specimen)) if known else (specimen, specimen.build())
    with vlm_attn.attach(model) as session:
        session.model(**specimen.inputs(samples))
        return session.last.tokens


# --------------------------------------------------------------------------------------------------------- geometry


@pytest.mark.parametrize("name", ["llava", *CANVAS, *TILES, "perception_lm", "lighton_ocr"])
def test_a_drawn_square_is_found_again(name: str) -> None:
    geometry_check.check(SPECIMENS[name], SIZES, draws=3, share=0.1)


def test_a_drawn_square_is_found_behind_convolutions() -> None:
    geometry_check.check(SPECIMENS["got_ocr2"], SIZES, draws=3, reach=1)


@pytest.mark.parametrize("specimen", [Margin(), Shrunk(), FourTiles()], ids=lambda s: type(s).__name__)
def test_a_drawn_square_is_found_in_unusual_tilings(specimen: Specimen) -> None:
    geometry_check.check(specimen, SIZES, draws=3, share=0.15)


def test_margins_of_tiles_are_not_shown() -> None:
    specimen = Margin()
    layout = token_map(specimen, Sample(pictures=((120, 120),))).layouts[0][0]
    views = resolve(specimen.build()).geometry(specimen.image_processor(), (120, 120), layout)
    assert views[1].cell_box(0, 0) == pytest.approx((60, 0, 88, 28))
    assert views[1].cell_box(0, 1) == pytest.approx((88, 0, 116, 28))
    assert views[4].cell_box(1, 1) == pytest.approx((56, 56, 112, 112))


@pytest.mark.parametrize("name", ["internvl", "cohere2_vision", "idefics3", "smolvlm"])
def test_tiles_cut_by_other_settings_are_an_error(name: str) -> None:
    layout = token_map(name, replace(ONE, pictures=((112, 112),))).layouts[0][0]
    images = SPECIMENS[name].processor().image_processor
    images.max_patches, images.size = 2, {"longest_edge": 168, "height": 56, "width": 56}
    with pytest.raises(ValueError, match="on the image processor itself"):
        resolve(built(name)).geometry(images, (150, 100), layout)


def test_one_of_several_pictures_is_padded_to_a_square() -> None:
    tokens = token_map("llava_onevision", TWO)
    images = SPECIMENS["llava_onevision"].processor().image_processor
    (wide,) = resolve(built("llava_onevision")).geometry(images, (100, 50), tokens.layouts[0][0])
    assert wide.cell_box(0, 0) == (0, -25, 25, 0)
    assert wide.cell_box(2, 3) == (75, 25, 100, 50)


# ---------------------------------------------------------------------------------------------------------- canvases


def packed_coordinates(name: str, size: tuple[int, int]) -> Tensor:
    """``[n, 3]``: (0 base or 1 tile, row, column on the full canvas) of every token, -1 for row ends."""
    model = built(name)
    side, config = 4, model.config
    height, width = best_canvas(size, config.image_grid_pinpoints)
    rows, columns = height // 56, width // 56
    coordinates = torch.zeros(rows * columns + 1, side * side, 3)
    for tile in range(rows * columns + 1):
        for cell in range(side * side):
            at = (0, 0) if tile == 0 else divmod(tile - 1, columns)
            coordinates[tile, cell] = torch.tensor(
                [min(tile, 1), at[0] * side + cell // side, at[1] * side + cell % side]
            )
    extra: dict[str, Any] = {} if name == "llava_onevision" else {"vision_feature_select_strategy": "default"}
    sizes = torch.tensor([size[::-1]])
    packed, _ = model.model.pack_image_features([coordinates], sizes, image_newline=-torch.ones(3), **extra)
    return packed[0].long()


def best_canvas(size: tuple[int, int], pinpoints: list[list[int]]) -> tuple[int, int]:
    """The canvas (height, width) with the most of the picture's pixels and, among those, the least waste."""

    def merit(canvas: list[int]) -> tuple[int, int]:
        scale = min(canvas[1] / size[0], canvas[0] / size[1])
        shown = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
        return shown, shown - canvas[0] * canvas[1]

    height, width = max(pinpoints, key=merit)
    return height, width


@pytest.mark.parametrize("name", CANVAS)
@pytest.mark.parametrize("size", [(90, 61), (40, 113), (112, 112), (100, 50), (300, 70)])
def test_canvas_cells_are_where_the_model_packs_them(name: str, size: tuple[int, int]) -> None:
    layout = token_map(name, replace(ONE, pictures=(size,))).layouts[0][0]
    expected = packed_coordinates(name, size)
    assert torch.equal(layout.view == -1, expected[:, 0] == -1)
    assert bool((layout.view == -1).any())
    assert torch.equal(layout.view[layout.view >= 0], expected[expected[:, 0] >= 0, 0])
    canvas = expected[expected[:, 0] == 1, 1:]
    assert torch.equal(layout.cell[layout.view == 1], canvas - canvas.amin(0))


def test_sizes_that_do_not_fit_the_features_are_an_error() -> None:
    with pytest.raises(ValueError, match="gave 52 visual tokens instead of 36"):
        LlavaNext(built("llava_next")).picture(52, torch.tensor([56, 56]))


# ------------------------------------------------------------------------------------------------- several pictures


@pytest.mark.parametrize("between", [2, 0])
@pytest.mark.parametrize("name", TILES)
def test_tiles_belong_to_their_picture(name: str, between: int) -> None:
    tokens = token_map(name, TEXT, replace(TWO, between=between), ONE)
    assert [len(row) for row in tokens.layouts] == [0, 2, 1]
    views = TILES[name]
    if name == "cohere2_vision":
        views = tuple(len(lay.views) for lay in tokens.layouts[1])
    assert tuple(len(lay.views) for lay in tokens.layouts[1]) == views
    assert tokens.img_id[1][tokens.vis[1]].bincount().tolist() == [4 * n for n in views]
    frames = tokens.frame[1][tokens.vis[1]].tolist()
    assert frames == [view for n in views for view in range(n) for _ in range(4)]
    assert tokens.cell[1][tokens.vis[1]].tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]] * sum(views)


@pytest.mark.parametrize("name", [*TILES, *CANVAS, "idefics2", "got_ocr2", "perception_lm"])
def test_everything_around_a_picture_leaves_with_it(name: str) -> None:
    inputs = SPECIMENS[name].inputs([TWO, TEXT, ONE])
    ids, mask = resolve(built(name)).text_only(inputs["input_ids"], inputs["attention_mask"])
    for row, sample in enumerate((TWO, TEXT, ONE)):
        assert ids[row][mask[row].bool()].tolist() == [word for run in sample.words() for word in run]


@pytest.mark.parametrize("name", ["idefics3", "internvl", "llava_next"])
def test_beams_see_the_same_pictures(name: str) -> None:
    with vlm_attn.attach(built(name)) as session:
        session.model.generate(
            **SPECIMENS[name].inputs([TWO, ONE]), max_new_tokens=2, do_sample=False, num_beams=2, pad_token_id=0
        )
        tokens = session.last.tokens
    assert [len(row) for row in tokens.layouts] == [2, 2, 1, 1]
    assert torch.equal(tokens.img_id[0], tokens.img_id[1])
    assert not torch.equal(tokens.img_id[1], tokens.img_id[2])


# ------------------------------------------------------------------------------------------------------------ videos


@pytest.mark.parametrize(
    ("name", "grid", "ends"),
    [("llava_onevision", (2, 2), 1), ("llava_next_video", (2, 2), 0), ("video_llava", (4, 4), 3)],
)
def test_frames_are_views(name: str, grid: tuple[int, int], ends: int) -> None:
    tokens = token_map(name, TEXT, FILM, ONE)
    (film,) = tokens.layouts[1]
    assert film.video
    assert film.views == (grid,) * 3
    assert int((film.view == -1).sum()) == ends
    shown = tokens.frame[1][tokens.vis[1]]
    assert shown[shown >= 0].bincount().tolist() == [grid[0] * grid[1]] * 3
    assert not tokens.layouts[2][0].video


@pytest.mark.parametrize("name", ["internvl", "smolvlm"])
def test_frames_that_stand_as_pictures_are_pictures(name: str) -> None:
    assert [len(lay.views) for lay in token_map(name, FILM).layouts[0]] == [1, 1, 1]


def test_class_tokens_of_frames_show_nothing() -> None:
    (film,) = token_map(VideoLlava(), FILM).layouts[0]
    assert (film.view == -1).nonzero()[:, 0].tolist() == [0, 17, 34]


def test_perception_lm_refuses_videos() -> None:
    with vlm_attn.attach(built("perception_lm")) as session, pytest.raises(UnsupportedError, match="frames"):
        session.model(**SPECIMENS["perception_lm"].inputs([FILM]))


# ----------------------------------------------------------------------------------------------------------- pruning


@method_dataclass
class Scattered(Prune):
    """Keeps every third visual token from a layer on."""

    name = "scattered"
    summary = "every third visual token"

    layer: int = 2

    def sites(self) -> list[Site]:
        return [Site(self.layer, None)]

    def keep_mask(self, view: PruneView) -> Tensor:
        return view.tokens.vis & (view.tokens.index % 3 == 0)


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("name", ["llava_next", "llava_onevision", "internvl", "smolvlm", "cohere2_vision"])
def test_pruning_is_masking(name: str, layer: int) -> None:
    """Two pictures beside text alone: dropped tokens are gone as if no later token could see them; row ends stay."""
    specimen, model = SPECIMENS[name], SPECIMENS[name].build(backend="eager")
    inputs = specimen.inputs([TWO, TEXT, ONE])
    with vlm_attn.attach(model, Scattered(layer=layer)) as session:
        tokens, logits, _ = greedy(model, inputs)
        roles = session.last.tokens
    dropped = roles.vis & (roles.frame >= 0) & (roles.index % 3 != 0)
    assert int(dropped.sum()) > 10
    assert distance(logits, masked(model, inputs, tokens, dropped, layer)) <= 1e-4


def masked(model: Any, inputs: dict[str, Tensor], tokens: Tensor, dropped: Tensor, layer: int) -> Tensor:
    """Logits ``[steps, B, V]``, without a cache, with dropped keys at minus infinity from ``layer`` on."""
    prompt, steps = inputs["input_ids"].shape[1], tokens.shape[1]
    ids = torch.cat([inputs["input_ids"], tokens[:, :-1]], dim=1)
    mask = torch.cat([inputs["attention_mask"], inputs["attention_mask"].new_ones(len(tokens), steps - 1)], dim=1)
    gone = torch.cat([dropped, dropped.new_zeros(len(tokens), steps - 1)], dim=1)

    def hide(module: Any, args: Any, kwargs: Any) -> Any:
        bias = torch.zeros_like(kwargs["attention_mask"]).masked_fill(gone[:, None, None], -1e9)
        return args, {**kwargs, "attention_mask": kwargs["attention_mask"] + bias}

    layers = model.get_decoder().layers[layer:]
    hooks = [module.register_forward_pre_hook(hide, with_kwargs=True) for module in layers]
    try:
        out = model(
            **{**inputs, "input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(0)}
        )
    finally:
        for hook in hooks:
            hook.remove()
    return out.logits[:, prompt - 1 :].transpose(0, 1)
