"""AMBER, MME, HallusionBench and MMHal-Bench: by hand, and on the published files."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.score_files import DATA, needs, rows_of, write_lines
from vlm_attn.evaluation.mme import mme_parse
from vlm_attn.evaluation.scorers import score_file
from vlm_attn.evaluation.scorers.amber import Vocabulary, amber_captions, amber_questions, count_response
from vlm_attn.evaluation.scorers.hallusionbench import hallusion_metrics
from vlm_attn.evaluation.scorers.judge import JudgeItem, read_rating, read_verdict
from vlm_attn.evaluation.scorers.mme import COGNITION, HALLUCINATION, PERCEPTION

# ---- AMBER

SINGLE_WORD = "\nAnswer the question using a single word or phrase."
WORDS = Vocabulary({"person": ["man", "woman"], "sky": [], "dog": [], "sea": ["water"], "boat": ["ship"], "sun": []},
                   frozenset({"line"}))  # fmt: skip


def test_amber_counts_by_hand() -> None:
    nouns = ["man", "woman", "sky", "line", "dog", "dog", "ship", "water"]
    count = count_response(nouns, ["person", "sky", "sea"], ["boat", "sun"], WORDS)
    assert count.hallucinated == ("dog", "dog", "ship")
    assert (count.covered, count.truth) == (3, 3)
    assert (count.imagined, count.imaginable) == (1, 2)
    clean = count_response(["sky"], ["sky", "sky"], ["dog"], WORDS)  # a repeated object is covered once
    assert (clean.covered, clean.truth) == (1, 2)
    figures = amber_captions([count, clean])
    assert figures == {
        "chair": pytest.approx(3 / 9),  # safe words stay in the denominator
        "cover": pytest.approx(4 / 5),
        "hal": pytest.approx(1 / 2),
        "cog": pytest.approx(1 / 3),
    }


def test_amber_word_vectors_are_an_option() -> None:
    def alike(a: str, b: str) -> bool:
        return {a, b} in ({"dog", "sun"}, {"boat", "water"}) or a == b

    count = count_response(["dog", "boat"], ["sea"], ["sun"], WORDS, alike)
    assert (count.hallucinated, count.imagined, count.covered) == (("dog",), 1, 1)


def test_amber_questions_take_no_as_the_positive_class() -> None:
    figures = amber_questions(["no", "no", "yes", "unknown", "yes"], ["no", "yes", "no", "no", "yes"])
    assert figures == {"accuracy": pytest.approx(2 / 5), "precision": pytest.approx(1 / 2),
                       "recall": pytest.approx(1 / 3), "f1": pytest.approx(2 / 5),
                       "unknown_rate": pytest.approx(1 / 5)}  # fmt: skip


@needs("amber")
@needs("chair")
def test_amber_file_whole_part_and_cut(tmp_path: Path) -> None:
    annotations = rows_of(DATA / "amber" / "annotations.jsonl")
    rows = [{"id": a["id"], "response": "A dog." if a["type"] == "generative" else a["truth"].capitalize()}
            for a in annotations]  # fmt: skip
    path = tmp_path / "a.json"
    path.write_text(json.dumps(rows))
    report = score_file("amber", path, DATA)
    assert (report.n, report.groups["generative"]["n"], report.groups["relation"]["n"]) == (15220, 1004, 1664)
    assert (report.metrics["accuracy"], report.metrics["f1"]) == (1, 1)
    dogs = [a for a in annotations if a["type"] == "generative"]
    with_dog = sum("dog" in a["truth"] for a in dogs)
    assert report.metrics["hal"] == pytest.approx(1 - with_dog / 1004)
    assert report.metrics["score"] == pytest.approx((100 - 100 * report.metrics["chair"] + 100) / 2)
    generative = score_file("amber", write_lines(path, rows[:1004]), DATA / "amber")
    assert generative.metrics == {k: report.metrics[k] for k in ("chair", "cover", "hal", "cog")}
    assert "existence" in generative.notes[0]
    with pytest.raises(ValueError, match="1 questions have no answer.*partial"):
        score_file("amber", write_lines(path, rows[:1003]), DATA)
    assert score_file("amber", path, DATA, partial=True).n == 1003
    with pytest.raises(ValueError, match="Duplicate id '1'"):
        score_file("amber", write_lines(path, [*rows[:1004], rows[0]]), DATA)


@needs("amber")
def test_amber_rows_may_name_their_picture(tmp_path: Path) -> None:
    """Several yes/no questions share a picture, so its number is not the question's."""
    types = {a["id"]: a["type"] for a in rows_of(DATA / "amber" / "annotations.jsonl")}
    rows = [
        {**q, "response": "No"} for q in rows_of(DATA / "amber" / "query_all.jsonl") if types[q["id"]] == "relation"
    ]
    path = tmp_path / "a.jsonl"
    assert score_file("amber", write_lines(path, rows), DATA).metrics["recall"] == 1
    with pytest.raises(ValueError, match="line 2 is about image 'AMBER_9999.jpg'"):
        score_file("amber", write_lines(path, [rows[0], {**rows[1], "image": "AMBER_9999.jpg"}, *rows[2:]]), DATA)


@needs("amber")
def test_amber_answers_are_normalised_unless_exact(tmp_path: Path) -> None:
    relations = [a for a in rows_of(DATA / "amber" / "annotations.jsonl") if a["type"] == "relation"]
    path = write_lines(tmp_path / "a.jsonl", [{"id": a["id"], "response": "no, it is not"} for a in relations])
    assert score_file("amber", path, DATA).metrics["accuracy"] == 1
    exact = score_file("amber", path, DATA, parser="exact").metrics
    assert (exact["accuracy"], exact["unknown_rate"]) == (0, 1)


# ---- MME


@pytest.mark.parametrize(
    ("text", "official", "lmms"),
    [("Yes", "yes", "yes"), ("y", "other", "yes"), ("N", "other", "no"), (" no.", "no", "no"), ("  No.", "no", "no"),
     ("   No", "other", "no"), ("it is", "other", "other")],
)  # fmt: skip
def test_mme_readings(text: str, official: str, lmms: str) -> None:
    assert (mme_parse(text), mme_parse(text, "lmms")) == (official, lmms)


def tool_folder(folder: Path, answers: dict[str, str] | None = None) -> Path:
    """A whole benchmark of 14 categories with 2 images each; every "no" question is answered by ``answers``."""
    folder.mkdir()
    for category in (*PERCEPTION, *COGNITION):
        lines = []
        for image in ("0001.png", "0002.png"):
            lines.append(f"{image}\tIs it there? Please answer yes or no.\tYes\tYes, it is")
            lines.append(f"{image}\tIs it not there? Please answer yes or no.\tNo\t{(answers or {}).get(image, 'No')}")
        (folder / f"{category}.txt").write_text("\n".join(lines) + "\n")
    return folder


def test_mme_tool_folder_whole_benchmark(tmp_path: Path) -> None:
    right = score_file("mme", tool_folder(tmp_path / "right"))
    assert (right.metrics["perception"], right.metrics["cognition"]) == (2000, 800)
    half = score_file("mme", tool_folder(tmp_path / "half", {"0002.png": "Yes"}))
    assert half.groups["OCR"] == {"n": 4, "acc": 0.75, "acc_plus": 0.5, "score": pytest.approx(125)}
    assert half.metrics["hallucination"] == pytest.approx(4 * 125)
    assert (half.metrics["object_level"], half.metrics["attribute_level"]) == (250, 250)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0003.png\tIs it?\tYes\tYes\n", "other than two questions"),
        ("0001.png\tIs it?\tYes\n", "3 of the 4 columns"),
        ("0001.png\tIs it?\tMaybe\tYes\n", "label must be"),
        ("0001.png\tIs it there?\tYes\tno\n", "two questions"),
    ],
)
def test_mme_tool_folder_mistakes(line: str, message: str, tmp_path: Path) -> None:
    folder = tool_folder(tmp_path / "bad")
    with (folder / "count.txt").open("a") as file:
        file.write(line)
    with pytest.raises(ValueError, match=message):
        score_file("mme", folder)


@needs("mme")
def test_mme_llava_rows_share_an_id(tmp_path: Path) -> None:
    questions = rows_of(DATA / "mme" / "mme_hallucination_240.jsonl")
    rows = [
        {
            "question_id": f"{q['category']}/{q['image']}",
            "prompt": q["question"].removesuffix(" Please answer yes or no.") + SINGLE_WORD,
            "text": q["answer"] if i else "maybe",
        }
        for i, q in enumerate(questions)
    ]  # fmt: skip
    report = score_file("mme", write_lines(tmp_path / "a.jsonl", rows[::-1]), DATA)
    lost = 100 / 60 + 100 / 30
    assert report.metrics["hallucination"] == pytest.approx(800 - lost)
    assert report.details["other_answers"] == 1
    assert list(report.groups) == list(HALLUCINATION)
    with pytest.raises(ValueError, match="have no answer|for 240 questions"):
        score_file("mme", write_lines(tmp_path / "a.jsonl", rows[:-1]), DATA)
    wrong = [{**q, "text": "yes", "label": "yes"} for q in questions]
    with pytest.raises(ValueError, match="the other one"):
        score_file(
            "mme",
            write_lines(tmp_path / "a.jsonl", [{k: v for k, v in r.items() if k != "answer"} for r in wrong]),
            DATA,
        )


# ---- HallusionBench


def hallusion(category: str, figure: int, question: int) -> dict[str, Any]:
    return {"category": category, "subcategory": "map", "set_id": 0, "figure_id": figure, "question_id": question}


def test_hallusion_by_hand() -> None:
    rows = [hallusion("VS", f, q) for f in (0, 1, 2) for q in (0, 1)]
    right = [False, True, True, True, True, False]
    assert hallusion_metrics(rows, right) == {
        "a_acc": pytest.approx(4 / 6),
        "f_acc": pytest.approx(1 / 2),  # figure 0 is no figure
        "q_acc": 0,  # question 0 fails without the figure, question 1 on figure 2
    }


@needs("hallusionbench")
def test_hallusion_published_counts_and_judge_free_reading(tmp_path: Path) -> None:
    questions = json.loads((DATA / "hallusionbench" / "HallusionBench.json").read_text())
    shown = [q for q in questions if q["visual_input"] != "0"]
    assert len(shown) == 951
    assert len({(q["category"], q["subcategory"], q["set_id"], q["figure_id"]) for q in shown}) == 346
    assert len({(q["category"], q["subcategory"], q["set_id"], q["question_id"]) for q in questions}) == 455
    rows = [{**q, "model_prediction": "Yes." if q["gt_answer"] == "1" else "No, it is not."} for q in questions]
    path = tmp_path / "h.json"
    path.write_text(json.dumps(rows))
    report = score_file("hallusionbench", path, DATA)
    assert (report.n, report.metrics) == (951, {"a_acc": 1, "f_acc": 1, "q_acc": 1})
    assert score_file("hallusionbench", path, DATA, questions="all").n == 1129
    path.write_text(json.dumps([{**q, "model_prediction": "I cannot tell."} for q in questions]))
    unsure = score_file("hallusionbench", path, DATA, questions="all")
    assert unsure.metrics["a_acc"] == pytest.approx(178 / 1129)  # not knowing is right without a figure
    path.write_text(json.dumps(rows[:-1]))
    with pytest.raises(ValueError, match="have no answer|belong to no question"):
        score_file("hallusionbench", path, DATA)


@needs("hallusionbench")
def test_hallusion_with_a_judge(tmp_path: Path) -> None:
    questions = json.loads((DATA / "hallusionbench" / "HallusionBench.json").read_text())
    path = tmp_path / "h.json"
    path.write_text(json.dumps([{**q, "model_prediction": "hm"} for q in questions]))
    seen: list[JudgeItem] = []

    def judge(item: JudgeItem) -> str:
        seen.append(item)
        return "incorrect" if len(seen) == 1 else "correct"

    report = score_file("hallusionbench", path, DATA, questions="all", judge=judge)
    assert report.metrics["a_acc"] == pytest.approx(1128 / 1129)
    assert (seen[0].answer, seen[0].question) == ("hm", questions[0]["question"])


@pytest.mark.parametrize(
    ("reply", "verdict"), [("0", "wrong"), ("Correctness: 1", "right"), ("Unsure.", "unsure"), ("INCORRECT", "wrong")]
)
def test_verdicts(reply: str, verdict: str) -> None:
    assert read_verdict(reply) == verdict


def test_a_reply_without_verdict_is_an_error() -> None:
    with pytest.raises(ValueError, match="no verdict"):
        read_verdict("well")


# ---- MMHal-Bench


@pytest.mark.parametrize(
    ("reply", "rating"),
    [("Rating: 4", 4), ("so, rating: 0.", 0), ("4", 0), ("rating: 1 or rating: 2", 0), ("RATING: 6", 6)],
)
def test_ratings(reply: str, rating: int) -> None:
    assert read_rating(reply) == rating


@needs("mmhal_bench")
def test_mmhal_with_and_without_a_judge(tmp_path: Path) -> None:
    template = json.loads((DATA / "mmhal_bench" / "mmhal-bench_answer_template.json").read_text())
    filled = [{**item, "model_answer": "" if i == 5 else "two words"} for i, item in enumerate(template)]
    path = tmp_path / "m.json"
    path.write_text(json.dumps(filled[::-1]))
    plain = score_file("mmhal", path, DATA)
    assert plain.metrics == {"len_words": pytest.approx(190 / 96), "empty_rate": pytest.approx(1 / 96)}
    assert {row["n"] for row in plain.groups.values()} == {12}
    assert "judge" in plain.notes[0]
    types = Counter(item["question_type"] for item in template)
    assert len(types) == 8
    replies = [{"id": item["image_id"], "text": f"Rating: {2 if item['question_type'] == 'counting' else 5}"}
               for item in template]  # fmt: skip
    rated = score_file("mmhal", path, DATA, replies=str(write_lines(tmp_path / "r.jsonl", replies)))
    assert rated.metrics["mean_rating"] == pytest.approx((12 * 2 + 84 * 5) / 96)
    assert rated.metrics["hallucination_rate"] == pytest.approx(1 / 8)
    assert rated.groups["counting"]["hallucination_rate"] == 1
    with pytest.raises(ValueError, match="not both"):
        score_file("mmhal", path, DATA, replies="r", judge=lambda item: "rating: 1")
    path.write_text(json.dumps(filled[:95]))
    with pytest.raises(ValueError, match="95 answers for 96 questions"):
        score_file("mmhal", path, DATA)
