"""Objects and scenes as lists of primitives in the unit square."""

from __future__ import annotations

from vlm_attn.evaluation.ghost_synth.canvas import Primitive

__all__ = ["OBJECTS", "PERSONS", "SCENES", "person"]

RED, GREEN, BLUE, GREY = (200, 40, 40), (50, 140, 60), (40, 80, 190), (120, 120, 120)
BLACK, WHITE, BROWN, YELLOW = (20, 20, 20), (245, 245, 245), (130, 85, 45), (240, 205, 60)
SAND, SKY, SEA, SKIN, GRASS = (225, 200, 140), (160, 205, 240), (40, 120, 190), (230, 190, 160), (90, 165, 70)

OBJECTS: dict[str, list[Primitive]] = {
    "umbrella": [("pieslice", (0, 0, 1, 1), RED, 180, 360), ("line", (0.5, 0.5, 0.5, 1), BLACK)],
    "chalk": [("rectangle", (0, 0.42, 1, 0.58), WHITE), ("rectangle", (0, 0.42, 0.08, 0.58), GREY)],
    "fuel nozzle": [("polygon", (0, 0.3, 0.6, 0.3, 1, 0.9, 0.85, 1, 0.5, 0.5, 0, 0.5), BLACK),
                    ("rectangle", (0, 0.5, 0.25, 1), RED)],
    "wheelchair": [("ellipse", (0.15, 0.4, 0.75, 1), BLACK), ("ellipse", (0.22, 0.47, 0.68, 0.93), WHITE),
                   ("rectangle", (0.2, 0.35, 0.85, 0.48), BLUE), ("rectangle", (0.15, 0, 0.27, 0.45), BLUE)],
    "keyboard": [("rectangle", (0, 0.3, 1, 0.7), BLACK),
                 *[("rectangle", (0.05 + 0.1 * i, 0.36 + 0.11 * j, 0.12 + 0.1 * i, 0.43 + 0.11 * j), WHITE)
                   for i in range(9) for j in range(3)]],
    "frisbee": [("ellipse", (0, 0.3, 1, 0.7), RED), ("ellipse", (0.2, 0.38, 0.8, 0.62), YELLOW)],
    "cup": [("polygon", (0.1, 0.1, 0.75, 0.1, 0.65, 1, 0.2, 1), BLUE), ("ellipse", (0.1, 0, 0.75, 0.2), WHITE)],
    "candle": [("rectangle", (0.38, 0.35, 0.62, 1), WHITE), ("ellipse", (0.4, 0, 0.6, 0.35), YELLOW)],
    "ball": [("ellipse", (0, 0, 1, 1), RED), ("pieslice", (0, 0, 1, 1), WHITE, 300, 360)],
    "ice cream": [("polygon", (0.2, 0.45, 0.8, 0.45, 0.5, 1), BROWN), ("ellipse", (0.15, 0, 0.85, 0.6), WHITE)],
    "knife": [("polygon", (0, 0.4, 0.65, 0.4, 0.65, 0.6, 0.15, 0.6), GREY), ("rectangle", (0.65, 0.4, 1, 0.6), BROWN)],
    "stethoscope": [("line", (0.2, 0, 0.3, 0.5, 0.7, 0.5, 0.8, 0), BLACK), ("line", (0.5, 0.5, 0.5, 0.8), BLACK),
                    ("ellipse", (0.35, 0.7, 0.65, 1), GREY)],
    "fire extinguisher": [("rectangle", (0.25, 0.25, 0.75, 1), RED), ("rectangle", (0.4, 0.05, 0.6, 0.25), BLACK)],
    "gun": [("rectangle", (0, 0.25, 1, 0.45), BLACK),
            ("polygon", (0.65, 0.45, 0.95, 0.45, 1, 0.95, 0.75, 0.95), BLACK)],
    "radio": [("rectangle", (0.25, 0.3, 0.75, 1), BLACK), ("line", (0.65, 0.3, 0.65, 0), BLACK),
              ("rectangle", (0.35, 0.4, 0.65, 0.55), GREEN)],
    "earbuds": [("ellipse", (0.1, 0.2, 0.45, 0.55), WHITE), ("ellipse", (0.55, 0.2, 0.9, 0.55), WHITE),
                ("line", (0.27, 0.5, 0.5, 1, 0.73, 0.5), WHITE)],
    "microphone": [("ellipse", (0.25, 0, 0.75, 0.45), GREY),
                   ("polygon", (0.35, 0.42, 0.65, 0.42, 0.55, 1, 0.45, 1), BLACK)],
    "remote control": [("rectangle", (0.3, 0, 0.7, 1), BLACK),
                       *[("ellipse", (0.4, 0.1 + 0.2 * i, 0.6, 0.22 + 0.2 * i), GREY) for i in range(4)]],
    "camera": [("rectangle", (0, 0.25, 1, 0.9), BLACK), ("ellipse", (0.3, 0.35, 0.7, 0.8), GREY),
               ("rectangle", (0.6, 0.1, 0.85, 0.25), BLACK)],
}  # fmt: skip
"""Object -> its drawing."""


def person(colour: tuple[int, int, int], reach: float = 0.5) -> list[Primitive]:
    """A figure in one colour whose right hand is at height ``reach`` (0 up, 1 down), empty."""
    return [
        ("ellipse", (0.36, 0, 0.6, 0.2), SKIN), ("rectangle", (0.34, 0.2, 0.62, 0.62), colour),
        ("rectangle", (0.36, 0.62, 0.46, 1), BLACK), ("rectangle", (0.5, 0.62, 0.6, 1), BLACK),
        ("line", (0.36, 0.24, 0.16, 0.58), colour), ("line", (0.6, 0.24, 0.88, reach), colour),
        ("ellipse", (0.84, reach - 0.04, 0.96, reach + 0.04), SKIN),
    ]  # fmt: skip


DOG: list[Primitive] = [("rectangle", (0.1, 0.3, 0.7, 0.65), BROWN), ("ellipse", (0.6, 0.1, 1, 0.5), BROWN),
                        ("rectangle", (0.12, 0.6, 0.22, 1), BROWN),
                        ("rectangle", (0.58, 0.6, 0.68, 1), BROWN)]  # fmt: skip
BEACH: list[Primitive] = [("rectangle", (0, 0, 1, 0.4), SKY), ("rectangle", (0, 0.4, 1, 0.6), SEA),
                          ("rectangle", (0, 0.6, 1, 1), SAND),
                          ("ellipse", (0.75, 0.05, 0.9, 0.2), YELLOW)]  # fmt: skip
FIELD: list[Primitive] = [("rectangle", (0, 0, 1, 0.45), SKY), ("rectangle", (0, 0.45, 1, 1), GRASS)]
STREET: list[Primitive] = [("rectangle", (0, 0, 1, 0.6), SKY), ("rectangle", (0, 0.6, 1, 1), GREY),
                           ("rectangle", (0.02, 0.15, 0.25, 0.6), BROWN),
                           ("rectangle", (0.75, 0.1, 0.98, 0.6), RED)]  # fmt: skip
ROOM: list[Primitive] = [("rectangle", (0, 0, 1, 0.7), (225, 225, 210)), ("rectangle", (0, 0.7, 1, 1), BROWN)]

Piece = tuple[str, list[Primitive], tuple[float, float, float, float]]

BACKDROP = (0, 0, 1, 1)
BOARD: list[Primitive] = [("rectangle", (0, 0, 1, 1), (30, 80, 60))]
PUMP: list[Primitive] = [("rectangle", (0, 0, 1, 1), RED), ("rectangle", (0.2, 0.1, 0.8, 0.4), BLACK)]
BED: list[Primitive] = [("rectangle", (0, 0.4, 1, 0.7), WHITE), ("rectangle", (0, 0.1, 0.08, 1), GREY),
                        ("rectangle", (0.92, 0.4, 1, 1), GREY)]  # fmt: skip
DESK: list[Primitive] = [("rectangle", (0, 0, 1, 0.2), BROWN), ("rectangle", (0.05, 0.2, 0.12, 1), BROWN),
                         ("rectangle", (0.88, 0.2, 0.95, 1), BROWN)]  # fmt: skip
MONITOR: list[Primitive] = [("rectangle", (0, 0, 1, 0.75), BLACK), ("rectangle", (0.4, 0.75, 0.6, 1), GREY)]
BLANKET: list[Primitive] = [("polygon", (0.15, 0, 0.85, 0, 1, 1, 0, 1), RED)]
CAKE: list[Primitive] = [("rectangle", (0, 0.3, 1, 1), (240, 200, 205)), ("rectangle", (0, 0.2, 1, 0.4), WHITE)]
PLANK: list[Primitive] = [("rectangle", (0, 0, 1, 1), BROWN)]

SCENES: list[tuple[str, str, list[Piece]]] = [
    ("beach", "umbrella", [("beach", BEACH, BACKDROP)]),
    ("classroom", "chalk", [("room", ROOM, BACKDROP), ("board", BOARD, (0.1, 0.1, 0.9, 0.55))]),
    ("gas station", "fuel nozzle", [("street", STREET, BACKDROP), ("pump", PUMP, (0.4, 0.3, 0.6, 0.8))]),
    ("hospital", "wheelchair", [("room", ROOM, BACKDROP), ("bed", BED, (0.08, 0.4, 0.6, 0.8))]),
    ("office", "keyboard", [("room", ROOM, BACKDROP), ("desk", DESK, (0.1, 0.6, 0.9, 0.95)),
                            ("monitor", MONITOR, (0.35, 0.3, 0.65, 0.6))]),
    ("beach with a person and a dog", "frisbee", [("beach", BEACH, BACKDROP), ("dog", DOG, (0.6, 0.65, 0.85, 0.85)),
                                                  ("person", person(BLUE), (0.1, 0.35, 0.35, 0.85))]),
    ("picnic", "cup", [("field", FIELD, BACKDROP), ("blanket", BLANKET, (0.15, 0.6, 0.85, 0.92)),
                       ("basket", PLANK, (0.2, 0.55, 0.4, 0.75))]),
    ("birthday", "candle", [("room", ROOM, BACKDROP), ("table", PLANK, (0.1, 0.72, 0.9, 0.8)),
                            ("cake", CAKE, (0.3, 0.5, 0.7, 0.72))]),
    ("field with a person and a dog", "ball", [("field", FIELD, BACKDROP), ("dog", DOG, (0.6, 0.6, 0.88, 0.82)),
                                               ("person", person(RED), (0.1, 0.3, 0.38, 0.85))]),
    ("street with two people", "ice cream", [("street", STREET, BACKDROP),
                                             ("person", person(GREEN), (0.15, 0.4, 0.4, 0.95)),
                                             ("person", person(BLUE), (0.5, 0.4, 0.75, 0.95))]),
]  # fmt: skip
"""Scene, the object that one expects there and that is missing, and what is drawn."""

PERSONS: list[tuple[str, str, tuple[int, int, int], float]] = [
    ("chef", "knife", WHITE, 0.5), ("doctor", "stethoscope", (200, 225, 240), 0.35),
    ("firefighter", "fire extinguisher", (200, 150, 40), 0.6), ("police officer", "gun", (25, 35, 90), 0.45),
    ("security guard", "radio", BLACK, 0.2), ("person touching an ear", "earbuds", GREEN, 0.1),
    ("person in a speaking posture", "microphone", RED, 0.2),
    ("person pointing at a screen", "remote control", BLUE, 0.4),
    ("person in a writing posture", "chalk", BROWN, 0.15), ("person framing a picture", "camera", GREY, 0.12),
]  # fmt: skip
"""Role or gesture, the object it implies, colour, height of the hand."""
