"""POPE, CHAIR and MME-style benchmarks on the picture world, by the official constructions.

Every builder returns plain rows; the picture of a row is made from its `image_seed` when asked for (`load_image`), so
a benchmark of thousands of questions weighs nothing. `seeds="evaluation"` is for published figures,
`seeds="calibration"` for tuning; the two share no picture.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from itertools import combinations
from typing import Any

from PIL import Image

from vlm_attn.scenes.language import NUMBERS, SYNONYMS, existence_question, with_article
from vlm_attn.scenes.seeds import SPLITS, split_seeds
from vlm_attn.scenes.world import COLOUR_NAMES, COLUMNS, GRID, KINDS, ROWS, Scene, make_scene, render

POPE_SPLITS = ("random", "popular", "adversarial")
MME_CATEGORIES = ("existence", "count", "position", "color")
CHAIR_PROMPT = "Please describe this image in detail."
QUESTIONS_PER_IMAGE = 6
_MME_START = 100_000
"""MME pictures are taken this far into the seeds, behind those of POPE and CHAIR."""

Row = dict[str, Any]


def load_image(row: Row, size: int = 80) -> Image.Image:
    """Draw the picture of a benchmark row, RGB, `size` x `size` pixels."""
    return render(make_scene(row["image_seed"]), size)


def _check(seeds: str, n_images: int) -> None:
    if seeds not in SPLITS:
        raise ValueError(f"unknown seeds {seeds!r}; choose one of {', '.join(SPLITS)}")
    if n_images < 1:
        raise ValueError(f"a benchmark needs at least one image, got {n_images}")


@lru_cache(maxsize=16)
def _scenes(seeds: str, n_images: int, least: int, start: int = 0) -> tuple[Scene, ...]:
    """The first `n_images` scenes of a split, from `start` on, with at least `least` objects."""

    def candidates() -> Iterator[Scene]:
        for seed in split_seeds(seeds, start, 4 * n_images + 100):
            scene = make_scene(seed)
            if len(scene.objects) >= least:
                yield scene

    found = []
    for scene in candidates():
        found.append(scene)
        if len(found) == n_images:
            return tuple(found)
    raise ValueError(f"fewer than {n_images} scenes with {least} objects; ask for fewer images")


def co_occurrence(scenes: tuple[Scene, ...]) -> tuple[list[str], dict[str, list[str]]]:
    """Object kinds by image frequency, and per kind the others by co-occurrence; both descending and stable."""
    frequency = Counter(dict.fromkeys(KINDS, 0))
    pairs: dict[str, Counter[str]] = {kind: Counter({other: 0 for other in KINDS if other != kind}) for kind in KINDS}
    for scene in scenes:
        frequency.update(scene.kinds)
        for a, b in combinations(scene.kinds, 2):
            pairs[a][b] += 1
            pairs[b][a] += 1
    popular = sorted(KINDS, key=lambda kind: -frequency[kind])
    partners = {kind: sorted(counts, key=lambda other: -counts[other]) for kind, counts in pairs.items()}
    return popular, partners


def pope(split: str = "random", n_images: int = 500, *, seeds: str = "evaluation") -> list[Row]:
    """Build a POPE split: six existence questions an image, yes and no in turn.

    Positives are the first three objects of the image's list. Each is followed by a negative that is not in the image
    and was not asked before: drawn uniformly (random), the most frequent (popular), or the one that co-occurs most
    with the positive (adversarial).

    Args:
        split: "random", "popular" or "adversarial".
        n_images: images with at least three objects.
        seeds: "evaluation" or "calibration".

    Returns:
        rows of question_id (from 1), image_id, image_seed, image (file name), question, label ("yes" or "no"),
        object and split.
    """
    if split not in POPE_SPLITS:
        raise ValueError(f"unknown POPE split {split!r}; choose one of {', '.join(POPE_SPLITS)}")
    _check(seeds, n_images)
    scenes = _scenes(seeds, n_images, QUESTIONS_PER_IMAGE // 2)
    popular, partners = co_occurrence(scenes)
    rows: list[Row] = []
    for scene in scenes:
        rng = random.Random(f"pope-{split}-{scene.seed}")
        used: set[str] = set()
        for positive in scene.kinds[: QUESTIONS_PER_IMAGE // 2]:
            free = [kind for kind in KINDS if kind not in scene.kinds and kind not in used]
            if split == "random":
                negative = rng.choice(free)
            else:
                ranked = popular if split == "popular" else partners[positive]
                negative = next(kind for kind in ranked if kind in free)
            used.add(negative)
            for kind, label in ((positive, "yes"), (negative, "no")):
                rows.append(
                    {
                        "question_id": len(rows) + 1,
                        **_image_fields(scene),
                        "question": existence_question(kind),
                        "label": label,
                        "object": kind,
                        "split": split,
                    }
                )
    return rows


def _image_fields(scene: Scene) -> Row:
    return {"image_id": scene.seed, "image_seed": scene.seed, "image": f"scene_{scene.seed:012d}.png"}


def chair(n: int = 500, *, seeds: str = "evaluation") -> list[Row]:
    """Build the captioning benchmark: one description request an image and the truth to score it with.

    Returns:
        rows of question_id, image_id, image_seed, image, question, objects (kinds in the image) and context.
    """
    _check(seeds, n)
    return [
        {
            "question_id": index,
            **_image_fields(scene),
            "question": CHAIR_PROMPT,
            "objects": list(scene.kinds),
            "context": scene.context,
        }
        for index, scene in enumerate(_scenes(seeds, n, 1), start=1)
    ]


def synonyms() -> dict[str, tuple[str, ...]]:
    """Words that count as a mention of each object kind."""
    return dict(SYNONYMS)


def _mme_pair(category: str, scene: Scene, rng: random.Random) -> tuple[str, str]:
    """The question to be answered yes and the one to be answered no."""
    item = rng.choice(scene.objects)
    if category == "existence":
        absent = rng.choice([kind for kind in KINDS if kind not in scene.kinds])
        return existence_question(item.kind), existence_question(absent)
    if category == "count":
        count = len(scene.objects)
        wrong = rng.choice([n for n in range(2, 7) if n != count])
        return f"Are there {NUMBERS[count]} objects in the image?", f"Are there {NUMBERS[wrong]} objects in the image?"
    if category == "position":
        cells = [(r, c) for r in range(GRID) for c in range(GRID) if (r, c) != item.cell]
        row, column = rng.choice(cells)
        text = "Is the {} in the {} of the image?"
        return text.format(item.kind, item.position), text.format(item.kind, f"{ROWS[row]} {COLUMNS[column]}")
    colour = rng.choice([c for c in COLOUR_NAMES if c != item.colour])
    text = "Is there {} in the image?"
    return (
        text.format(with_article(f"{item.colour} {item.kind}")),
        text.format(with_article(f"{colour} {item.kind}")),
    )


def mme(category: str | None = None, n_images: int = 30, *, seeds: str = "evaluation") -> list[Row]:
    """Build the MME-style hallucination subset: two questions an image, one to be answered yes and one no.

    Args:
        category: one of `MME_CATEGORIES`, or None for all four.
        n_images: images per category (MME has 30).
        seeds: "evaluation" or "calibration".

    Returns:
        rows of question_id (unique), pair_id, image_id, image_seed, image, category, question and label.
    """
    if category is not None and category not in MME_CATEGORIES:
        raise ValueError(f"unknown MME category {category!r}; choose one of {', '.join(MME_CATEGORIES)}")
    _check(seeds, n_images)
    rows: list[Row] = []
    for name in MME_CATEGORIES if category is None else (category,):
        place = MME_CATEGORIES.index(name)
        for scene in _scenes(seeds, n_images, 2, _MME_START + 10_000 * place):
            rng = random.Random(f"mme-{name}-{scene.seed}")
            for label, question in zip(("yes", "no"), _mme_pair(name, scene, rng), strict=True):
                rows.append(
                    {
                        "question_id": len(rows) + 1,
                        "pair_id": f"{name}-{scene.seed}",
                        **_image_fields(scene),
                        "category": name,
                        "question": question,
                        "label": label,
                    }
                )
    return rows
