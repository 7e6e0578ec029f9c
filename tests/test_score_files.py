"""Answer files: every layout gives the same answers, and a hostile file an error that names its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.score_files import write_lines
from vlm_attn.evaluation.scorers import score_file
from vlm_attn.evaluation.scorers.files import image_number, read_answers
from vlm_attn.evaluation.scorers.pairing import Question, pair
from vlm_attn.evaluation.scorers.report import Report
from vlm_attn.evaluation.store import write_text

QUESTIONS = [
    {"question_id": i, "image": f"COCO_val2014_{i:012d}.jpg", "text": f"Is there a {what} in the image?", "label": yes}
    for i, (what, yes) in enumerate([("dog", "yes"), ("cat", "no"), ("car", "yes"), ("cup", "no")], 1)
]  # fmt: skip
ANSWERS = ["Yes", "Yes, maybe", "No.", "no"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    write_lines(folder / "coco_pope_random.jsonl", QUESTIONS)
    return folder


def layouts() -> dict[str, str]:
    """The same four answers as one finds them in the wild."""
    pairs = list(zip(QUESTIONS, ANSWERS, strict=True))
    shuffled = [pairs[i] for i in (2, 0, 3, 1)]
    rows: dict[str, list[Any]] = {
        "official": [{"question": q["text"], "answer": a} for q, a in pairs],
        "llava": [
            {"question_id": q["question_id"], "prompt": q["text"] + "\nUse one word.", "text": a, "model_id": "m"}
            for q, a in shuffled
        ],
        "question copied": [{**q, "answer": a} for q, a in shuffled],
        "image and question": [{"image": q["image"], "question": q["text"], "response": a} for q, a in shuffled],
        "old typo": [{"query": q["text"].replace("image", "imange"), "ans": a} for q, a in pairs],
        "bare": [{"caption": a} for a in ANSWERS],
        "numeric labels": [{"id": q["question_id"], "label": int(q["label"] == "yes"), "text": a} for q, a in pairs],
        "sample log": [
            {"doc_id": i, "doc": {"question_id": str(q["question_id"]), "answer": q["label"]}, "target": q["label"],
             "resps": [[a]], "filtered_resps": [a]}
            for i, (q, a) in enumerate(shuffled)
        ],
        "own run": [{"n": 9, "doc": {"question_id": q["question_id"], "text": ""}, "text": a} for q, a in shuffled],
    }  # fmt: skip
    out = {name: "".join(json.dumps(row) + "\n" for row in listed) for name, listed in rows.items()}
    official = rows["official"]
    return out | {
        "array": json.dumps(official),
        "indented array": json.dumps(official, indent=2),
        "wrapped in a document with an id": json.dumps({"model_id": "m", "output": official}),
        "wrapped, first line holds a field": '{"results": [\n' + ",\n".join(map(json.dumps, official)) + "\n]}",
        "indented, opened late": '{"model": "m",\n "results": ' + json.dumps(official, indent=2) + "}",
        "wrapped": json.dumps({"model": "m", "results": official}),
        "map": json.dumps({str(q["question_id"]): a for q, a in shuffled}),
        "indented map": json.dumps({str(q["question_id"]): a for q, a in shuffled}, indent=1),
        "byte order mark": "\ufeff" + out["official"],
        "windows": out["official"].replace("\n", "\r\n"),
        "blank lines": out["official"].replace("\n", "\n\n"),
        "no final newline": out["official"].rstrip("\n"),
    }


@pytest.mark.parametrize("name", list(layouts()))
def test_every_layout_gives_the_same_score(name: str, data: Path, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text(layouts()[name], encoding="utf-8", newline="")
    report = score_file("pope", path, data)
    assert [row["text"] for row in report.samples] == ANSWERS
    assert (report.metrics["accuracy"], report.metrics["recall"]) == (0.5, 0.5)
    assert report.details["coco random"]["parsers"]["pope"]["tp"] == 1


GOOD = [{"question_id": q["question_id"], "text": a} for q, a in zip(QUESTIONS, ANSWERS, strict=True)]


def changed(place: int, **values: Any) -> list[Any]:
    rows: list[Any] = [dict(row) for row in GOOD]
    rows[place] |= values
    return rows


HOSTILE: dict[str, tuple[Any, str]] = {
    "empty": ("", "empty"),
    "blank": ("\n \n", "empty"),
    "empty list": ("[]", "empty"),
    "cut last line": ("".join(json.dumps(r) + "\n" for r in GOOD)[:-9], "line 4 is not JSON.*last line"),
    "broken line": ('{"text": "yes"}\n{"text": yes}\n{"text": "no"}\n', "line 2 is not JSON"),
    "two values in one line": ('{"text": "a"}, {"text": "b"}\n{"text": "c"}\n', "line 1 is not JSON"),
    "no object": ('{"text": "yes"}\n3\n', "line 2 holds int"),
    "nested": ("[" * 100_000, "not JSON"),
    "huge number": ('{"text": ' + "9" * 5000 + "}\n", "line 1"),
    "short": (GOOD[:3], "1 questions have no answer.*'4'"),
    "long": ([*GOOD, {"question_id": 77, "text": "no"}], "1 answers belong to no question.*'77'"),
    "short without ids": ([{"text": "yes"}] * 3, "3 answers for 4 questions"),
    "duplicate id": (changed(2, question_id=2), "Duplicate id '2'.*line 2 and .*line 3"),
    "missing text": ([{"question_id": i} for i in range(1, 5)], "no answer field"),
    "null": (changed(1, text=None), "line 2: the answer is missing"),
    "NaN": (changed(1, text=float("nan")), "line 2: the answer is NaN"),
    "number": (changed(1, text=1), "line 2: the answer is int"),
    "two candidates": ([{**row, "answer": "no"} for row in GOOD], "several fields.*text, answer"),
    "label": (changed(0, label="maybe"), "line 1: A POPE label must be"),
    "other label": (changed(0, label="no"), "the other one"),
    "other image": (changed(3, image="COCO_val2014_000000000009.jpg"), "line 4 is about image"),
    "other question": (changed(3, prompt="Is there a zebra in the image?"), "line 4 answers 'Is there a zebra"),
}


@pytest.mark.parametrize("name", list(HOSTILE))
def test_hostile_files_are_refused_with_their_place(name: str, data: Path, tmp_path: Path) -> None:
    content, message = HOSTILE[name]
    path = tmp_path / "answers.jsonl"
    if isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    else:
        write_lines(path, content)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message):
        score_file("pope", path, data)
    assert path.read_bytes() == before


def test_bytes_that_are_no_text(data: Path, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_bytes(b'{"text": "\xff\xfe"}\n')
    with pytest.raises(ValueError, match="not UTF-8"):
        score_file("pope", path, data)
    with pytest.raises(FileNotFoundError, match="no file"):
        score_file("pope", tmp_path / "absent.jsonl", data)


@pytest.mark.parametrize("text", ["", "いいえ", "no\u2028", "\ud800 no", "y" * 1_000_000, "no " * 300_000, "\x00"])
def test_odd_texts_have_a_defined_score(text: str, data: Path, tmp_path: Path) -> None:
    """Empty, foreign, half a surrogate pair, a megabyte: scored by the parser's rule, and written out again."""
    report = score_file("pope", write_lines(tmp_path / "a.jsonl", changed(0, text=text)), data)
    assert report.n == 4
    assert report.samples[0]["prediction"] == ("no" if "no" in text.split(" ") else "yes")
    report.write_samples(tmp_path / "samples.jsonl")
    assert len((tmp_path / "samples.jsonl").read_text(encoding="utf-8").split("\n")) == 5


def test_a_part_of_the_questions_only_when_asked_for(data: Path, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", GOOD[1:3])
    report = score_file("pope", path, data, partial=True)
    assert (report.n, report.settings["partial"]) == (2, True)
    with pytest.raises(ValueError, match="true or false"):
        score_file("pope", path, data, partial="yes")


def test_unknown_names_and_missing_data(data: Path, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", GOOD)
    with pytest.raises(ValueError, match="Did you mean 'pope'"):
        score_file("popes", path, data)
    with pytest.raises(ValueError, match="Did you mean 'parser'"):
        score_file("pope", path, data, parsr="pope")
    with pytest.raises(ValueError, match="Did you mean 'opera'"):
        score_file("pope", path, data, parser="oper")
    with pytest.raises(ValueError, match="pass their folder"):
        score_file("pope", path)
    with pytest.raises(FileNotFoundError, match="no POPE question file"):
        score_file("pope", path, tmp_path)
    for name in ("chair", "amber", "hallusionbench", "mmhal"):
        with pytest.raises(FileNotFoundError, match="--data"):
            score_file(name, path, data)


def test_a_named_answer_field(data: Path, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"id": i, "mine": a} for i, a in enumerate(ANSWERS, 1)])
    assert [r["text"] for r in score_file("pope", path, data, text_key="mine").samples] == ANSWERS
    with pytest.raises(ValueError, match="no field 'yours'"):
        score_file("pope", path, data, text_key="yours")


def test_image_numbers() -> None:
    same = [
        "COCO_val2014_000000310196.jpg",
        "000000310196",
        310196,
        "val2014/COCO_val2014_000000310196.jpg",
        "310196.png",
    ]
    assert {image_number(name) for name in same} == {"310196"}
    assert image_number("AMBER_12.jpg") == "12"
    assert image_number("Blank.PNG") == "blank"


def test_pairing_by_order_checks_every_row(tmp_path: Path) -> None:
    questions = [Question(str(i), f"{i}.jpg", f"Is there a {t} in the image?") for i, t in enumerate("ab")]
    rows = [{"image": "1.jpg", "text": "yes"}, {"image": "0.jpg", "text": "no"}]
    with pytest.raises(ValueError, match="another order"):
        pair(questions, read_answers(write_lines(tmp_path / "a.jsonl", rows)))


def test_a_full_disk_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "samples.jsonl"
    target.write_text("before\n")
    report = Report("pope", 1, {}, samples=[{"a": 1}])

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vlm_attn.evaluation.store.os.fsync", full)
    with pytest.raises(ValueError, match="No space left.*Nothing was changed"):
        report.write_samples(target)
    assert target.read_text() == "before\n"
    assert [path.name for path in tmp_path.iterdir()] == ["samples.jsonl"]  # no half file left behind
    with pytest.raises(OSError):
        write_text(target, "x")
    with pytest.raises(ValueError, match="no ordinary file"):
        report.write_samples(tmp_path)


@pytest.mark.parametrize(
    ("benchmark", "option", "expected"),
    [
        ("pope", {"split": 3}, "a text"),
        ("chair", {"truncate": "yes"}, "true or false"),
        ("mmhal", {"judge": "x"}, "a function"),
        ("ghost", {"per_category": True}, "a whole number"),
        ("ghost", {"seed": "1"}, "a whole number"),
    ],
)
def test_options_of_the_wrong_kind(benchmark: str, option: dict[str, Any], expected: str, data: Path) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(option))} of {benchmark} is {expected}"):
        score_file(benchmark, data / "coco_pope_random.jsonl", data, **option)


def test_a_log_that_keeps_the_picture_itself(data: Path, tmp_path: Path) -> None:
    rows = [
        {"doc": {"question_id": q["question_id"], "image": {"bytes": None}}, "filtered_resps": ["no"]}
        for q in QUESTIONS
    ]
    assert score_file("pope", write_lines(tmp_path / "a.jsonl", rows), data).metrics["yes_ratio"] == 0
