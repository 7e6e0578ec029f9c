"""Small question files of the published layouts with made-up content, and pictures to go with them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.score_files import write_lines

IMAGES = (42, 73)
OBJECTS = ("cat", "dog", "cup")


def packed(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        json.dump(content, file)


def write_data(root: Path) -> tuple[Path, Path]:
    """Folder of question files and folder of pictures."""
    data, images = root / "data", root / "images"
    for name in ("pope", "chair", "mme", "amber"):
        (data / name).mkdir(parents=True)
    asked = [
        {"question_id": 1 + 2 * i + j, "image": coco(image), "label": label,
         "text": f"Is there a {word} in the imange?"}
        for i, image in enumerate(IMAGES)
        for j, (word, label) in enumerate((("cat", "yes"), ("dog", "no")))
    ]  # fmt: skip
    for split in ("random", "popular", "adversarial"):
        write_lines(data / "pope" / f"coco_pope_{split}.jsonl", asked)
    write_lines(
        data / "mme" / "mme_made_up.jsonl",
        [
            {"category": category, "image": "000000000042.png", "answer": answer,
             "question": f"Is there a {word} in this image? Please answer yes or no."}
            for category in ("existence", "count")
            for word, answer in (("cat", "Yes"), ("dog", "No"))
        ],
    )  # fmt: skip
    (data / "chair" / "synonyms.txt").write_text("cat, kitten\ndog, puppy\ncup, mug\n")
    truth = {"classes": list(OBJECTS), "objects": {str(image): [0] for image in IMAGES}}
    (data / "chair" / "gt_objects_val2014_B.json").write_text(json.dumps(truth))
    (data / "chair" / "image_ids_500.json").write_text(json.dumps({"opera500": IMAGES}))
    packed(data / "chair" / "lemmatizer" / "perceptron_tagger.json.gz",
           {"weights": {}, "tagdict": dict.fromkeys(OBJECTS, "NN"), "classes": ["NN"]})  # fmt: skip
    packed(data / "chair" / "lemmatizer" / "wordnet30_lemmas.json.gz",
           {"lemmas": dict.fromkeys("nvar", OBJECTS), "exceptions": {p: {} for p in "nvar"}})  # fmt: skip
    write_lines(data / "amber" / "query_all.jsonl", [
        {"id": 1, "image": "AMBER_1.jpg", "query": "Describe this image."},
        {"id": 1005, "image": "AMBER_1.jpg", "query": "Is there a dog in this image?"},
    ])  # fmt: skip
    write_lines(data / "amber" / "annotations.jsonl", [
        {"id": 1, "type": "generative", "truth": ["cat"], "hallu": ["dog"]},
        {"id": 1005, "type": "discriminative-hallucination", "truth": "no"},
    ])  # fmt: skip
    (data / "amber" / "relation.json").write_text(json.dumps({"cat": ["kitten"], "dog": [], "cup": []}))
    (data / "amber" / "safe_words.txt").write_text("image\n")
    places = [f"val2014/{coco(image)}" for image in IMAGES] + ["AMBER_1.jpg"]
    for number, place in enumerate([*places, *(f"MME/{c}/000000000042.png" for c in ("existence", "count"))]):
        write_picture(images / place, number)
    return data, images


def coco(image: int) -> str:
    return f"COCO_val2014_{image:012d}.jpg"


def write_picture(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (40, 56, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
