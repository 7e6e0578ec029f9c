"""HallusionBench and MMHal-Bench from local folders: questions with and without a picture, figures without a judge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("lmms_eval")

from tests.local_data import write_picture
from tests.score_files import DATA, needs, write_lines
from tests.test_eval_local import Teller, settings
from vlm_attn.evaluation import judged_raters
from vlm_attn.evaluation.config import build_config
from vlm_attn.evaluation.local_docs import documents
from vlm_attn.evaluation.runner import RunResult, run
from vlm_attn.evaluation.scorers import score_file
from vlm_attn.evaluation.store import read_json_lines

HALLUSION, MMHAL = TASKS = ["local_hallusion_bench", "local_mmhal_bench"]
CAT = "Is there a cat on the map?"  # answered "Yes."
DOG = {"VS": "Does the map show a dog?", "VD": "Is there a dog on the map?"}  # neither yes nor no; answered "No"
FIGURES = (
    ("VS", "0", "0", None, "0", "0"),
    ("VS", "1", "1", "./VS/map/0_1.png", "1", "0"),
    ("VD", "0", "1", "./VD/map/0_0.png", "1", "0"),
    ("VD", "1", "2", "./VD/map/0_1.png", "0", "1"),
)
"""Category, figure, visual input, file, and the truth of two questions."""


def write(root: Path) -> None:
    for name in ("hallusionbench", "mmhal_bench"):
        (root / "data" / name).mkdir(parents=True)
    rows = [
        {"category": category, "subcategory": "map", "set_id": "0", "figure_id": figure, "question_id": str(number),
         "visual_input": shown, "filename": file, "question": question, "gt_answer": truth}
        for category, figure, shown, file, *truths in FIGURES
        for number, (question, truth) in enumerate(zip((CAT, DOG[category]), truths, strict=True))
    ]  # fmt: skip
    (root / "data" / "hallusionbench" / "HallusionBench.json").write_text(json.dumps(rows))
    asked = {"question_type": "attribute", "question": "What is it?", "gt_answer": "A cat.", "model_answer": ""}
    rows = [{**asked, "image_id": f"{i}a", "image_src": f"https://photos.org/1/{i}_o.jpg"} for i in (1, 2)]
    (root / "data" / "mmhal_bench" / "mmhal-bench_answer_template.json").write_text(json.dumps(rows))
    places = [place for _, _, _, place, *_ in FIGURES if place] + ["1_o.jpg", "2_o.jpg"]
    for seed, place in enumerate(places):
        write_picture(root / "images" / place, seed)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path)
    return tmp_path


def finish(root: Path, backend: Teller, **changes: Any) -> RunResult:
    return run(build_config(settings(root, benchmarks=TASKS, **changes)), backend)


def test_figures(root: Path) -> None:
    finished = finish(root, Teller())
    scores = finished.results["scores"]["noop"]
    assert scores[HALLUSION]["metrics"] == pytest.approx(
        {"a_acc": 3 / 6, "f_acc": 1 / 3, "q_acc": 1 / 4, "a_acc_all": 4 / 8, "q_acc_all": 0}
    )
    assert scores[MMHAL]["metrics"] == {"len_words": 6, "empty_rate": 0}
    assert [scores[task]["n"] for task in TASKS] == [8, 2]
    assert [scores[task]["images"] for task in TASKS] == [3, 2]  # text alone is no picture
    assert finished.results["paired"]["noop"][HALLUSION]["mcnemar"]["p"] == 1
    for task in TASKS:
        harness = finished.results["results"]["noop"][task]
        assert {name: harness[f"{name},none"] for name in scores[task]["metrics"]} == scores[task]["metrics"]
    assert "hallusion" in (finished.folder / "report.html").read_text()


def test_the_sample_file_scores_the_same(root: Path) -> None:
    rows = list(read_json_lines(finish(root, Teller(), methods=[]).folder / "samples.jsonl"))
    answers = [write_lines(root / f"{task}.jsonl", [row for row in rows if row["task"] == task]) for task in TASKS]
    assert score_file("mmhal", answers[1], root / "data").metrics == {"len_words": 6, "empty_rate": 0}
    ours = judged_raters.hallusion().score([row for row in rows if row["task"] == HALLUSION], resamples=10)["metrics"]
    for questions, end in (("image", ""), ("all", "_all")):
        theirs = score_file("hallusionbench", answers[0], root / "data", questions=questions).metrics
        assert {name: ours[name + end] for name in ("a_acc", "q_acc")} == {n: theirs[n] for n in ("a_acc", "q_acc")}
        assert ours["f_acc"] == theirs["f_acc"]


def test_each_question_is_asked_about_its_own_picture_or_none(root: Path) -> None:
    backend = Teller()
    finish(root, backend, methods=[])
    pictures = [image if image is None else np.asarray(image).tobytes() for image, _ in backend.seen]
    assert [place for place, picture in enumerate(pictures) if picture is None] == [6, 7]  # the last of HallusionBench
    assert pictures[0] == pictures[1] != pictures[4] == pictures[5]  # one file name in two folders
    assert backend.seen[0][1] == f"{CAT}\nAnswer the question using a single word or phrase."
    assert backend.seen[-1][1] == "What is it?"


@pytest.mark.parametrize("place", ["VD/map/0_1.png", "1_o.jpg"])
def test_a_missing_picture_is_never_replaced_by_another(root: Path, place: str) -> None:
    (root / "images" / place).rename(root / "images" / place.replace("1", "7"))
    with pytest.raises(FileNotFoundError, match=f"1 pictures are not below.*{place}"):
        finish(root, Teller())


@needs("hallusionbench")
@needs("mmhal_bench")
def test_published_files() -> None:
    asked, open_ones = (documents(task, str(DATA)) for task in TASKS)
    assert (len(asked), sum(not doc["image"] for doc in asked)) == (1129, 178)
    assert len({doc["image"] for doc in asked if doc["image"]}) == 346
    assert len({doc["image"] for doc in open_ones}) == len(open_ones) == 96


@needs("hallusionbench")
def test_published_questions_score_like_an_answer_file(tmp_path: Path) -> None:
    docs = documents(HALLUSION, str(DATA))
    texts = [("Yes", "No.", "I cannot tell.")[len(doc["question"]) % 3] for doc in docs]
    samples = [{"doc_id": i, "doc": doc, "text": text} for i, (doc, text) in enumerate(zip(docs, texts, strict=True))]
    ours = judged_raters.hallusion().score(samples, resamples=10)["metrics"]
    answers = write_lines(tmp_path / "a.jsonl", samples)
    few, every = (score_file("hallusionbench", answers, DATA, questions=q).metrics for q in ("image", "all"))
    assert 0 < few["q_acc"] < 1
    assert ours == pytest.approx({**few, "a_acc_all": every["a_acc"], "q_acc_all": every["q_acc"]})
