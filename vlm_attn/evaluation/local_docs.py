"""Documents of published benchmarks from a folder with their own question files and a folder with their pictures.

Nothing is downloaded and nothing is shipped: the user's folders are read as they were published. A picture is found by
its file name (or by its number, so that ``COCO_val2014_000000000042.jpg`` and ``000000000042.jpg`` are one); names
from question files are looked up in a list of the files that are there and never become paths.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from vlm_attn.evaluation.matching import unknown_name
from vlm_attn.evaluation.scorers import amber, chair, hallusionbench, mme, mmhal, pope
from vlm_attn.evaluation.scorers.data import read_json, require_file
from vlm_attn.evaluation.scorers.files import clean_question, file_stem, image_number, json_lines

__all__ = ["PREFIX", "SUFFIXES", "Pictures", "documents", "kind_of", "names"]

PREFIX = "local_"
Document = dict[str, Any]

SUFFIXES = {
    "llava": "\nAnswer the question using a single word or phrase.",
    "plain": "",
    "vcd": " Please answer this question with one word.",
    "clearsight": " Please just answer yes or no.",
    "mme": " Please answer yes or no.",
}
"""What follows a yes/no question, by the project that introduced it; ``llava`` is the default."""

_POPE = {
    f"{PREFIX}pope_{source}_{split}": f"{source}_pope_{split}" for source in pope.SOURCES for split in pope.SPLITS
}
_POPE[f"{PREFIX}pope_coco_random_2910"] = "coco_pope_random_legacy2910"
_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
_SHOWN = 5


def _pope(name: str, data: Path, ids: str) -> list[Document]:
    stem = _POPE[name]
    path = require_file(data, "pope", f"{stem}.jsonl", f"{stem}.json")
    return [
        {"question_id": q.id, "image": q.image, "question": clean_question(q.text), "label": q.row["label"]}
        for q in pope.pope_questions(path)
    ]


def _chair(name: str, data: Path, ids: str) -> list[Document]:
    """One description per image of the list ``ids``; the truth is the one of variant B."""
    lists = read_json(require_file(data, "chair", "image_ids_500.json")) if not Path(ids).is_file() else {}
    if ids not in lists and not Path(ids).is_file():
        raise ValueError(unknown_name("image list (or JSON file)", ids, lists))
    wanted = [image_number(i) for i in (lists.get(ids) or read_json(Path(ids)))]
    truth = chair.ground_truth(require_file(data, "chair", "gt_objects_val2014_B.json"))
    if unknown := [image for image in wanted if image not in truth]:
        raise ValueError(f"{len(unknown)} images of {ids} are not in COCO val2014: {', '.join(unknown[:_SHOWN])}.")
    question = "Please describe this image in detail."
    return [
        {"image_id": image, "image": f"COCO_val2014_{int(image):012d}.jpg", "question": question,
         "truth": sorted(truth[image])}
        for image in wanted
    ]  # fmt: skip


def _mme(name: str, data: Path, ids: str) -> list[Document]:
    questions, _ = mme.read_questions(data)
    if not questions:
        require_file(data, "mme", "mme_hallucination_240.jsonl")
    return [
        {"category": q.row["category"], "pair": file_stem(q.image), "image": q.image, "question": q.text,
         "label": q.row["label"]}
        for q in questions
    ]  # fmt: skip


def _amber(name: str, data: Path, ids: str) -> list[Document]:
    facts = {row["id"]: row for row in json_lines(require_file(data, "amber", "annotations.jsonl"))}
    queries = require_file(data, "amber", "query_all.jsonl", "query_all.json")
    generative = name.endswith("_g")
    out = []
    for row in json_lines(queries):
        fact = facts[row["id"]]
        if (fact["type"] == amber.GENERATIVE) != generative:
            continue
        own = {"truth": fact["truth"], "hallu": fact["hallu"]} if generative else {"label": fact["truth"]}
        out.append({"id": row["id"], "image": row["image"], "question": row["query"], "type": fact["type"], **own})
    return out


def _hallusion(name: str, data: Path, ids: str) -> list[Document]:
    """Every question; those without a figure have an empty ``image`` and come last, so that a limit keeps figures."""
    rows = json_lines(require_file(data, "hallusionbench", "HallusionBench.json"))
    out = [
        {**{key: str(row[key]) for key in hallusionbench.KEY}, "gt_answer": str(row["gt_answer"]),
         "image": "" if str(row["visual_input"]) == "0" else f"./{str(row['filename']).removeprefix('./')}",
         "question": row["question"],
         "label": {"1": "yes", "0": "no"}[str(row["gt_answer"])]}
        for row in rows
    ]  # fmt: skip
    return sorted(out, key=lambda doc: not doc["image"])


def _mmhal(name: str, data: Path, ids: str) -> list[Document]:
    """The open questions; a picture bears the last part of its address."""
    rows = json_lines(require_file(data, "mmhal_bench", *mmhal.FILES))
    return [
        {"image_id": row["image_id"], "image": f"./{row['image_src'].rsplit('/', 1)[-1]}",
         "question_type": row["question_type"], "question": row["question"], "label": row["gt_answer"]}
        for row in rows
    ]  # fmt: skip


_READERS: dict[str, tuple[str, Callable[[str, Path, str], list[Document]]]] = {
    **dict.fromkeys(_POPE, ("pope", _pope)),
    f"{PREFIX}chair": ("chair", _chair),
    f"{PREFIX}mme": ("mme", _mme),
    f"{PREFIX}amber_g": ("amber_g", _amber),
    f"{PREFIX}amber_d": ("amber_d", _amber),
    f"{PREFIX}hallusion_bench": ("hallusion", _hallusion),
    f"{PREFIX}mmhal_bench": ("mmhal", _mmhal),
}


def names() -> list[str]:
    """Benchmarks that can be read from local folders."""
    return list(_READERS)


def kind_of(name: str) -> str:
    """How a local benchmark is scored: pope, chair, mme, amber_g, amber_d, hallusion or mmhal."""
    if name not in _READERS:
        raise ValueError(unknown_name("local benchmark", name, _READERS))
    return _READERS[name][0]


@lru_cache(maxsize=32)
def documents(name: str, data: str, ids: str = "opera500") -> list[Document]:
    """The questions of a local benchmark.

    Args:
        name: one of `names`.
        data: folder of the benchmark's own files, or the folder above it.
        ids: for CHAIR, the images: a list of ``image_ids_500.json``, or a JSON file with ids.

    Raises:
        ValueError, FileNotFoundError: unknown names, missing or broken files.
    """
    kind_of(name)
    return _READERS[name][1](name, Path(data), ids)


@dataclass(frozen=True)
class Pictures:
    """The picture files below a folder."""

    folder: Path

    @cached_property
    def _files(self) -> tuple[Mapping[str, Sequence[Path]], Mapping[str, Sequence[Path]]]:
        """All picture files by name, and by number (or stem)."""
        if not self.folder.is_dir():
            raise FileNotFoundError(f"The picture folder {self.folder} does not exist.")
        by_name: dict[str, list[Path]] = {}
        by_number: dict[str, list[Path]] = {}
        for parent, _, files in os.walk(self.folder):
            for file in sorted(files):
                if file.lower().endswith(_EXTENSIONS):
                    by_name.setdefault(file, []).append(Path(parent) / file)
                    by_number.setdefault(image_number(file), []).append(Path(parent) / file)
        return by_name, by_number

    def find(self, image: str, category: str | None = None) -> Path | None:
        """The file of an image, None if there is none; with several, the one below the folder ``category``.

        A name that starts with ``./`` is the end of a place (``./VS/map/0_1.png``), and taken exactly.
        """
        by_name, by_number = self._files
        if image.startswith("./"):
            named = by_name.get(image.rsplit("/", 1)[-1], [])
            found = [path for path in named if f"/{path.relative_to(self.folder).as_posix()}".endswith(image[1:])]
        else:
            found = list(by_name.get(image) or by_number.get(image_number(image)) or [])
        if len(found) > 1 and category is not None:
            found = [path for path in found if category in path.relative_to(self.folder).parts[:-1]]
        if len(found) > 1:
            shown = ", ".join(str(path) for path in found[:_SHOWN])
            raise ValueError(f"Image {image} is there more than once: {shown}. Name a folder that holds it once.")
        return found[0] if found else None

    def check(self, listed: Sequence[Mapping[str, Any]]) -> None:
        """Raise if a picture of these documents is missing: a subset is never scored silently."""
        missing = [
            doc["image"] for doc in listed if doc["image"] and self.find(doc["image"], doc.get("category")) is None
        ]
        if missing:
            unique = list(dict.fromkeys(missing))
            raise FileNotFoundError(
                f"{len(unique)} pictures are not below {self.folder}: {', '.join(unique[:_SHOWN])}"
                f"{', ...' if len(unique) > _SHOWN else ''}. Complete the folder, or lower `limit`."
            )
