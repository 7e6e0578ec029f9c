"""POPE from answer files: sources, splits, old and merged forms, conversations, first-token reading."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import vlm_attn
from tests.score_files import DATA, needs, rows_of, write_lines
from vlm_attn.evaluation.first_token import AnswerTokens, FirstTokenError, answer_tokens, first_token_answers
from vlm_attn.evaluation.scorers import score_file
from vlm_attn.evaluation.scorers.pope import SOURCES, SPLITS, conversations, pope_questions
from vlm_attn.scenes import benchmarks

pytestmark = needs("pope")


def questions(name: str) -> list[dict[str, Any]]:
    return rows_of(DATA / "pope" / f"{name}.jsonl")


def answered(name: str, **extra: Any) -> list[dict[str, Any]]:
    """Every third question answered wrongly."""
    return [
        {"question_id": q["question_id"], "image": q["image"], "prompt": q["text"], **extra,
         "text": q["label"] if i % 3 else {"yes": "no", "no": "yes"}[q["label"]]}
        for i, q in enumerate(questions(name))
    ]  # fmt: skip


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("split", SPLITS)
def test_the_question_file_is_found_from_the_rows(source: str, split: str, tmp_path: Path) -> None:
    report = score_file("pope", write_lines(tmp_path / "a.jsonl", answered(f"{source}_pope_{split}")), DATA)
    assert list(report.groups) == [f"{source} {split}"]
    assert report.metrics["accuracy"] == pytest.approx(2 / 3)
    assert f"{source}_pope_{split}.jsonl" in report.files
    assert set(report.details[f"{source} {split}"]["parsers"]) == {
        "pope",
        "opera",
        "vcd",
        "strict",
        "vlmevalkit",
        "ours",
    }


def test_ids_alone_do_not_tell_the_split(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"question_id": i, "text": "yes"} for i in range(1, 3001)])
    with pytest.raises(ValueError, match="name source and split"):
        score_file("pope", path, DATA)
    report = score_file("pope", path, DATA, source="coco", split="popular")
    assert (report.metrics["recall"], report.metrics["yes_ratio"]) == (1, 1)


def test_the_older_random_split(tmp_path: Path) -> None:
    report = score_file("pope", write_lines(tmp_path / "a.jsonl", answered("coco_pope_random_legacy2910")), DATA)
    assert (list(report.groups), report.n) == (["coco random legacy2910"], 2910)


def test_llava_merged_ids_and_its_average(tmp_path: Path) -> None:
    rows = []
    for offset, name in ((0, "coco_pope_adversarial"), (10_000_000, "coco_pope_random_legacy2910"),
                         (20_000_000, "coco_pope_popular")):  # fmt: skip
        for row in answered(name):
            rows.append({"question_id": row["question_id"] + offset, "text": "yes", "prompt": row["prompt"]})
    report = score_file("pope", write_lines(tmp_path / "a.jsonl", rows[::-1]), DATA)
    assert report.n == 8910
    f1 = [
        2 * p / (p + 1) for p in (1500 / 3000, 1500 / 2910, 1500 / 3000)
    ]  # all yes: recall 1, precision = share of yes
    assert report.metrics["f1"] == pytest.approx(sum(f1) / 3)
    assert not report.notes


def test_categories_split_a_merged_log(tmp_path: Path) -> None:
    rows = [row for split in SPLITS for row in answered(f"coco_pope_{split}", category=split)]
    report = score_file("pope", write_lines(tmp_path / "a.jsonl", rows), DATA / "pope")
    assert (report.n, set(report.groups)) == (9000, {f"coco {split}" for split in SPLITS})


def test_unequal_recall_on_coco_is_noted(tmp_path: Path) -> None:
    rows = [row for split in SPLITS for row in answered(f"coco_pope_{split}", category=split)]
    first_yes = next(row for row, q in zip(rows, questions("coco_pope_random"), strict=False) if q["label"] == "yes")
    first_yes["text"] = {"yes": "no", "no": "yes"}[first_yes["text"]]
    assert "Recall differs" in score_file("pope", write_lines(tmp_path / "a.jsonl", rows), DATA).notes[0]


def test_conversations_score_like_single_turns(tmp_path: Path) -> None:
    listed = pope_questions(DATA / "pope" / "coco_pope_popular.jsonl")
    chats = conversations(listed)
    assert (len(chats), {len(chat) for chat in chats}) == (500, {6})
    rows = [{"image": chat[0].image, "text": [q.row["label"] for q in chat]} for chat in chats]
    report = score_file("pope", write_lines(tmp_path / "a.jsonl", rows), DATA, source="coco", split="popular")
    assert (report.n, report.metrics["accuracy"]) == (3000, 1)


# ---- first-token mode


class Tokenizer:
    """Pieces of fixed ids, in the manner of a byte-pair vocabulary: a word with its blank is another token."""

    table: ClassVar = {
        "yes": [1], "Yes": [2], "YES": [90, 91], " yes": [3], " Yes": [4], " YES": [5],
        "no": [11], "No": [12], "NO": [13], " no": [14], " No": [15], " NO": [16],
    }  # fmt: skip

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        for context in ("ASSISTANT:", ""):
            if text.startswith(context) and text[len(context) :] in {**self.table, "": []}:
                return [50] * bool(context) + self.table.get(text[len(context) :], [])
        raise AssertionError(text)


def test_token_ids_come_from_the_tokenizer() -> None:
    tokens = answer_tokens(Tokenizer(), "ASSISTANT:")
    assert set(tokens.yes) == {1, 2, 3, 4, 5}
    assert set(tokens.no) == {11, 12, 13, 14, 15, 16}


def test_reading_the_scores() -> None:
    tokens = AnswerTokens(yes=(1, 2), no=(3,))
    assert tokens.read(torch.tensor([9.0, 0.0, 2.0, 1.0])) == "yes"  # the best of either side, whatever else is higher
    assert tokens.read(torch.tensor([0.0, 1.0, 1.0, 1.0])) == "no"  # a tie is not more
    masked = torch.full((4,), float("-inf"))
    assert tokens.read(masked) == "unknown"


def test_a_tokenizer_without_single_tokens_is_refused() -> None:
    class Letters:
        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            return [ord(c) for c in text]

    with pytest.raises(FirstTokenError, match="generate text"):
        answer_tokens(Letters())


@pytest.fixture(scope="module")
def samples() -> list[tuple[Any, str]]:
    return [
        (benchmarks.load_image(row), row["question"]) for row in benchmarks.pope("random", seeds="calibration")[:4]
    ]


@pytest.mark.parametrize("method", [None, "vcd"])
def test_first_tokens_agree_with_text(method: str | None, samples: list[tuple[Any, str]]) -> None:
    with vlm_attn.wrap("scenes", method) as vlm:
        fast = first_token_answers(vlm, samples)
        slow = [vlm.ask(image, question).text for image, question in samples]
    assert [text.lower().startswith(word) for text, word in zip(slow, fast, strict=True)] == [True] * len(samples)


def test_the_guard_stops_a_mode_that_would_be_wrong(samples: list[tuple[Any, str]]) -> None:
    """Asked for a description, the model begins with neither word."""
    with (
        vlm_attn.wrap("scenes") as vlm,
        pytest.raises(FirstTokenError, match="2 questions answered both ways, 2 began with another token"),
    ):
        first_token_answers(vlm, [(image, "Please describe this image in detail.") for image, _ in samples[:2]])
