"""``ghost_synth``: pictures that lack what they are asked for, in five tones of asking, each with a twin that has it.

A procedural stand-in for Ghost-100 ("Tone Matters", arXiv:2601.06460, arXiv:2604.18803), not its pictures: eight
kinds of absence (blurred, invented or blank badge text; clocks without hands; gauges and displays that are no clocks;
scenes and people without the expected object), drawn from a seed, so there is no label noise. Figures on it are not
comparable with published ones. Without the twins a rate says nothing: a model that always refuses has none.

The wording of the prompts, the twins and the default of 25 pictures per category are [ours].
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from vlm_attn.evaluation.ghost_synth.pictures import CATEGORIES, draw
from vlm_attn.evaluation.ghost_synth.prompts import TONES, prompt
from vlm_attn.evaluation.store import dumps, write_text

__all__ = ["CATEGORIES", "TONES", "picture", "questions", "write"]

FILE = "ghost_synth.jsonl"


def questions(per_category: int = 25, seed: int = 0, twins: bool = True) -> list[dict[str, Any]]:
    """One row per picture and tone.

    Fields: ``question_id``, ``image``, ``category_id``, ``category``, ``index``, ``seed``, ``tone`` (1-5), ``text``
    (the prompt), ``twin``, ``target``, ``ground_truth``, ``expected`` (a twin's right answer), ``whitelist`` (text
    that really stands in the picture).
    """
    if per_category < 1 or seed < 0:
        raise ValueError(f"per_category must be at least 1 and seed at least 0, got {per_category} and {seed}.")
    rows = []
    for category, name in CATEGORIES.items():
        for index in range(per_category):
            for twin in (False, True) if twins else (False,):
                content = draw(category, index, seed, twin)
                image = f"{name}_{index:03d}{'_twin' if twin else ''}"
                facts = {
                    "image": f"{image}.png",
                    "category_id": category,
                    "category": name,
                    "index": index,
                    "seed": seed,
                    "twin": twin,
                    "target": content.target,
                    "ground_truth": content.truth,
                    "expected": content.expected,
                    "whitelist": content.visible,
                }
                for tone in TONES:
                    text = prompt(category, content.target, tone)
                    rows.append({"question_id": f"{image}_t{tone}", "tone": tone, "text": text, **facts})
    return rows


def picture(row: dict[str, Any]) -> Image.Image:
    """The picture of a row, 448 x 448, RGB."""
    return draw(int(row["category_id"]), int(row["index"]), int(row["seed"]), bool(row["twin"])).canvas.image


def write(folder: str | Path, per_category: int = 25, seed: int = 0, twins: bool = True) -> Path:
    """Write the pictures and ``ghost_synth.jsonl`` into a folder and return that file."""
    folder = Path(folder)
    rows = questions(per_category, seed, twins)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for row in {row["image"]: row for row in rows}.values():
        picture(row).save(folder / "images" / row["image"])
    write_text(folder / FILE, "".join(dumps(row) + "\n" for row in rows))
    return folder / FILE
