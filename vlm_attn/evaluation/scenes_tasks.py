"""The benchmarks on the procedural picture world as lmms-eval tasks.

The YAML files in ``tasks/`` name the functions below. The documents are built in memory (no download, no cache folder,
nothing to render until a picture is asked for), so these tasks run with no network and an empty disk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from datasets import Dataset, DatasetDict
from lmms_eval.api.task import ConfigurableMessagesTask

from vlm_attn.evaluation import chair, mme, parsers
from vlm_attn.evaluation.scenes_docs import documents, object_words, picture

__all__ = ["ScenesTask"]

SPLIT = "test"
Record = Mapping[str, Any]


@lru_cache(maxsize=16)
def _dataset(name: str) -> Dataset:
    return Dataset.from_list(documents(name))


class ScenesTask(ConfigurableMessagesTask):
    """An lmms-eval task whose documents come from `scenes_docs.documents(dataset_name)`."""

    def __init__(self, config: dict[str, Any] | None = None, **_: Any) -> None:
        config = dict(config or {})
        config.pop("class", None)
        super().__init__(config=config, model_name="vlm_attn")

    def download(self, dataset_kwargs: Any = None) -> None:
        """Build the documents; the name is historical, nothing is fetched."""
        self.dataset = DatasetDict({SPLIT: _dataset(self.config.dataset_name)})
        self.dataset_no_image = self.dataset


def doc_to_visual(doc: Record) -> list[Any]:
    return [picture(doc)]


def doc_to_text(doc: Record, lmms_eval_specific_kwargs: Mapping[str, str] | None = None) -> str:
    words = lmms_eval_specific_kwargs or {}
    return f"{words.get('pre_prompt', '')}{doc['question']}{words.get('post_prompt', '')}"


def doc_to_target(doc: Record) -> str:
    return str(doc.get("label") or ", ".join(doc.get("truth", ())))


# ---- POPE: every metric of the spec from the same records -------------------------------------------------------


def pope_results(doc: Record, results: Sequence[str]) -> dict[str, Record]:
    record = {"text": results[0], "label": doc["label"]}
    return dict.fromkeys(
        ("pope_accuracy", "pope_precision", "pope_recall", "pope_f1", "pope_yes_ratio", "pope_unknown_rate"), record
    )


def _pope(field: str) -> Callable[[Sequence[Record]], float]:
    def aggregate(records: Sequence[Record]) -> float:
        score = parsers.pope_metrics([r["text"] for r in records], [r["label"] for r in records])
        return float(getattr(score, field))

    return aggregate


pope_accuracy, pope_precision, pope_recall = _pope("accuracy"), _pope("precision"), _pope("recall")
pope_f1, pope_yes_ratio, pope_unknown_rate = _pope("f1"), _pope("yes_ratio"), _pope("unknown_rate")


# ---- CHAIR ------------------------------------------------------------------------------------------------------


def chair_results(doc: Record, results: Sequence[str]) -> dict[str, Record]:
    record = {"text": results[0], "truth": list(doc["truth"])}
    return dict.fromkeys(
        ("chair_s", "chair_i", "chair_recall", "chair_precision", "chair_f1", "chair_len_words", "chair_len_tokens"),
        record,
    )


def _chair(field: str) -> Callable[[Sequence[Record]], float]:
    def aggregate(records: Sequence[Record]) -> float:
        words = object_words()
        counts = [chair.count_caption(r["text"], r["truth"], words) for r in records]
        return float(getattr(chair.chair_metrics(counts, words.name), field))

    return aggregate


chair_s, chair_i, chair_recall, chair_precision = (
    _chair("chair_s"),
    _chair("chair_i"),
    _chair("recall"),
    _chair("precision"),
)
chair_f1, chair_len_words, chair_len_tokens = _chair("f1"), _chair("len_words"), _chair("len_tokens")


# ---- MME --------------------------------------------------------------------------------------------------------


def mme_results(doc: Record, results: Sequence[str]) -> dict[str, Record]:
    record = {"text": results[0], "label": doc["label"], "category": doc["category"], "pair": doc["pair"]}
    return dict.fromkeys(("mme_score", "mme_acc", "mme_acc_plus"), record)


def _mme(field: str) -> Callable[[Sequence[Record]], float]:
    def aggregate(records: Sequence[Record]) -> float:
        rows = [mme.MmeAnswer(r["category"], r["pair"], r["label"], r["text"]) for r in records]
        return mme.mme_metrics(rows)[field]

    return aggregate


mme_score, mme_acc, mme_acc_plus = _mme("score"), _mme("acc"), _mme("acc_plus")
