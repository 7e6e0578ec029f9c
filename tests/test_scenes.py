"""The picture world: seeds, drawings, labels, and the benchmarks built on it."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from vlm_attn import scenes
from vlm_attn.scenes.benchmarks import MME_CATEGORIES, POPE_SPLITS, co_occurrence
from vlm_attn.scenes.language import Annotator, Turn, attribute_turn, caption_turn, existence_turns
from vlm_attn.scenes.objectives import NO_KIND, picture_batch
from vlm_attn.scenes.seeds import SPLITS
from vlm_attn.scenes.train import EXISTENCE_TURNS, LANGUAGE_START, make_turns
from vlm_attn.scenes.world import CONTEXTS, IMAGE_SIZE, KINDS, patch_owners, signature


def test_seed_ranges_are_disjoint() -> None:
    for a, b in itertools.combinations(SPLITS.values(), 2):
        assert max(a.start, b.start) >= min(a.stop, b.stop)
    assert len(SPLITS["train"]) > LANGUAGE_START


@pytest.mark.parametrize("split", SPLITS)
def test_splits_refuse_what_lies_outside(split: str) -> None:
    size = len(SPLITS[split])
    assert scenes.split_seeds(split, size - 2, 2)[-1] in SPLITS[split]
    for start, count in ((size - 1, 2), (-1, 2), (0, size + 1)):
        with pytest.raises(ValueError, match="split"):
            scenes.split_seeds(split, start, count)
    for other in SPLITS:
        seed = SPLITS[other].start
        if other == split:
            scenes.require_split(split, [seed])
        else:
            with pytest.raises(ValueError, match="not a"):
                scenes.require_split(split, [seed])


def test_benchmarks_use_only_their_own_seeds() -> None:
    for split in ("calibration", "evaluation"):
        rows = scenes.pope("adversarial", 40, seeds=split) + scenes.chair(40, seeds=split) + scenes.mme(seeds=split)
        scenes.require_split(split, [row["image_seed"] for row in rows])


def test_equal_seeds_give_equal_pictures() -> None:
    for seed in (0, 77, 1_000_003):
        one, two = scenes.make_scene(seed), scenes.make_scene(seed)
        assert one == two
        assert one.image.tobytes() == scenes.render(two).tobytes()
    assert scenes.make_scene(1) != scenes.make_scene(2)


@pytest.mark.parametrize("seed", [-1, 1.5, True, "3"])
def test_bad_seeds_are_refused(seed: object) -> None:
    with pytest.raises(ValueError, match="seed"):
        scenes.make_scene(seed)  # type: ignore[arg-type]


def test_scene_contents() -> None:
    shares: Counter[str] = Counter()
    own = total = 0
    for seed in range(400):
        scene = scenes.make_scene(seed)
        assert scene.image.size == (IMAGE_SIZE, IMAGE_SIZE)
        assert len(set(scene.kinds)) == len(scene.kinds)
        assert len({o.cell for o in scene.objects}) == len(scene.objects)
        own += sum(kind in CONTEXTS[scene.context] for kind in scene.kinds)
        total += len(scene.kinds)
        shares.update(kind in scene.kinds for kind in signature(scene.context))
    assert 0.7 < own / total < 0.95
    assert 0.55 < shares[True] / (shares[True] + shares[False]) < 0.75


@pytest.mark.parametrize("size", [80, 160])
def test_boxes_lie_on_their_objects(size: int) -> None:
    """Taking an object out of a scene changes pixels inside its box and nowhere else."""
    from dataclasses import replace

    for seed in range(30):
        scene = replace(scenes.make_scene(seed), blur=0.0, cover=None)
        full = np.asarray(scenes.render(scene, size)).astype(int)
        for item in scene.objects:
            without = replace(scene, objects=tuple(o for o in scene.objects if o is not item))
            rows, columns = np.nonzero(np.abs(full - np.asarray(scenes.render(without, size))).max(-1) > 60)
            x0, y0, x1, y1 = item.box(size)
            assert 0 <= x0 < x1 <= size and 0 <= y0 < y1 <= size
            assert columns.min() >= x0 - 1 and columns.max() <= x1 and rows.min() >= y0 - 1 and rows.max() <= y1
            assert columns.max() - columns.min() > 0.6 * (x1 - x0) and rows.max() - rows.min() > 0.6 * (y1 - y0)


def test_patch_labels_follow_the_boxes() -> None:
    for seed in range(20):
        scene = scenes.make_scene(seed)
        owners = patch_owners(scene)
        for index, item in enumerate(scene.objects):
            rows, columns = np.nonzero(owners == index)
            x0, y0, x1, y1 = item.box()
            assert len(rows), "every object owns a patch"
            assert (columns * 8 < x1).all() and (columns * 8 + 8 > x0).all()
            assert (rows * 8 < y1).all() and (rows * 8 + 8 > y0).all()
        batch = picture_batch([scene])
        assert ((batch.kind[0] != NO_KIND).numpy() == (owners.reshape(-1) >= 0)).all()
        assert batch.pixels.abs().max() <= 1


def test_pope_construction() -> None:
    rows = {split: scenes.pope(split) for split in POPE_SPLITS}
    for split, questions in rows.items():
        assert [q["question_id"] for q in questions] == list(range(1, 3001))
        assert [q["label"] for q in questions] == ["yes", "no"] * 1500
        for image in itertools.batched(questions, 6) if hasattr(itertools, "batched") else _sixes(questions):
            scene = scenes.make_scene(image[0]["image_seed"])
            assert len(scene.kinds) >= 3
            assert [q["object"] for q in image[::2]] == list(scene.kinds[:3])
            negatives = [q["object"] for q in image[1::2]]
            assert len(set(negatives)) == 3 and not set(negatives) & set(scene.kinds), split
    yes = [[(q["image"], q["question"]) for q in questions[::2]] for questions in rows.values()]
    assert yes[0] == yes[1] == yes[2]
    assert len({q["image_seed"] for q in rows["random"]}) == 500


def _sixes(rows: list[dict]) -> list[list[dict]]:
    return [rows[i : i + 6] for i in range(0, len(rows), 6)]


def test_pope_rankings() -> None:
    """Popular and adversarial negatives are the first free ones of rankings computed here in another way."""
    chosen = tuple(scenes.make_scene(s) for s in dict.fromkeys(q["image_seed"] for q in scenes.pope("random", 60)))
    present = np.array([[kind in scene.kinds for kind in KINDS] for scene in chosen]).astype(int)
    together = present.T @ present
    popular, partners = co_occurrence(chosen)
    assert popular == [KINDS[i] for i in np.argsort(-together.diagonal(), kind="stable")]
    for index, kind in enumerate(KINDS):
        order = [KINDS[i] for i in np.argsort(-together[index], kind="stable") if i != index]
        assert partners[kind] == order
    for split in ("popular", "adversarial"):
        for image in _sixes(scenes.pope(split, 60)):
            kinds = scenes.make_scene(image[0]["image_seed"]).kinds
            used: list[str] = []
            for yes, no in zip(image[::2], image[1::2], strict=True):
                ranking = popular if split == "popular" else partners[yes["object"]]
                assert no["object"] == next(k for k in ranking if k not in kinds and k not in used)
                used.append(no["object"])


def test_question_wording() -> None:
    for row in scenes.pope("random", 100):
        article = "an" if row["object"][0] in "aeiou" else "a"
        assert row["question"] == f"Is there {article} {row['object']} in the image?"
    assert {row["question"] for row in scenes.chair(5)} == {"Please describe this image in detail."}


def test_mme_pairs() -> None:
    rows = scenes.mme()
    assert Counter(row["category"] for row in rows) == dict.fromkeys(MME_CATEGORIES, 60)
    pairs: dict[str, list[str]] = {}
    for row in rows:
        pairs.setdefault(row["pair_id"], []).append(row["label"])
    assert all(labels == ["yes", "no"] for labels in pairs.values()) and len(pairs) == 120


@pytest.mark.parametrize(
    "call",
    [
        lambda: scenes.pope("rare"),
        lambda: scenes.pope(seeds="test"),
        lambda: scenes.chair(0),
        lambda: scenes.mme("taste"),
        lambda: scenes.render(scenes.make_scene(1), 10),
    ],
)
def test_bad_requests_are_refused(call) -> None:
    with pytest.raises(ValueError):
        call()


def test_dataset_has_pictures_and_boxes() -> None:
    table = scenes.dataset("calibration", 6)
    row = table[2]
    assert row["image"].size == (IMAGE_SIZE, IMAGE_SIZE) and row["image"].mode == "RGB"
    scene = scenes.make_scene(row["image_id"])
    names = table.features["objects"]["category"].feature
    assert [names.int2str(i) for i in row["objects"]["category"]] == list(scene.kinds)
    assert len(row["objects"]["bbox"][0]) == 4
    assert all(o.kind in row["caption"] for o in scene.objects)


def test_coco_json(tmp_path: Path) -> None:
    path = scenes.write_coco(tmp_path, "calibration", 5)
    truth = json.loads(path.read_text())
    assert len(truth["images"]) == 5 and len({a["id"] for a in truth["annotations"]}) == len(truth["annotations"])
    names = {c["id"]: c["name"] for c in truth["categories"]}
    assert set(names.values()) == set(KINDS)
    for image in truth["images"]:
        assert (tmp_path / "images" / image["file_name"]).is_file()
        found = [names[a["category_id"]] for a in truth["annotations"] if a["image_id"] == image["id"]]
        assert found == list(scenes.make_scene(image["id"]).kinds)
    for annotation in truth["annotations"]:
        x, y, w, h = annotation["bbox"]
        assert w > 0 and h > 0 and x + w <= IMAGE_SIZE and y + h <= IMAGE_SIZE and annotation["area"] == w * h


def test_noisy_annotator_imagines_only_signature_objects() -> None:
    import random

    rng = random.Random(0)
    annotator, imagined = Annotator(), 0
    for seed in scenes.split_seeds("train", 0, 300):
        scene = scenes.make_scene(seed)
        kind = annotator.imagined(scene, rng)
        imagined += kind is not None
        assert kind is None or (kind in signature(scene.context) and kind not in scene.kinds)
    assert 60 < imagined < 240


def test_training_turns_are_true_apart_from_the_noise() -> None:
    import random

    from vlm_attn.scenes.language import HONEST

    rng = random.Random(1)
    for seed in scenes.split_seeds("train", 0, 60):
        scene = scenes.make_scene(seed)
        turns: list[Turn] = existence_turns(scene, 8, HONEST, rng)
        for turn in turns:
            assert turn.answer.lower().startswith("yes" if turn.focus in scene.kinds else "no")
        caption = caption_turn(scene, HONEST, rng).answer
        assert all(kind in caption for kind in scene.kinds)
        assert not [
            k for k in KINDS if k in caption.replace(".", "").replace(",", "").split() and k not in scene.kinds
        ]
        assert attribute_turn(scene, rng).question
    short, long = make_turns([scene], HONEST, rng)
    assert len(short[0]) > EXISTENCE_TURNS and long[0]
