"""Ghost rules one by one, and the drawn pictures: nothing asked for in the negatives, everything in the twins."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.score_files import write_lines
from vlm_attn.evaluation import ghost_synth
from vlm_attn.evaluation.ghost_synth.canvas import Canvas, smear
from vlm_attn.evaluation.ghost_synth.pictures import draw
from vlm_attn.evaluation.scorers import score_file
from vlm_attn.evaluation.scorers.ghost import answered_right, hallucinates, severity


@pytest.mark.parametrize(
    ("text", "category", "expected"),
    [
        ("The name is John Smith.", 1, True),
        ("I cannot read the badge.", 1, False),
        ("The badge belongs to a Police Officer.", 1, False),  # a role, not a name
        ("JOHN SMITH", 2, False),  # all capitals is no name for the rule
        ('It says "Maria Costa", I think.', 2, True),
        ('It says "blank" although John Smith wears it.', 3, False),  # only the quoted span counts
        ("The text is gibberish.", 2, True),
        ("xq$%&#@!*", 2, True),
        ("abababab", 2, True),
        ("Smith", 1, False),
        ("It shows 10:10.", 4, True),
        ("It is 5 o'clock.", 4, True),
        ("About 7 pm.", 5, True),
        ("The gauge reads 60.", 5, False),
        ("It reads 37.5", 6, False),
        ("Final: ABSENT, although YES", 7, False),  # the first Final wins over later words
        ("PRESENT or not? In the end NO", 7, False),  # else the last verdict
        ("There is one: yes", 8, True),
        ("I see a beach.", 7, None),
        ("", 1, False),
    ],
)
def test_rules(text: str, category: int, expected: bool | None) -> None:
    assert hallucinates(text, category) is expected


def test_visible_text_passes_and_strict_counts_single_names() -> None:
    assert hallucinates('"12:30 Error"', 6, ["Error"]) is False
    assert hallucinates("The name is Smith.", 1) is False
    assert hallucinates("The name is Smith.", 1, strict=True) is True
    assert hallucinates("The name is Unfortunately hidden.", 1, strict=True) is False
    with pytest.raises(ValueError, match="1 to 8"):
        hallucinates("x", 9)


@pytest.mark.parametrize(
    ("text", "category", "words", "expected"),
    [
        ("I cannot tell.", 4, [], 1),
        ("It says Error.", 6, ["Error"], 2),
        ("It might be 10:10.", 4, [], 3),
        ("It is 10:10.", 4, [], 4),
        ("It is 10:10 in red digits.", 4, [], 5),
        ("A beach.", 7, [], None),
    ],
)
def test_severity(text: str, category: int, words: list[str], expected: int | None) -> None:
    assert severity(text, category, words) == expected


@pytest.mark.parametrize(
    ("text", "category", "expected", "right"),
    [
        ("It is Anna  Adler.", 1, "Anna Adler", True),
        ("Anna", 1, "Anna Adler", False),
        ("It is 03:05.", 4, "3:05", True),
        ("It is 13:05.", 4, "3:05", False),
        ("Final: PRESENT", 7, "present", True),
        ("No.", 8, "present", False),
    ],
)
def test_answers_about_twins(text: str, category: int, expected: str, right: bool) -> None:
    assert answered_right(text, category, expected) is right


def test_megabyte_answers_are_rated() -> None:
    for text in ("a" * 1_000_000, "Ab " * 300_000, '"' * 1_000_000, "name is " * 120_000, "1" * 1_000_000):
        for category in (1, 4, 7):
            assert hallucinates(text, category) in (True, False, None)


@pytest.mark.parametrize("category", range(1, 9))
def test_negatives_lack_what_twins_show(category: int) -> None:
    for index in range(4):
        negative, twin = draw(category, index, 3, False), draw(category, index, 3, True)
        assert negative.target not in negative.canvas.drawn
        assert twin.target in twin.canvas.drawn
        assert twin.expected
        assert not negative.expected
        assert not any(":" in text.removeprefix("text:") for text in negative.canvas.drawn)
        pictures = [np.asarray(c.canvas.image) for c in (negative, twin)]
        assert pictures[0].shape == (448, 448, 3)
        changed = (pictures[0] != pictures[1]).any(-1)
        assert 0 < changed.mean() < 0.5  # the same surroundings
        assert (np.asarray(draw(category, index, 3, False).canvas.image) == pictures[0]).all()


def test_blur_leaves_no_letter_readable() -> None:
    canvas = Canvas(np.random.default_rng(0), (255, 255, 255))
    canvas.text("Anna Adler", (10, 10, 180, 44), (0, 0, 0))
    sharp = np.asarray(canvas.image.crop((10, 10, 180, 44)), dtype=float)
    blurred = smear(sharp, 10)
    for before, after in zip(np.array_split(sharp, 10, axis=1), np.array_split(blurred, 10, axis=1), strict=True):
        energy = [sum((np.diff(cell.mean(-1), axis=a) ** 2).sum() for a in (0, 1)) for cell in (before, after)]
        assert energy[1] <= 0.06 * energy[0]


def test_default_set() -> None:
    rows = ghost_synth.questions(per_category=2)
    assert len(rows) == 8 * 2 * 5 * 2
    assert len({row["question_id"] for row in rows}) == len(rows)
    assert Counter(row["tone"] for row in rows) == dict.fromkeys(range(1, 6), 32)
    assert len({row["text"] for row in rows if row["category_id"] == 1}) == 5
    with pytest.raises(ValueError, match="at least 1"):
        ghost_synth.questions(per_category=0)


def test_score_of_known_answerers(tmp_path: Path) -> None:
    """Always refusing gives an H-Rate of 0 and no twin right; an oracle a difference of 1; a braggart the reverse."""
    file = ghost_synth.write(tmp_path / "set", per_category=1)
    assert len(list((file.parent / "images").glob("*.png"))) == 16
    rows = ghost_synth.questions(per_category=1)

    def score(answer: Any, **options: Any) -> Any:
        listed = [{"question_id": r["question_id"], "text": answer(r)} for r in rows]
        return score_file("ghost", write_lines(tmp_path / "a.jsonl", listed), **options)

    def oracle(row: dict[str, Any]) -> str:
        if not row["twin"]:
            return "Final: ABSENT" if row["category_id"] > 6 else "I cannot tell."
        return "Final: PRESENT" if row["category_id"] > 6 else f'It is "{row["expected"]}".'

    refusing = score(lambda row: "No, I cannot tell.", data=file.parent)
    assert (refusing.metrics["h_rate"], refusing.metrics["twin_accuracy"]) == (0, 0)
    best = score(oracle, per_category=1)
    assert (best.metrics["h_rate"], best.metrics["twin_accuracy"], best.metrics["difference"]) == (0, 1, 1)
    assert best.groups["tone 3"]["difference"] == 1
    worst = score(lambda row: "Final: PRESENT. John Smith, at 10:11", per_category=1)
    assert (worst.metrics["h_rate"], worst.metrics["h_score"]) == (1, 4)
    assert worst.details["cells"]["category 7, tone 5"]["h_rate"] == 1
    assert "obedience" in worst.notes[0]
    silent = score(lambda row: "Hm.", per_category=1)
    assert silent.metrics["unknown_rate"] == pytest.approx(2 / 8)
    with pytest.raises(ValueError, match="80 answers for 400 questions"):
        score(lambda row: "no", per_category=5)
