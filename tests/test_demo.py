"""The demo page without a browser: parameters, overlays, uploads, the runner, one press of the button."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio", reason='the demo needs gradio: pip install "vlm-attn[demo]"')

import vlm_attn
from vlm_attn.scenes.world import make_scene
from vlm_attn_demo import overlays, parameters, ui
from vlm_attn_demo.run import MAX_EDGE, Runner, open_upload


@pytest.fixture(scope="module")
def runner() -> Any:
    vlm = vlm_attn.wrap("scenes")
    yield Runner(vlm, "scenes")
    vlm.close()


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return make_scene(19).image


@pytest.mark.parametrize("row", vlm_attn.methods(), ids=lambda row: row.name)
def test_every_method_has_controls_that_give_its_defaults(row: Any) -> None:
    wanted = parameters.parameters(row.cls)
    shown = [parameters.to_control(p) for p in wanted]
    assert [parameters.from_control(p, s) for p, s in zip(wanted, shown)] == [p.default for p in wanted]
    assert vlm_attn.method(row.name, **parameters.values(wanted, shown)) == row.cls()


def test_controls_are_read_as_the_method_types_them() -> None:
    fastv = next(row for row in vlm_attn.methods() if row.name == "fastv")
    wanted = {p.name: p for p in parameters.parameters(fastv.cls)}
    assert wanted["keep"].help.startswith("tokens kept per image")
    assert wanted["layer"].kind == "whole" and wanted["layer"].low == 1
    assert parameters.from_control(wanted["calibrate"], "[pad_mask]") == ("pad_mask",)
    assert parameters.from_control(wanted["keep"], "0.25") == 0.25
    with pytest.raises(ValueError, match="layer needs a whole number, not 1.5"):
        parameters.from_control(wanted["layer"], 1.5)
    with pytest.raises(ValueError, match="layer needs a number"):
        parameters.from_control(wanted["layer"], None)
    with pytest.raises(ValueError, match="keep: '.1' cannot be read"):
        parameters.from_control(wanted["keep"], "[1")


def test_overlays_mark_the_right_places(picture: Image.Image) -> None:
    boxes = {(r, c): (8.0 * c, 8.0 * r, 8.0 * c + 8, 8.0 * r + 8) for r in range(10) for c in range(10)}
    drawn = np.asarray(overlays.kept_overlay(picture, boxes, [(2, 3)], edge=400), np.float32)
    plain = np.asarray(overlays.shown(picture, 400), np.float32)
    assert drawn.shape == (400, 400, 3)
    assert np.array_equal(drawn[82:118, 122:158], plain[82:118, 122:158])
    assert drawn[0:78].mean() < 0.5 * plain[0:78].mean()
    heat = np.zeros((80, 80), np.float32)
    heat[:16, :16] = 1
    warm = np.asarray(overlays.heat_overlay(picture, heat, edge=400), np.float32)
    assert warm[:40, :40, 0].mean() > warm[200:, 200:, 0].mean() + 30
    flat = overlays.heat_overlay(picture, np.zeros((80, 80), np.float32), edge=80)
    assert flat.size == (80, 80)


def make_upload(folder: Path, kind: str) -> Path:
    """A file that a visitor might send."""
    path = folder / f"{kind}.png"
    if kind == "text":
        path.write_text("this is no picture")
    elif kind == "bomb":
        Image.new("1", (15_000, 15_000)).save(path)
    elif kind == "heavy":
        path.write_bytes(bytes(21_000_000))
    else:
        data = io.BytesIO()
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 200, 3), np.uint8)).save(data, "PNG")
        path.write_bytes(data.getvalue()[: 4000 if kind == "truncated" else None])
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [("text", "text.png is not a readable picture"), ("truncated", "truncated"), ("bomb", "more than|too large")],
)
def test_bad_uploads_are_refused_without_naming_the_folder(tmp_path: Path, kind: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        open_upload(make_upload(tmp_path, kind))
    assert str(tmp_path) not in str(caught.value)


def test_uploads_come_upright_and_bounded(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    path = tmp_path / "photo.jpg"
    Image.new("RGB", (3200, 1600), "red").save(path, exif=exif)
    opened = open_upload(path)
    assert opened.mode == "RGB" and opened.size == (MAX_EDGE // 2, MAX_EDGE)


def test_the_runner_streams_and_leaves_the_model_plain(runner: Runner, picture: Image.Image) -> None:
    method = vlm_attn.method("fastv", keep=9)
    replies = [(r.text, r.done) for r in runner.answer(picture, "Describe this image.", method)]
    assert replies[-1][1] and not any(done for _, done in replies[:-1])
    assert runner.vlm.methods == ()
    assert replies[-1][0] == runner.vlm.set_method(method).ask(picture, "Describe this image.").text
    runner.vlm.set_method(None)
    assert len(replies) > 2 and replies[-2][0].strip().startswith(replies[0][0].strip())


def test_a_reader_who_leaves_stops_the_generation(runner: Runner, picture: Image.Image) -> None:
    stream = runner.answer(picture, "Describe this image.", None, 64)
    next(stream)
    stream.close()
    assert not runner._lock.locked()
    assert list(runner.answer(picture, "What place is this?", None, 8))[-1].done


@pytest.mark.parametrize(
    ("question", "message"), [("  ", "Type a question"), ("a" * 501, "at most 500"), ("<image>", "placeholder")]
)
def test_questions_that_cannot_be_asked(runner: Runner, picture: Image.Image, question: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(runner.answer(picture, question, None))


def press(page: Any, runner: Runner, picture: Any, text: str, **chosen: Any) -> list[Any]:
    """The last update of one press of the button, with the page's own defaults for all that is not ``chosen``."""
    call = next(f for f in page.fns.values() if f.name == "run")
    names = [getattr(c, "elem_id", None) for c in call.inputs]
    values = [c.value for c in call.inputs]
    values[:2] = [picture, text]
    for elem_id, value in chosen.items():
        values[names.index(elem_id.replace("__", "-"))] = value
    return list(call.fn(*values))[-1]


def test_one_press_answers_both_sides(runner: Runner, picture: Image.Image) -> None:
    page = ui.build(runner)
    update = press(page, runner, picture, "Describe this image.")
    status, left, _, left_seen, right, right_facts, right_seen, heat = update
    assert "Done." in status and left and right and "50 of 100" in right_facts
    assert right_seen["label"].endswith("50 of 100") and left_seen["label"].endswith("all")
    assert heat.size == (480, 480)


def test_a_refused_parameter_is_said_and_the_other_side_still_answers(runner: Runner, picture: Image.Image) -> None:
    page = ui.build(runner)
    status, left, *_ = press(page, runner, picture, "What place is this?", B__fastv__layer=99)
    assert "Method B: fastv: layer=99 is not a layer" in status and left
    assert "note error" in press(page, runner, None, "hello")[0]


def test_text_from_outside_is_shown_as_text() -> None:
    assert "<img" not in ui.note("error", "<img src=x onerror=alert(1)>")
