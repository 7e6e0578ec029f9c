"""MMHal-Bench: 96 open questions of 8 types, rated 0-6 by a judge; below 3 counts as a hallucination.

Without a judge only what needs none is reported: how many answers there are, how long, how many are empty. The mean
rating and the hallucination rate appear when a judge's replies are given.

Source: Sun et al., "Aligning Large Multimodal Models with Factually Augmented RLHF", arXiv:2309.14525.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlm_attn.evaluation.rates import ratio
from vlm_attn.evaluation.scorers.data import require_file
from vlm_attn.evaluation.scorers.files import Answer, file_hash, json_lines, read_answers
from vlm_attn.evaluation.scorers.judge import Judge, JudgeItem, read_rating, read_replies
from vlm_attn.evaluation.scorers.pairing import Question, pair
from vlm_attn.evaluation.scorers.report import Report

__all__ = ["mmhal_metrics", "score"]

FILES = ("mmhal-bench_answer_template.json", "response_template.json")


def mmhal_metrics(ratings: Sequence[int]) -> dict[str, float]:
    """``mean_rating`` (0-6) and ``hallucination_rate``, the share of ratings below 3."""
    return {
        "mean_rating": ratio(sum(ratings), len(ratings)),
        "hallucination_rate": ratio(sum(rating < 3 for rating in ratings), len(ratings)),
    }


def score(
    answers: Path,
    data: Path,
    *,
    replies: str | None = None,
    judge: Judge | None = None,
    text_key: str | None = None,
    partial: bool = False,
) -> Report:
    """Score a filled answer template (or other rows with ``image_id`` or ``question``).

    Args:
        data: folder with the template file, which holds questions and reference answers.
        replies: file with a judge's replies, one per question; judge: a function that gives them.
    """
    if replies is not None and judge is not None:
        raise ValueError("Give replies or judge, not both.")
    source = require_file(data, "mmhal_bench", *FILES)
    listed = [Question(str(row["image_id"]), "", row["question"], row) for row in json_lines(source)]
    pairs = pair(listed, [_with_id(row) for row in read_answers(answers, text_key=text_key)],
                 partial=partial)  # fmt: skip
    ratings: list[int] | None = None
    if replies is not None:
        ratings = [read_rating(reply) for reply in read_replies(Path(replies), [q for q, _ in pairs])]
    elif judge is not None:
        ratings = [read_rating(judge(_item(q, a))) for q, a in pairs]
    types = list(dict.fromkeys(q.row["question_type"] for q in listed))
    places = {name: [i for i, (q, _) in enumerate(pairs) if q.row["question_type"] == name] for name in types}
    return Report(
        benchmark="mmhal",
        n=len(pairs),
        metrics=_figures([a for _, a in pairs], ratings),
        groups={
            name: {"n": len(part), **_figures([pairs[i][1] for i in part], ratings and [ratings[i] for i in part])}
            for name, part in places.items()
            if part
        },
        settings={"judge": "yes" if ratings is not None else "none", "partial": partial},
        files={path.name: file_hash(path) for path in (source, answers, *([Path(replies)] if replies else []))},
        notes=[] if ratings is not None else ["Ratings need a judge: pass its replies (replies=FILE)."],
        samples=[
            {"id": q.id, "type": q.row["question_type"], "text": a.text, "rating": ratings[i] if ratings else None}
            for i, (q, a) in enumerate(pairs)
        ],
    )


def _figures(answers: Sequence[Answer], ratings: Sequence[int] | None) -> dict[str, Any]:
    length = ratio(sum(len(a.text.split()) for a in answers), len(answers))
    empty = ratio(sum(not a.text.strip() for a in answers), len(answers))
    return {**(mmhal_metrics(ratings) if ratings is not None else {}), "len_words": length, "empty_rate": empty}


def _with_id(row: Answer) -> Answer:
    """The image is shown once per question, so that its id identifies the question."""
    image = row.get("image_id")
    return row if image is None else Answer(row.text, {"id": image, "question": row.get("question") or ""}, row.place)


def _item(question: Question, answer: Answer) -> JudgeItem:
    facts = tuple(str(item) for item in question.row.get("image_content") or ())
    return JudgeItem(question.id, question.text, str(question.row["gt_answer"]), answer.text, facts)
