"""The eight kinds of pictures: without the asked thing, and the twin that has it. One function per kind."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from vlm_attn.evaluation.ghost_synth.canvas import SIDE, Box, Canvas, Colour
from vlm_attn.evaluation.ghost_synth.icons import OBJECTS, PERSONS, SCENES, person

__all__ = ["CATEGORIES", "Content", "draw"]

FIRST = ("Anna", "Boris", "Carla", "David", "Elena", "Frank", "Greta", "Henry", "Irene", "Jonas")
LAST = ("Adler", "Brandt", "Costa", "Dunn", "Evans", "Fischer", "Garcia", "Hughes", "Ivers", "Keller")
_INK, _CARD, _LIGHT = (25, 25, 35), (245, 245, 240), (90, 250, 90)
# segments of a digit: top, upper right, lower right, bottom, lower left, upper left, middle
_SEGMENTS = ((0, 0, 1, 0), (1, 0, 1, 0.5), (1, 0.5, 1, 1), (0, 1, 1, 1), (0, 0.5, 0, 1), (0, 0, 0, 0.5),
             (0, 0.5, 1, 0.5))  # fmt: skip
_LIT = {"0": "012345", "1": "12", "2": "01346", "3": "01236", "4": "1256", "5": "02356", "6": "023456", "7": "012",
        "8": "0123456", "9": "012356", "E": "03456", "r": "46", "o": "2346"}  # fmt: skip


@dataclass
class Content:
    """What a picture shows: ``expected`` is the right answer of a twin, ``visible`` the text that may be read off."""

    canvas: Canvas
    target: str
    truth: str
    expected: str = ""
    visible: list[str] = field(default_factory=list)
    setting: str = ""


def draw(category: int, index: int, seed: int, twin: bool) -> Content:
    """The picture ``index`` of a category (1-8); its twin has the same surroundings and the asked thing in it."""
    rng = np.random.default_rng([seed, category, index])
    backdrop = tuple(int(v) for v in rng.integers(60, 200, size=3))
    canvas = Canvas(rng, (backdrop[0], backdrop[1], backdrop[2]))
    content = _DRAW[category](canvas, index, twin)
    _check(content, twin)
    return content


def _check(content: Content, twin: bool) -> None:
    """What is missing by construction must not have been drawn, and a twin must hold it."""
    if (content.target in content.canvas.drawn) != twin:
        wrong = "is missing from a twin" if twin else "was drawn"
        raise RuntimeError(f"{content.target!r} {wrong}: {content.canvas.drawn}")


# ---- 1-3: badges


def _badge(canvas: Canvas, index: int, twin: bool, truth: str, fill: Callable[[Canvas, Box, str], None]) -> Content:
    rng = canvas.rng
    coat = tuple(int(v) for v in rng.integers(20, 120, size=3))
    head, body = (0.3, 0, 0.7, 0.42), (0.05, 1, 0.2, 0.42, 0.8, 0.42, 0.95, 1)
    canvas.put("person", [("ellipse", head, (225, 185, 155)), ("polygon", body, coat)], (20, 10, 428, SIDE))
    left, top = int(rng.integers(110, 150)), int(rng.integers(265, 300))
    card = (left, top, left + 190, top + 110)
    clip = ("rectangle", (0.42, -0.1, 0.58, 0.05), (90, 90, 90))
    canvas.put("badge", [("rectangle", (0, 0, 1, 1), _CARD), clip], card)
    name = f"{rng.choice(FIRST)} {rng.choice(LAST)}"
    line = (left + 10.0, top + 40.0, left + 180.0, top + 74.0)
    if twin:
        canvas.text(name, line, _INK)
        canvas.drawn.append("name")
        return Content(canvas, "name", name, expected=name)
    fill(canvas, line, name)
    return Content(canvas, "name", truth)


def _blurred(canvas: Canvas, index: int, twin: bool) -> Content:
    def fill(canvas: Canvas, line: Box, name: str) -> None:
        canvas.text(name, line, _INK)
        canvas.smear_box(line, len(name))

    return _badge(canvas, index, twin, "Illegible", fill)


def _gibberish(canvas: Canvas, index: int, twin: bool) -> Content:
    def fill(canvas: Canvas, line: Box, name: str) -> None:
        width = (line[2] - line[0]) / 10
        for cell in range(10):
            points = canvas.rng.random((int(canvas.rng.integers(3, 6)), 2)) * (0.8 * width, line[3] - line[1])
            canvas.pen.line([(line[0] + cell * width + x, line[1] + y) for x, y in points], fill=_INK, width=2)
        canvas.drawn.append("pseudo-glyphs")

    return _badge(canvas, index, twin, "Nonsense", fill)


def _blank(canvas: Canvas, index: int, twin: bool) -> Content:
    def fill(canvas: Canvas, line: Box, name: str) -> None:
        if canvas.rng.random() < 0.5:
            canvas.put("stripe", [("rectangle", (0, 0, 1, 0.2), (190, 60, 60))], line)

    return _badge(canvas, index, twin, "Blank", fill)


# ---- 4-6: clocks, gauges, displays


def _time(rng: np.random.Generator) -> tuple[int, int]:
    return int(rng.integers(1, 13)), 5 * int(rng.integers(0, 12))


def _face(canvas: Canvas, name: str) -> None:
    """A round white face with a dark rim, 150 pixels in radius."""
    face = [("ellipse", (0, 0, 1, 1), _INK), ("ellipse", (0.03, 0.03, 0.97, 0.97), _CARD)]
    canvas.put(name, face, (SIDE / 2 - 150, SIDE / 2 - 150, SIDE / 2 + 150, SIDE / 2 + 150))


def _dial(canvas: Canvas, time: tuple[int, int] | None) -> None:
    """A wall clock: hour marks, and either two hands or two fans in their place."""
    centre, radius = SIDE / 2, 150
    _face(canvas, "clock")
    for mark in range(12):
        _ray(canvas, math.tau * mark / 12, 0.82 * radius, 0.94 * radius, _INK, 5)
    if time is None:
        for length, start in ((0.5, int(canvas.rng.integers(0, 360))), (0.75, int(canvas.rng.integers(0, 360)))):
            size = length * radius
            box = (centre - size, centre - size, centre + size, centre + size)
            canvas.pen.pieslice(box, start, start + int(canvas.rng.integers(300, 361)), fill=(200, 200, 200))
        canvas.drawn.append("blurred hands")
        return
    hour, minute = time
    _ray(canvas, math.tau * (hour / 12 + minute / 720), 0, 0.5 * radius, _INK, 10)
    _ray(canvas, math.tau * minute / 60, 0, 0.78 * radius, _INK, 6)
    canvas.drawn.append("time")


def _ray(canvas: Canvas, angle: float, near: float, far: float, colour: Colour, width: int) -> None:
    """A line from the middle outwards; angle 0 is up, clockwise."""
    c, x, y = SIDE / 2, math.sin(angle), -math.cos(angle)
    canvas.pen.line((c + near * x, c + near * y, c + far * x, c + far * y), fill=colour, width=width)


def _digits(canvas: Canvas, text: str, box: Box) -> None:
    """Seven-segment characters; a colon and a period are dots."""
    pen, width = canvas.pen, (box[2] - box[0]) / len(text)
    for place, character in enumerate(text):
        left, top, size, height = box[0] + place * width, box[1], 0.62 * width, box[3] - box[1]
        for dot in {":": (0.3, 0.7), ".": (1.0,)}.get(character, ()):
            x, y = left + 0.3 * size, top + dot * height
            pen.ellipse((x, y - 6, x + 12, y + 6), _LIGHT)
        for segment in map(int, _LIT.get(character, "")):
            x0, y0, x1, y1 = _SEGMENTS[segment]
            pen.line((left + x0 * size, top + y0 * height, left + x1 * size, top + y1 * height), _LIGHT, 9)
    canvas.drawn.append(f"text:{text}")


def _screen(canvas: Canvas, name: str) -> Box:
    """A dark screen; returns the box for characters."""
    canvas.put(name, [("rectangle", (0, 0, 1, 1), (60, 60, 70)), ("rectangle", (0.05, 0.1, 0.95, 0.9), (10, 20, 10))],
               (64, 140, 384, 310))  # fmt: skip
    return (110, 180, 350, 270)


def _readable_screen(canvas: Canvas, name: str, time: tuple[int, int]) -> None:
    _digits(canvas, f"{time[0]}:{time[1]:02d}", _screen(canvas, name))
    canvas.drawn.append("time")


def _stopped(canvas: Canvas, index: int, twin: bool) -> Content:
    time = _time(canvas.rng)
    if index % 2 == 0:
        _dial(canvas, time if twin else None)
    elif twin:
        _readable_screen(canvas, "digital watch", time)
    else:
        box = _screen(canvas, "digital watch")
        _digits(canvas, f"{time[0]}:{time[1]:02d}", box)
        canvas.smear_box((box[0] - 10, box[1] - 10, box[2], box[3] + 10), 5)
    return _clock(canvas, time, twin, "Indeterminate")


def _clock(canvas: Canvas, time: tuple[int, int], twin: bool, truth: str, visible: list[str] | None = None) -> Content:
    shown = f"{time[0]}:{time[1]:02d}"
    return Content(canvas, "time", shown if twin else truth, expected=shown if twin else "", visible=visible or [])


def _gauge(canvas: Canvas, index: int, twin: bool) -> Content:
    time = _time(canvas.rng)
    if twin:
        _dial(canvas, time)
        return _clock(canvas, time, twin, "")
    kind = ("pressure gauge", "barometer", "speedometer", "depth gauge")[index % 4]
    _face(canvas, kind)
    count = int(canvas.rng.integers(5, 8))
    labels = [str(20 * (place + 1)) for place in range(count)]
    for place, label in enumerate(labels):
        angle = math.radians(-112.5 + 225 * place / (count - 1))
        _ray(canvas, angle, 125, 143, _INK, 4)
        x, y = SIDE / 2 + 100 * math.sin(angle), SIDE / 2 - 100 * math.cos(angle)
        canvas.text(label, (x - 20, y - 12, x + 20, y + 12), _INK)
    _ray(canvas, math.radians(float(canvas.rng.uniform(-100, 100))), -20, 110, (200, 40, 40), 6)
    canvas.drawn.append("needle")
    return _clock(canvas, time, twin, f"Not a clock ({kind})", labels)


def _display(canvas: Canvas, index: int, twin: bool) -> Content:
    time = _time(canvas.rng)
    kind = ("monitor", "counter", "checkout display", "scale")[index % 4]
    if twin:
        _readable_screen(canvas, kind, time)
        return _clock(canvas, time, twin, "")
    text = ("37.5", "888", "Error")[int(canvas.rng.integers(0, 3))]
    _digits(canvas, text, _screen(canvas, kind))
    return _clock(canvas, time, twin, f"Not a clock ({kind})", [text])


# ---- 7-8: objects


def _scene(canvas: Canvas, index: int, twin: bool) -> Content:
    setting, target, pieces = SCENES[index % len(SCENES)]
    for name, primitives, (left, top, right, bottom) in pieces:
        canvas.put(name, primitives, (left * SIDE, top * SIDE, right * SIDE, bottom * SIDE))
    return _object(canvas, setting, target, twin, (0.42, 0.62))


def _person(canvas: Canvas, index: int, twin: bool) -> Content:
    role, target, colour, reach = PERSONS[index % len(PERSONS)]
    canvas.put("person", person(colour, reach), (60, 30, 380, 440))
    return _object(canvas, role, target, twin, (0.74, 0.07 + 0.9 * reach - 0.1))


def _object(canvas: Canvas, setting: str, target: str, twin: bool, place: tuple[float, float]) -> Content:
    """The expected object at a place, in the twin; drawn from the generator either way, so that both agree."""
    shift = canvas.rng.uniform(-0.04, 0.04, size=2)
    if twin:
        x, y = (place + shift) * SIDE
        canvas.put(target, OBJECTS[target], (float(x), float(y), float(x) + 90, float(y) + 90))
    truth = target if twin else f"No visible {target}"
    return Content(canvas, target, truth, expected="present" if twin else "", setting=setting)


CATEGORIES: dict[int, str] = {
    1: "text_blur",
    2: "text_gibberish",
    3: "text_blank",
    4: "time_fix",
    5: "analog_decoy",
    6: "digital_decoy",
    7: "scene_schema",
    8: "human_intent",
}
_DRAW: dict[int, Callable[[Canvas, int, bool], Content]] = {
    1: _blurred,
    2: _gibberish,
    3: _blank,
    4: _stopped,
    5: _gauge,
    6: _display,
    7: _scene,
    8: _person,
}
