"""Published benchmarks from local folders as lmms-eval tasks.

Our runner builds them from a config's ``data`` and ``images``. For lmms-eval's own command line, a task file says::

    task: my_pope
    class: !function vlm_attn.evaluation.local_tasks.LocalTask
    dataset_name: local_pope_coco_adversarial
    dataset_kwargs: {data: data, images: data/val2014}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict
from lmms_eval.api.task import ConfigurableMessagesTask

from vlm_attn.evaluation.local_docs import SUFFIXES, Pictures, documents, kind_of
from vlm_attn.evaluation.matching import unknown_name
from vlm_attn.evaluation.summary import LOWER_IS_BETTER, Rater, rater_for
from vlm_attn.images import load_image

__all__ = ["LocalTask", "build"]

SPLIT = "test"
OPTIONS = ("data", "images", "ids", "prompt")
_LENGTHS = {"chair": 512, "amber_g": 512, "hallusion": 128, "mmhal": 512}
_YES_NO = ("pope", "mme", "hallusion")
_SHORT = 16
Record = Mapping[str, Any]


class LocalTask(ConfigurableMessagesTask):
    """A benchmark of `local_docs` as a task; ``dataset_name`` is its name, ``dataset_kwargs`` hold its folders."""

    def __init__(self, config: dict[str, Any] | None = None, **_: Any) -> None:
        given = {key: value for key, value in (config or {}).items() if key != "class"}
        options = dict(given.get("dataset_kwargs") or {})
        for key in options:
            if key not in OPTIONS:
                raise ValueError(unknown_name("dataset_kwargs", key, OPTIONS))
        for key in ("data", "images"):
            if not isinstance(options.get(key), str):
                raise ValueError(f"dataset_kwargs.{key}: name the folder with the {key} of {given.get('task')}.")
        name = given["dataset_name"]
        kind = kind_of(name)
        prompt = options.get("prompt") or "llava"
        if prompt not in SUFFIXES:
            raise ValueError(unknown_name("prompt", prompt, SUFFIXES))
        self.pictures = Pictures(Path(options["images"]))
        self.documents = documents(name, options["data"], options.get("ids") or "opera500")
        rater = rater_for(name, data=options["data"])
        if rater is None:
            raise ValueError(f"{name} has no scores.")
        super().__init__(
            config={
                "dataset_path": "local",
                "test_split": SPLIT,
                "output_type": "generate_until",
                "doc_to_visual": self.visual,
                "doc_to_text": partial(question, suffix=SUFFIXES[prompt] if kind in _YES_NO else ""),
                "doc_to_target": target,
                "process_results": partial(records, names=list(rater.statistics)),
                "metric_list": [
                    {"metric": metric, "aggregation": _aggregate(rater, metric),
                     "higher_is_better": metric not in LOWER_IS_BETTER}
                    for metric in rater.statistics
                ],
                "generation_kwargs": {"max_new_tokens": _LENGTHS.get(kind, _SHORT), "temperature": 0,
                                      "do_sample": False, "until": []},
                "metadata": {"version": 1.0},
                **given,
            },
            model_name="vlm_attn",
        )  # fmt: skip

    def download(self, dataset_kwargs: Any = None) -> None:
        """Take the documents; the name is historical, nothing is fetched."""
        self.dataset = DatasetDict({SPLIT: Dataset.from_list(self.documents)})
        self.dataset_no_image = self.dataset

    def visual(self, doc: Record) -> list[Any]:
        """The picture of a document, RGB; none where a question is asked as text alone."""
        if not doc["image"]:
            return []
        path = self.pictures.find(doc["image"], doc.get("category"))
        if path is None:
            self.pictures.check([doc])
        return [load_image(path)]  # type: ignore[arg-type]


def question(doc: Record, suffix: str = "") -> str:
    return f"{doc['question']}{suffix}"


def target(doc: Record) -> str:
    return str(doc.get("label") or ", ".join(doc.get("truth", ())))


def records(doc: Record, results: Sequence[str], names: Sequence[str] = ()) -> dict[str, Record]:
    record = {"doc": dict(doc), "text": results[0]}
    return dict.fromkeys(names, record)


def _aggregate(rater: Rater, metric: str) -> Callable[[Sequence[Record]], float]:
    """One metric by the code that also scores our runs."""

    def aggregate(listed: Sequence[Record]) -> float:
        sums = np.asarray(rater.rows(listed), dtype=np.float64).sum(0, keepdims=True)
        return float(rater.statistics[metric](sums)[0])

    return aggregate


@lru_cache(maxsize=32)
def build(name: str, data: str, images: str, ids: str | None = None, prompt: str | None = None) -> LocalTask:
    """The task object of a local benchmark."""
    options = {"data": data, "images": images, "ids": ids, "prompt": prompt}
    given = {key: value for key, value in options.items() if value is not None}
    return LocalTask({"task": name, "dataset_name": name, "dataset_kwargs": given})
