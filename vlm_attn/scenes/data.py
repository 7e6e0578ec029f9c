"""The picture world in the forms other tools read: a `datasets.Dataset` and COCO-style annotation JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_attn.scenes.language import detailed_caption
from vlm_attn.scenes.seeds import split_seeds
from vlm_attn.scenes.world import COLOUR_NAMES, CONTEXTS, IMAGE_SIZE, KINDS, Scene, make_scene

if TYPE_CHECKING:
    from datasets import Dataset, Features


def scenes(split: str, n: int, start: int = 0) -> Iterator[Scene]:
    """Yield `n` scenes of a split ("train", "calibration" or "evaluation"), from its `start`-th seed on."""
    return (make_scene(seed) for seed in split_seeds(split, start, n))


def features() -> Features:
    """Column types of `dataset`."""
    from datasets import ClassLabel, Features, Image, List, Value

    return Features(
        {
            "image": Image(),
            "image_id": Value("int64"),
            "context": ClassLabel(names=list(CONTEXTS)),
            "caption": Value("string"),
            "objects": {
                "category": List(ClassLabel(names=list(KINDS))),
                "color": List(ClassLabel(names=list(COLOUR_NAMES))),
                "position": List(Value("string")),
                "bbox": List(List(Value("float32"), length=4)),
            },
        }
    )


def _row(scene: Scene) -> dict[str, Any]:
    """A scene as a dataset row; boxes are COCO's x, y, width, height in pixels."""
    return {
        "image": scene.image,
        "image_id": scene.seed,
        "context": scene.context,
        "caption": detailed_caption(scene, None),
        "objects": {
            "category": [o.kind for o in scene.objects],
            "color": [o.colour for o in scene.objects],
            "position": [o.position for o in scene.objects],
            "bbox": [coco_box(o.box()) for o in scene.objects],
        },
    }


def dataset(split: str, n: int, start: int = 0) -> Dataset:
    """Build a `datasets.Dataset` of `n` pictures of a split, with objects, boxes and a truthful caption.

    Args:
        split: "train", "calibration" or "evaluation".
        n: number of pictures.
        start: how far into the split to begin.
    """
    from datasets import Dataset

    return Dataset.from_list([_row(scene) for scene in scenes(split, n, start)], features=features())


def coco_box(box: tuple[int, int, int, int]) -> list[float]:
    """Turn x0, y0, x1, y1 into COCO's x, y, width, height."""
    x0, y0, x1, y1 = box
    return [float(x0), float(y0), float(x1 - x0), float(y1 - y0)]


def coco_annotations(split: str, n: int, start: int = 0) -> dict[str, Any]:
    """Return COCO instance annotations (images, annotations, categories) of `n` pictures of a split."""
    category = {kind: i for i, kind in enumerate(KINDS, start=1)}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for scene in scenes(split, n, start):
        images.append(
            {
                "id": scene.seed,
                "file_name": f"scene_{scene.seed:012d}.png",
                "width": IMAGE_SIZE,
                "height": IMAGE_SIZE,
                "context": scene.context,
            }
        )
        for item in scene.objects:
            box = coco_box(item.box())
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": scene.seed,
                    "category_id": category[item.kind],
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                    "attributes": {"color": item.colour, "position": item.position},
                }
            )
    return {
        "info": {"description": f"vlm-attn picture world, {split} split", "version": "1.0"},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i, "name": kind, "supercategory": "object"} for kind, i in category.items()],
    }


def write_coco(folder: str | Path, split: str, n: int, start: int = 0) -> Path:
    """Write the pictures as PNG under `folder`/images and their `annotations.json`; return the JSON's path."""
    target = Path(folder)
    (target / "images").mkdir(parents=True, exist_ok=True)
    for scene in scenes(split, n, start):
        scene.image.save(target / "images" / f"scene_{scene.seed:012d}.png")
    path = target / "annotations.json"
    path.write_text(json.dumps(coco_annotations(split, n, start)), encoding="utf-8")
    return path
