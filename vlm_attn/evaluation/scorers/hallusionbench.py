"""HallusionBench: yes/no questions about original and edited figures, counted alone, per figure and per group.

aAcc = right / all questions; fAcc = figures all of whose questions are right; qAcc = question groups that are right
on every figure. ``VD`` questions need the figure, ``VS`` questions are also asked without one (figure 0), where being
unsure is right. The paper lets GPT-4 judge; without a judge yes and no are read from the answer, and anything else is
unsure.

Source: Guan et al., "HallusionBench", arXiv:2310.14566.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any

from vlm_attn.evaluation.matching import unknown_name
from vlm_attn.evaluation.parsers import UNKNOWN, parse_answer
from vlm_attn.evaluation.rates import ratio
from vlm_attn.evaluation.scorers.data import require_file
from vlm_attn.evaluation.scorers.files import Answer, Row, file_hash, json_lines, read_answers
from vlm_attn.evaluation.scorers.judge import Judge, JudgeItem, read_replies, read_verdict
from vlm_attn.evaluation.scorers.pairing import Question, pair
from vlm_attn.evaluation.scorers.report import Report

__all__ = ["KEY", "QUESTION_SETS", "READINGS", "group_key", "hallusion_metrics", "is_right", "judge_free", "score"]

KEY = ("category", "subcategory", "set_id", "figure_id", "question_id")
QUESTION_SETS = ("image", "all")
READINGS = ("vlmevalkit", "ours", "strict")


def hallusion_metrics(rows: Sequence[Row], right: Sequence[bool]) -> dict[str, float]:
    """aAcc, fAcc, qAcc of questions (with the fields `KEY`) and whether each was answered right."""
    figures = [group_key(row, "figure_id") for row in rows]
    shown = [not (row["category"] == "VS" and str(row["figure_id"]) == "0") for row in rows]
    return {
        "a_acc": ratio(sum(right), len(right)),
        "f_acc": _all_right((f, r) for f, r, s in zip(figures, right, shown, strict=True) if s),
        "q_acc": _all_right(zip([group_key(row, "question_id") for row in rows], right, strict=True)),
    }


def group_key(row: Row, last: str) -> Hashable:
    """What the questions of a figure (``figure_id``) or of a group (``question_id``) share."""
    return tuple(str(row[name]) for name in (*KEY[:3], last))


def _all_right(pairs: Iterable[tuple[Hashable, bool]]) -> float:
    """Share of groups whose members are all right."""
    groups: dict[Hashable, bool] = {}
    for key, good in pairs:
        groups[key] = groups.get(key, True) and good
    return ratio(sum(groups.values()), len(groups))


def score(
    answers: Path,
    data: Path,
    *,
    parser: str = "vlmevalkit",
    questions: str = "image",
    replies: str | None = None,
    judge: Judge | None = None,
    text_key: str | None = None,
    partial: bool = False,
) -> Report:
    """Score an answer file.

    Args:
        data: folder with ``HallusionBench.json``.
        parser: how yes and no are read without a judge: ``vlmevalkit``, ``ours`` or ``strict``.
        questions: ``image`` (the 951 with a figure, as judge-free runs do) or ``all`` (1,129, as the paper).
        replies: file with a judge's replies (0 wrong, 1 right, 2 unsure); judge: a function that gives them.
    """
    for what, value, known in (("HallusionBench questions", questions, QUESTION_SETS), ("parser", parser, READINGS)):
        if value not in known:
            raise ValueError(unknown_name(what, value, known))
    if replies is not None and judge is not None:
        raise ValueError("Give replies or judge, not both.")
    source = require_file(data, "hallusionbench", "HallusionBench.json")
    listed = [_question(row) for row in json_lines(source)]
    rows = [_with_id(row) for row in read_answers(answers, text_key=text_key)]
    with_image = [q for q in listed if str(q.row["visual_input"]) != "0"]
    # a file for all questions also answers those with an image
    pairs = pair(listed if questions == "all" or len(rows) == len(listed) else with_image, rows, partial=partial)
    if questions == "image":
        pairs = [(q, a) for q, a in pairs if str(q.row["visual_input"]) != "0"]
    if replies is not None:
        verdicts = [read_verdict(reply) for reply in read_replies(Path(replies), [q for q, _ in pairs])]
    else:
        verdicts = [read_verdict(judge(_item(q, a))) if judge else judge_free(q.row, a.text, parser) for q, a in pairs]
    right = [is_right(q.row, v) for (q, _), v in zip(pairs, verdicts, strict=True)]
    facts = [q.row for q, _ in pairs]
    return Report(
        benchmark="hallusionbench",
        n=len(pairs),
        metrics=hallusion_metrics(facts, right),
        groups={name: _part(facts, right, name) for name in ("VD", "VS") if any(r["category"] == name for r in facts)},
        settings={
            "questions": questions,
            "partial": partial,
            "judge": "yes" if replies or judge else f"none, parser {parser}",
        },
        details={"unsure": verdicts.count("unsure")},
        files={path.name: file_hash(path) for path in (source, answers, *([Path(replies)] if replies else []))},
        samples=[
            {"id": q.id, "question": q.text, "label": q.row["gt_answer"], "verdict": v, "text": a.text}
            for (q, a), v in zip(pairs, verdicts, strict=True)
        ],
    )


def _question(row: dict[str, Any]) -> Question:
    return Question("/".join(str(row[name]) for name in KEY), "", row["question"], row)


def _with_id(row: Answer) -> Answer:
    """Rows carry the composite key in five fields; their bare question_id is not unique."""
    if all(name in row.fields for name in KEY):
        return Answer(row.text, {"id": "/".join(str(row.fields[name]) for name in KEY)}, row.place)
    fields = {key: value for key, value in row.fields.items() if key not in ("question_id", "id")}
    return Answer(row.text, fields, row.place)


def judge_free(row: Row, text: str, parser: str = READINGS[0]) -> str:
    """right, wrong, or unsure where neither yes nor no is read from the answer."""
    answer = parse_answer(text, parser)
    if answer == UNKNOWN:
        return "unsure"
    return "right" if (answer == "yes") == (str(row["gt_answer"]) == "1") else "wrong"


def is_right(row: Row, verdict: str) -> bool:
    """Whether a verdict counts as right: without a figure, not knowing does."""
    return verdict == "right" or (verdict == "unsure" and row["category"] == "VS" and str(row["figure_id"]) == "0")


def _item(question: Question, answer: Answer) -> JudgeItem:
    return JudgeItem(question.id, question.text, str(question.row.get("gt_answer_details") or ""), answer.text)


def _part(facts: Sequence[Row], right: Sequence[bool], category: str) -> dict[str, Any]:
    chosen = [(row, good) for row, good in zip(facts, right, strict=True) if row["category"] == category]
    return {"n": len(chosen), **hallusion_metrics([row for row, _ in chosen], [good for _, good in chosen])}
