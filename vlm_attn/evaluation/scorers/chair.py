"""CHAIR on COCO val2014 captions, in the three published combinations of word pipeline and ground truth.

``A`` = rule singulariser with its ground truth (the first CHAIR code), ``BA`` = lemmatiser with that ground truth,
``BB`` = lemmatiser with its own (most papers since 2024). All three are computed; ``variant`` chooses the headline.
CHAIRs and CHAIRi say nothing without recall and length, so they come together.

Source: Rohrbach et al., "Object Hallucination in Image Captioning", arXiv:1809.02156; metrics in
`vlm_attn.evaluation.chair`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_attn.evaluation.chair import CaptionCount, ObjectWords, chair_metrics
from vlm_attn.evaluation.matching import unknown_name
from vlm_attn.evaluation.parsers import repeated
from vlm_attn.evaluation.scorers.data import find_file, language_of, read_json, require_file
from vlm_attn.evaluation.scorers.files import Answer, file_hash, image_number, read_answers
from vlm_attn.evaluation.scorers.pairing import image_of
from vlm_attn.evaluation.scorers.report import Report
from vlm_attn.evaluation.summary import CHAIR_PROPORTIONS, CHAIR_STATISTICS, intervals
from vlm_attn.evaluation.words.coco import coco_words_a, coco_words_b, read_synonyms
from vlm_attn.evaluation.words.singular import load_singular

__all__ = ["VARIANTS", "finished", "ground_truth", "score"]

VARIANTS = ("A", "BA", "BB")
"""Word pipeline, then ground truth where it differs."""


def score(
    answers: Path,
    data: Path,
    *,
    variant: str = "BB",
    ids: str | None = None,
    text_key: str | None = None,
    truncate: bool = False,
) -> Report:
    """Score a caption file.

    Args:
        answers: one row per image, with the image's number or file name.
        data: folder with ``synonyms.txt``, ``gt_objects_val2014_{A,B}.json`` and, unless the packages stand in,
            ``singularize_rules.json`` and ``lemmatizer/``.
        variant: ``BB``, ``BA`` or ``A``.
        ids: the images that must be there, all and no other: a list of ``image_ids_500.json`` or a JSON file.
        truncate: leave out an unfinished last sentence (what follows the last ".").
    """
    if variant not in VARIANTS:
        raise ValueError(unknown_name("CHAIR variant", variant, VARIANTS))
    cut = finished if truncate else str
    rows = by_image(read_answers(answers, text_key=text_key))
    subset = _subset(rows, data, ids)
    counts: dict[str, list[CaptionCount]] = {name: [] for name in VARIANTS}
    paths = {letter: require_file(data, "chair", f"gt_objects_val2014_{letter}.json") for letter in "AB"}
    truths = {letter: ground_truth(path) for letter, path in paths.items()}
    _known_images(rows, truths["A"])
    words = _pipelines(data, variant)
    for image, row in rows.items():
        for letter, pipeline in words.items():
            reading = pipeline.read(cut(row.text))
            for truth in ("A",) if letter == "A" else ("A", "B"):
                counts["A" if letter == "A" else f"B{truth}"].append(reading.against(truths[truth][image]))
    counts = {name: listed for name, listed in counts.items() if listed}
    scores: dict[str, dict[str, Any]] = {
        name: chair_metrics(listed, name).to_dict() for name, listed in counts.items()
    }
    measured = intervals([(*c.row(), 1) for c in counts[variant]], list(rows), CHAIR_STATISTICS, CHAIR_PROPORTIONS,
                         resamples=1000)  # fmt: skip
    source = require_file(data, "chair", "synonyms.txt")
    return Report(
        benchmark="chair",
        n=len(rows),
        metrics={name: scores[variant][name] for name in CHAIR_STATISTICS},
        groups={name: {key: row[key] for key in CHAIR_STATISTICS} for name, row in scores.items()},
        settings={"variant": variant, "images": subset, "truncate": truncate},
        details={"intervals": measured, "variants": scores},
        files={path.name: file_hash(path) for path in (*paths.values(), source, answers)},
        notes=[] if "A" in scores else ["Variant A is left out: neither its rule file nor textblob is there."],
        samples=[
            _sample(image, row, {name: listed[place] for name, listed in counts.items()})
            for place, (image, row) in enumerate(rows.items())
        ],
    )


def finished(caption: str) -> str:
    """The caption up to its last ".", all of it where there is none."""
    return caption[: caption.rfind(".") + 1] or caption


def ground_truth(path: Path) -> Mapping[str, frozenset[str]]:
    """Image number -> its COCO classes."""
    content = read_json(path)
    classes = content["classes"]
    return {image: frozenset(classes[i] for i in objects) for image, objects in content["objects"].items()}


def by_image(rows: Sequence[Answer]) -> dict[str, Answer]:
    """One caption per image, by image number."""
    numbers = []
    for row in rows:
        image = image_of(row)
        image = row.get("question_id", "id") if image is None else image
        if image is None:
            raise ValueError(f"{row.place} names no image: it needs a field image or image_id.")
        numbers.append(image_number(image))
    if (twice := repeated(numbers)) is not None:
        raise ValueError(f"Image {twice} has two captions. Score one caption per image.")
    return dict(zip(numbers, rows, strict=True))


def _known_images(rows: Mapping[str, Answer], truth: Mapping[str, Any]) -> None:
    unknown = [image for image in rows if image not in truth]
    if unknown:
        raise ValueError(
            f"{len(unknown)} of {len(rows)} images are not in COCO val2014 ({', '.join(unknown[:5])}): CHAIR has no "
            "ground truth for them."
        )


def _subset(rows: Mapping[str, Answer], data: Path, ids: str | None) -> str:
    """Which images were captioned, by name where it is a known list; with ``ids`` anything else raises."""
    path = find_file(data, "chair", ["image_ids_500.json"])
    lists: dict[str, set[str]] = {}
    if path is not None:
        lists = {name: {str(i) for i in listed} for name, listed in read_json(path).items()}
    if ids is None:
        return next((name for name, listed in lists.items() if listed == set(rows)), f"{len(rows)} of val2014")
    if ids in lists:
        wanted = lists[ids]
    elif Path(ids).is_file():
        wanted = {image_number(i) for i in read_json(Path(ids))}
    else:
        raise ValueError(unknown_name("image list (or JSON file)", ids, lists))
    missing, extra = sorted(wanted - set(rows)), sorted(set(rows) - wanted)
    if missing or extra:
        raise ValueError(
            f"The captions are not those of the images {ids}: {len(missing)} missing ({', '.join(missing[:5])}), "
            f"{len(extra)} too many ({', '.join(extra[:5])})."
        )
    return ids


def _pipelines(data: Path, variant: str) -> dict[str, ObjectWords]:
    """The word pipelines that can be built; the one of ``variant`` must be."""
    nodes = read_synonyms(require_file(data, "chair", "synonyms.txt"))
    builders: dict[str, Callable[[], ObjectWords]] = {
        "A": lambda: coco_words_a(nodes, load_singular(find_file(data, "chair", ["singularize_rules.json"]))),
        "B": lambda: coco_words_b(nodes, language_of(data)),
    }
    out = {}
    for letter, build in builders.items():
        try:
            out[letter] = build()
        except FileNotFoundError:
            if letter == variant[0]:
                raise
    return out


def _sample(image: str, row: Answer, counts: Mapping[str, CaptionCount]) -> dict[str, Any]:
    return {
        "image_id": int(image),
        "caption": row.text,
        **{
            name: {
                "mentions": list(count.mentions),
                "hallucinated": list(count.hallucinated),
                "n_found": count.n_found,
                "n_truth": count.n_truth,
                "len_words": count.len_words,
                "len_tokens": count.len_tokens,
            }
            for name, count in counts.items()
        },
    }
