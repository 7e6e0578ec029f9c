"""Families with merged grids: frames and times, DeepStack, experts by token type, thinned videos, own positions."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import vlm_attn
from tests import geometry_check
from tests.runs import distance, greedy
from vlm_attn.errors import UnsupportedError
from vlm_attn.families.zoo import SPECIMENS, Sample
from vlm_attn.families.zoo.mrope import SPECIMENS as GROUP
from vlm_attn.stages import Contrast, Prune, PruneView, Site, method_dataclass
from vlm_attn.tokens import Layout, TokenMap

ONE = Sample(seed=1)
TWO = Sample(pictures=((56, 84), (112, 56)), seed=2, before=5, after=9)
ALSO = Sample(pictures=((98, 56), (56, 84)), seed=7, before=3, after=7)
TEXT = Sample(pictures=(), seed=3)
FILM = Sample(frames=4, pictures=((56, 84),), seed=4)
SHORT = Sample(frames=2, pictures=((84, 56),), seed=6, before=1)

NAMES = [specimen.name for specimen in GROUP]
HYBRID = ["qwen3_5", "minicpmv4_6"]
PRUNED = [name for name in NAMES if name not in HYBRID]
FILMED = [specimen.name for specimen in GROUP if specimen.video]
# (frames, rows, columns) of the tokens of FILM: two frames make a token in most towers.
FRAMES = dict.fromkeys(FILMED, (2, 6, 4)) | {"video_llama_3": (4, 3, 2)}


@dataclass(frozen=True)
class Still(Sample):
    """A video in which the upper half stands still in the second frame, and everything in the fourth."""

    def video(self) -> np.ndarray:
        frames = super().video()
        frames[1, :28], frames[3] = frames[0, :28], frames[2]
        return frames


STILL = Still(frames=4, seed=4)


@functools.cache
def built(name: str, backend: str = "sdpa") -> Any:
    return SPECIMENS[name].build(backend=backend)


def roles(name: str, *samples: Sample) -> TokenMap:
    """The token map that a session makes of a batch."""
    with vlm_attn.attach(built(name)) as session, torch.no_grad():
        built(name)(**SPECIMENS[name].inputs(samples))
        return session.last.tokens


# ------------------------------------------------------------------------------------------------------------ places


@pytest.mark.parametrize("name", NAMES)
def test_places(name: str) -> None:
    geometry_check.check(SPECIMENS[name], [(56, 56), (112, 70), (50, 90)], draws=3)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "minicpmv4_6"])
def test_rows_know_their_pictures(name: str) -> None:
    tokens = roles(name, TWO, TEXT, ONE)
    assert [[lay.views for lay in row] for row in tokens.layouts] == [[((6, 4),), ((4, 8),)], [], [((4, 4),)]]
    last = tokens.vis[0].nonzero()[-1, 0]
    assert tokens.cell[0, last].tolist() == [3, 7]
    assert tokens.img_id[0, last] == 1


def test_slices() -> None:
    """A large picture is shown whole and in slices; the next picture starts with the token that started the first."""
    tokens = roles("minicpmv4_6", Sample(pictures=((128, 64), (56, 56)), seed=2), TEXT, Sample(pictures=((60, 130),)))
    assert [[lay.views for lay in row] for row in tokens.layouts] == [
        [((3, 6), (4, 4), (4, 4)), ((4, 4),)],
        [],
        [((6, 3), (4, 4), (4, 4))],
    ]
    assert tokens.frame[0][tokens.vis[0]].bincount().tolist() == [18 + 16, 16, 16]


def test_slices_of_frames_are_refused() -> None:
    model, specimen = built("minicpmv4_6"), SPECIMENS["minicpmv4_6"]
    inputs = specimen.inputs([ONE])
    ids = torch.where(inputs["input_ids"] == 99, 100, inputs["input_ids"])
    film = {"pixel_values_videos": inputs["pixel_values"], "target_sizes_videos": inputs["target_sizes"]}
    with vlm_attn.attach(model), pytest.raises(UnsupportedError, match="pass the frames as pictures"):
        model(input_ids=ids, attention_mask=inputs["attention_mask"], **film)


@pytest.mark.parametrize("name", FILMED)
def test_a_video_is_a_view_per_frame(name: str) -> None:
    tokens = roles(name, FILM, TEXT)
    (film,) = tokens.layouts[0]
    frames, rows, columns = FRAMES[name]
    assert film.video
    assert film.views == ((rows, columns),) * frames
    slots = tokens.vis[0].nonzero()[:, 0]
    assert tokens.frame[0, slots].tolist() == [f for f in range(frames) for _ in range(rows * columns)]
    assert tokens.cell[0, slots[rows * columns :][0]].tolist() == [0, 0]


@pytest.mark.parametrize("name", [name for name in FILMED if not name.startswith("glm")])
def test_videos_beside_pictures(name: str) -> None:
    """Some models encode videos with their image function: neither may stand for the other."""
    tokens = roles(name, FILM, ONE, SHORT)
    assert [[lay.video for lay in row] for row in tokens.layouts] == [[True], [False], [True]]
    assert tokens.grids[1] == ((4, 4),)


@pytest.mark.parametrize("name", [name for name in FILMED if not name.startswith("glm")])
def test_a_video_in_generate(name: str) -> None:
    """Features are computed ahead of the prompt, once for each kind; beams repeat the rows.

    The GLM models themselves cannot repeat a video: their ``generate`` looks for the video placeholder.
    """
    inputs = SPECIMENS[name].inputs([FILM, SHORT])
    with vlm_attn.attach(built(name)) as session:
        built(name).generate(**inputs, max_new_tokens=2, num_beams=2)
        assert set(session.last.media) == {"video"}
        layouts = session.last.tokens.layouts
    assert [len(row) for row in layouts] == [1, 1, 1, 1]
    assert layouts[0][0] is layouts[1][0]


def test_thinned_video() -> None:
    """Tokens that repeat the frame before are gone from the prompt; those that stay keep their places."""
    name = "video_llama_3"
    inputs = SPECIMENS[name].inputs([STILL, TEXT])
    tokens = roles(name, STILL, TEXT)
    (film,) = tokens.layouts[0]
    kept = inputs["video_compression_mask"]
    whole = Layout.of_views(*film.views, video=True)
    assert film.views == ((2, 2),) * 4
    assert torch.equal(film.view, whole.view[kept])
    assert torch.equal(film.cell, whole.cell[kept])
    assert film.view.bincount().tolist() == [4, 2, 4, 1]


def test_video_thinned_by_another_rule_is_refused() -> None:
    inputs = SPECIMENS["video_llama_3"].inputs([STILL])
    first = int((inputs["input_ids"] == 100).int().argmax())
    other = inputs["input_ids"].clone()
    other[0, first] = 5  # one placeholder less, and a mask to match
    mask = inputs["video_compression_mask"].clone()
    mask[0] = False
    model = built("video_llama_3")
    with vlm_attn.attach(model), pytest.raises(UnsupportedError, match="use_token_compression=False"):
        model(**{**inputs, "input_ids": other, "video_compression_mask": mask})


@method_dataclass
class Echo(Contrast):
    """A second branch with the same pixels, whose logits count alone."""

    name = "echo"
    summary = "the branch in place of the model"

    def alter_pixels(self, pixels: Tensor) -> Tensor:
        return pixels

    def combine(self, logits: Tensor, branch: Tensor) -> Tensor:
        return branch


@pytest.mark.parametrize(("name", "sample"), [*((name, FILM) for name in FILMED), ("video_llama_3", STILL)])
def test_second_branch_sees_the_video(name: str, sample: Sample) -> None:
    model, inputs = built(name), SPECIMENS[name].inputs([sample, TEXT])
    plain = greedy(model, inputs, steps=3)[2]
    with vlm_attn.attach(model, Echo()):
        assert distance(greedy(model, inputs, steps=3)[2], plain) <= 1e-5
    with vlm_attn.attach(model, vlm_attn.method("vcd")):
        assert distance(greedy(model, inputs, steps=1)[2], plain[:1]) > 1e-3


# ----------------------------------------------------------------------------------------------------------- pruning


@method_dataclass
class Scattered(Prune):
    """Keeps every third visual token from a layer on: rows keep different numbers."""

    name = "scattered"
    summary = "every third visual token"

    layer: int = 2
    again: int | None = None
    """Layer from which on every sixth is left."""

    def sites(self) -> list[Site]:
        return [Site(layer, None) for layer in (self.layer, self.again) if layer is not None]

    def keep_mask(self, view: PruneView) -> Tensor:
        step = 6 if view.site.layer == self.again else 3
        return view.tokens.vis & (view.tokens.index % step == 0)


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("name", PRUNED)
def test_pruning_is_masking(name: str, layer: int) -> None:
    """Dropped tokens are gone as if no later token could see them; DeepStack and experts follow those that stay."""
    model = built(name, "eager")
    # Before layer 0 padding stays, so only rows of like length make the batch shorter.
    inputs = SPECIMENS[name].inputs([TWO, ALSO] if layer == 0 else [TWO, TEXT, ONE])
    with vlm_attn.attach(model, Scattered(layer=layer)) as session:
        tokens, logits, _ = greedy(model, inputs)
        roles, kept = session.last.tokens, session.last.stages[-1].idx
    assert kept.shape[1] < roles.length - 20
    dropped = roles.vis & (roles.index % 3 != 0)
    assert int(dropped.sum()) > 30
    expected = masked(model, inputs, tokens, dropped, layer)
    assert distance(logits, expected) <= 1e-4
    assert distance(greedy(model, inputs)[1][0], expected[0]) > 1e-3


@pytest.mark.parametrize("name", ["qwen3_vl", "ernie4_5_vl_moe"])
def test_two_cuts_are_two_masks(name: str) -> None:
    model = built(name, "eager")
    inputs = SPECIMENS[name].inputs([TWO, ALSO])
    with vlm_attn.attach(model, Scattered(layer=0, again=2)) as session:
        tokens, logits, _ = greedy(model, inputs)
        roles = session.last.tokens
    later = {2: roles.vis & (roles.index % 6 != 0)}
    assert distance(logits, masked(model, inputs, tokens, roles.vis & (roles.index % 3 != 0), 0, later)) <= 1e-4


@pytest.mark.parametrize("name", ["qwen3_vl", "glm4v", "ernie4_5_vl_moe", "video_llama_3"])
def test_pruning_of_frames_is_masking(name: str) -> None:
    model = built(name, "eager")
    for layer, rows in ((0, [STILL, STILL]), (1, [STILL, TEXT, SHORT])):
        inputs = SPECIMENS[name].inputs(rows)
        with vlm_attn.attach(model, Scattered(layer=layer)) as session:
            tokens, logits, _ = greedy(model, inputs)
            roles = session.last.tokens
        dropped = roles.vis & (roles.index % 3 != 0)
        assert distance(logits, masked(model, inputs, tokens, dropped, layer)) <= 1e-4


def masked(
    model: Any,
    inputs: dict[str, Tensor],
    tokens: Tensor,
    dropped: Tensor,
    layer: int,
    later: dict[int, Tensor] | None = None,
) -> Tensor:
    """Logits `[steps, B, V]` of the stock model on the same answer; from `layer` on nobody sees dropped keys.

    `later` names more keys that are out of sight from other layers on.
    """
    prompt = inputs["input_ids"].shape[1]

    def hide(dropped: Tensor, module: Any, args: Any, kwargs: Any) -> Any:
        mask = kwargs["attention_mask"]
        gone = torch.zeros(len(dropped), mask.shape[-1], dtype=torch.bool)
        gone[:, :prompt] = dropped
        return args, {**kwargs, "attention_mask": mask.masked_fill(gone[:, None, None], -1e9)}

    def dictate(ids: Tensor, scores: Tensor) -> Tensor:
        return torch.full_like(scores, -torch.inf).scatter(1, tokens[:, ids.shape[1] - prompt][:, None], 0.0)

    layers = model.get_decoder().layers
    hooks = [
        module.register_forward_pre_hook(functools.partial(hide, gone), with_kwargs=True)
        for start, gone in [(layer, dropped), *(later or {}).items()]
        for module in layers[start:]
    ]
    try:
        return greedy(model, inputs, logits_processor=[dictate])[1]
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("name", HYBRID)
def test_linear_layers_refuse_pruning(name: str) -> None:
    with pytest.raises(UnsupportedError, match="linear-attention"):
        vlm_attn.attach(built(name), Scattered())


def test_positions_counted_from_a_shortened_cache() -> None:
    """A loop without position ids on a model that counts them from the cache gives what ``generate`` gives."""
    model, inputs = built("exaone4_5"), SPECIMENS["exaone4_5"].inputs([TWO])
    with vlm_attn.attach(model, Scattered(layer=0)), torch.no_grad():
        tokens, logits, _ = greedy(model, inputs, steps=3)
        out = model(**inputs, use_cache=True)
        again = [out.logits[:, -1]]
        for step in range(2):
            out = model(input_ids=tokens[:, step : step + 1], past_key_values=out.past_key_values, use_cache=True)
            again.append(out.logits[:, -1])
    assert distance(torch.stack(again), logits) <= 1e-5
