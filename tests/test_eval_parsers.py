"""POPE parsers and metrics: the spec's cases one by one, then invariants of the published question files."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from vlm_attn.evaluation.parsers import PARSERS, parse_answer, pope_metrics

DATA = Path(os.environ.get("VLM_ATTN_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
needs_pope = pytest.mark.skipif(
    not (DATA / "pope").is_dir(), reason="published POPE files absent (set VLM_ATTN_DATA to their folder)"
)


def rows(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (DATA / "pope" / f"{name}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes", "yes"),
        ("No", "no"),
        ("no", "no"),
        ("No, there is no dog.", "no"),
        ("Yes. There is no dog.", "yes"),  # only what precedes the first period counts
        ("", "yes"),  # every non-no is yes
        ("NO", "yes"),
        ("No!", "yes"),
        ("none", "yes"),
        ("There isn't", "yes"),
        ("no\nThere", "yes"),  # single blanks only
        ("yes, not sure", "no"),
        ("nothing", "yes"),
    ],
)
def test_official_parser(text: str, expected: str) -> None:
    assert parse_answer(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("NO", "no"),
        ("There isn't any", "no"),
        ("Yes. It is not small.", "no"),  # reads the whole answer
        ("Yes.", "yes"),
        ("No.", "no"),
        ("", "yes"),
        ("nope", "yes"),
    ],
)
def test_opera_parser(text: str, expected: str) -> None:
    assert parse_answer(text, "opera") == expected


@pytest.mark.parametrize(
    ("text", "label", "expected"),
    [
        ("Yes, I know", "yes", "yes"),
        ("Yes, I know", "no", "no"),  # "know" holds "no": right for both labels
        ("another", "no", "no"),
        ("  YES ", "yes", "yes"),
        ("maybe", "yes", "no"),
        ("maybe", "no", "yes"),
    ],
)
def test_vcd_parser_depends_on_the_label(text: str, label: str, expected: str) -> None:
    assert parse_answer(text, "vcd", label) == expected


def test_vcd_parser_without_label_raises() -> None:
    with pytest.raises(ValueError, match="label"):
        parse_answer("yes", "vcd")


@pytest.mark.parametrize(
    ("text", "expected"), [(" Yes ", "yes"), ("no", "no"), ("Yes.", "unknown"), ("no!", "unknown"), ("", "unknown")]
)
def test_strict_parser(text: str, expected: str) -> None:
    assert parse_answer(text, "strict") == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes.", "yes"),
        ("No, there is none", "no"),
        ("yes and no", "unknown"),
        ("yesterday", "unknown"),
        ("", "unknown"),
        ("(yes)", "yes"),
        ("yes/no", "unknown"),
        ("Answer: NO!", "no"),
    ],
)
def test_vlmevalkit_parser(text: str, expected: str) -> None:
    assert parse_answer(text, "vlmevalkit") == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("I do not know, maybe yes", "yes"),  # not the substring of "know"
        ("The answer is No.", "no"),
        ("YES!", "yes"),
        ("nothing here", "unknown"),
        ("word " * 20 + "yes", "unknown"),
        ("word " * 19 + "yes", "yes"),
    ],
)
def test_our_parser(text: str, expected: str) -> None:
    assert parse_answer(text, "ours") == expected


def test_metrics_by_hand() -> None:
    score = pope_metrics(["yes", "yes", "no", "no", "yes"], ["yes", "no", "no", "yes", "yes"])
    assert (score.tp, score.fp, score.tn, score.fn) == (2, 1, 1, 1)
    assert score.accuracy == pytest.approx(3 / 5)
    assert score.precision == pytest.approx(2 / 3)
    assert score.recall == pytest.approx(2 / 3)
    assert score.f1 == pytest.approx(2 / 3)
    assert score.yes_ratio == pytest.approx(3 / 5)  # of the predictions; the labels say yes 3 of 5 as well


def test_yes_ratio_counts_predictions_not_labels() -> None:
    assert pope_metrics(["yes"] * 4, ["yes", "no", "yes", "no"]).yes_ratio == 1.0


def test_zero_denominators_give_zero() -> None:
    score = pope_metrics(["no", "no"], ["no", "no"])
    assert (score.precision, score.recall, score.f1, score.accuracy) == (0, 0, 0, 1)
    assert pope_metrics([], []).accuracy == 0


def test_unreadable_answers() -> None:
    labels = ["yes", "no"]
    strict = pope_metrics(["perhaps", "perhaps"], labels, "strict")
    assert (strict.accuracy, strict.unknown_rate, strict.fn, strict.tn) == (0, 1, 0, 0)
    kit = pope_metrics(["perhaps", "perhaps"], labels, "vlmevalkit")  # scores 0 = no in F1, wrong in accuracy
    assert (kit.accuracy, kit.unknown_rate, kit.fn, kit.tn) == (0, 1, 1, 1)


def test_mismatches_raise() -> None:
    with pytest.raises(ValueError, match="truncated"):
        pope_metrics(["yes"], ["yes", "no"])
    with pytest.raises(ValueError, match="Id mismatch at position 1"):
        pope_metrics(["yes", "no"], ["yes", "no"], answer_ids=[1, 3], label_ids=[1, 2])
    with pytest.raises(ValueError, match="Duplicate"):
        pope_metrics(["yes", "no"], ["yes", "no"], answer_ids=[1, 1], label_ids=[1, 2])
    with pytest.raises(ValueError, match="label must be"):
        pope_metrics(["yes"], ["maybe"])
    with pytest.raises(TypeError, match="string"):
        pope_metrics([None], ["yes"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="Did you mean 'vlmevalkit'"):
        pope_metrics(["yes"], ["yes"], "vlmeval_kit")


@needs_pope
@pytest.mark.parametrize("source", ["coco", "aokvqa", "gqa"])
@pytest.mark.parametrize("split", ["random", "popular", "adversarial"])
def test_published_files_are_balanced(source: str, split: str) -> None:
    questions = rows(f"{source}_pope_{split}")
    labels = [q["label"] for q in questions]
    assert (labels.count("yes"), labels.count("no")) == (1500, 1500)
    if source == "coco":  # the others do not alternate throughout
        assert labels == ["yes", "no"] * 1500
    perfect = pope_metrics([label.capitalize() for label in labels], labels, answer_ids=range(3000),
                           label_ids=range(3000))  # fmt: skip
    assert (perfect.accuracy, perfect.f1, perfect.yes_ratio) == (1, 1, 0.5)


@needs_pope
def test_a_fixed_answerer_has_equal_recall_on_the_three_coco_splits() -> None:
    """The 1,500 yes questions are shared, so an answer that depends on the question alone gives one recall."""
    recalls = set()
    for split in ("random", "popular", "adversarial"):
        questions = rows(f"coco_pope_{split}")
        answers = ["yes" if len(q["text"]) % 3 else "no" for q in questions]
        recalls.add(pope_metrics(answers, [q["label"] for q in questions]).recall)
    assert len(recalls) == 1


@needs_pope
def test_legacy_file_is_shorter_and_reported_by_n() -> None:
    questions = rows("coco_pope_random_legacy2910")
    labels = [q["label"] for q in questions]
    assert (len(labels), labels.count("yes")) == (2910, 1500)
    assert pope_metrics(labels, labels).n == 2910
    with pytest.raises(ValueError, match="2910"):
        pope_metrics(labels, [q["label"] for q in rows("coco_pope_random")])


@needs_pope
def test_coco_labels_agree_with_the_chair_ground_truth() -> None:
    truth = json.loads((DATA / "chair" / "gt_objects_val2014_A.json").read_text())
    classes, images = truth["classes"], truth["objects"]
    for split in ("random", "popular", "adversarial"):
        for question in rows(f"coco_pope_{split}"):
            image = str(int(question["image"].removesuffix(".jpg")[-12:]))
            words = question["text"].removeprefix("Is there ").removesuffix(" in the image?").split(" ", 1)[1]
            assert (classes.index(words) in images[image]) == (question["label"] == "yes")


def test_every_parser_is_listed() -> None:
    assert list(PARSERS) == ["pope", "opera", "vcd", "strict", "vlmevalkit", "ours"]
