"""AMBER: annotated objects that captions cover, invent or imagine, and yes/no questions about what is there.

Generative (ids 1-1004). Of the nouns N of a response that occur in the vocabulary: CHAIR = hallucinated / all N,
Cover = covered / annotated objects, Cog = imagined ones named / all that people imagine, each over sums; Hal = share
of responses with a hallucinated noun. Lower is better except for Cover.

Discriminative (ids from 1005). The positive class is **no**: precision = right no / answered no, recall = right no /
truly no. An answer that is neither yes nor no is wrong.

AMBER score = (100 - CHAIR + F1) / 2 in points. Rates here are exact; the official script adds 0.001 to denominators
and rounds precision and recall to 0.1 before F1.

Source: Wang et al., "AMBER: An LLM-free Multi-dimensional Benchmark", arXiv:2311.07397.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from vlm_attn.evaluation.matching import unknown_name
from vlm_attn.evaluation.parsers import NO, UNKNOWN, YES, parse_answer
from vlm_attn.evaluation.rates import ratio, retrieval
from vlm_attn.evaluation.scorers.data import find_file, language_of, read_json, require_file
from vlm_attn.evaluation.scorers.files import Answer, file_hash, json_lines, read_answers
from vlm_attn.evaluation.scorers.pairing import ID_FIELDS, Question, pair
from vlm_attn.evaluation.scorers.report import Report
from vlm_attn.evaluation.words.tokens import treebank_tokens

__all__ = [
    "DIMENSIONS",
    "AmberCount",
    "Vocabulary",
    "amber_captions",
    "amber_questions",
    "count_response",
    "count_texts",
    "score",
]

GENERATIVE = "generative"
DIMENSIONS: dict[str, tuple[str, ...]] = {
    "existence": ("discriminative-hallucination",),
    "attribute": tuple(f"discriminative-attribute-{part}" for part in ("state", "number", "action")),
    "state": ("discriminative-attribute-state",),
    "number": ("discriminative-attribute-number",),
    "action": ("discriminative-attribute-action",),
    "relation": ("discriminative-relation", "relation"),
}
"""Dimension of the discriminative part -> annotation types."""
READINGS = ("ours", "exact")
_WORD_FILES = ("relation.json", "safe_words.txt")
Similar = Callable[[str, str], bool]


@dataclass(frozen=True)
class Vocabulary:
    """Associated words per object, and nouns that are never judged."""

    related: Mapping[str, Sequence[str]]
    safe: frozenset[str]

    @property
    def nouns(self) -> frozenset[str]:
        """Every word that counts as an object."""
        return frozenset(self.related) | {word for words in self.related.values() for word in words}

    def owners(self, objects: Sequence[str]) -> dict[str, int]:
        """Word -> place of the object it stands for: associations first, then the objects themselves."""
        out: dict[str, int] = {}
        for place, item in enumerate(objects):
            for word in self.related.get(item, ()):
                out.setdefault(word, place)
        for place, item in enumerate(objects):
            out.setdefault(item, place)
        return out


@dataclass(frozen=True)
class AmberCount:
    """What one response adds to the sums."""

    nouns: tuple[str, ...]
    hallucinated: tuple[str, ...]
    covered: int
    truth: int
    imagined: int
    imaginable: int


def count_response(
    nouns: Sequence[str],
    truth: Sequence[str],
    imaginable: Sequence[str],
    words: Vocabulary,
    similar: Similar | None = None,
) -> AmberCount:
    """Compare the vocabulary nouns of one response with the objects of its image.

    ``similar(a, b)``: whether two words mean the same (word vectors, cosine above 0.8); None compares exactly.
    """
    there, dreamt = words.owners(truth), words.owners(imaginable)
    covered: set[int] = set()
    imagined: set[int] = set()
    hallucinated = []
    for noun in nouns:
        if noun in words.safe:
            continue
        if noun in there:
            covered.add(there[noun])
            continue
        if noun in dreamt:
            imagined.add(dreamt[noun])
        if similar is not None:
            if (near := _nearest(noun, dreamt, similar)) is not None:
                imagined.add(near)
            if (near := _nearest(noun, there, similar)) is not None:
                covered.add(near)
                continue
        hallucinated.append(noun)
    return AmberCount(tuple(nouns), tuple(hallucinated), len(covered), len(truth), len(imagined), len(imaginable))


def _nearest(noun: str, owners: Mapping[str, int], similar: Similar) -> int | None:
    return next((place for word, place in owners.items() if similar(noun, word)), None)


def amber_captions(counts: Sequence[AmberCount]) -> dict[str, float]:
    """``chair``, ``cover``, ``hal``, ``cog`` over responses."""
    return {
        "chair": ratio(sum(len(c.hallucinated) for c in counts), sum(len(c.nouns) for c in counts)),
        "cover": ratio(sum(c.covered for c in counts), sum(c.truth for c in counts)),
        "hal": ratio(sum(bool(c.hallucinated) for c in counts), len(counts)),
        "cog": ratio(sum(c.imagined for c in counts), sum(c.imaginable for c in counts)),
    }


def amber_questions(predictions: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
    """Accuracy, precision, recall and F1 with "no" as the positive class; ``unknown_rate`` beside them."""
    pairs = list(zip(predictions, labels, strict=True))
    found = sum(p == label == NO for p, label in pairs)
    return {
        "accuracy": ratio(sum(p == label for p, label in pairs), len(pairs)),
        **retrieval(found, sum(p == NO for p in predictions), sum(label == NO for label in labels)),
        "unknown_rate": ratio(sum(p == UNKNOWN for p in predictions), len(pairs)),
    }


def score(
    answers: Path,
    data: Path,
    *,
    parser: str = "ours",
    similarity: str | None = None,
    text_key: str | None = None,
    partial: bool = False,
) -> Report:
    """Score a file with responses to the generative part, the discriminative part, some of its types, or all.

    Args:
        data: folder with ``annotations.jsonl``, ``relation.json``, ``safe_words.txt`` (and ``lemmatizer`` beside it).
        parser: ``ours`` (first whole word yes/no) or ``exact`` (the official script: exactly "Yes" or "No").
        similarity: ``en_core_web_lg`` adds the word-vector comparison (package spaCy); exact matching otherwise.
        partial: accept responses to a part of a type's ids.
    """
    if parser not in READINGS:
        raise ValueError(unknown_name("AMBER parser", parser, READINGS))
    annotations = require_file(data, "amber", "annotations.jsonl")
    rows = read_answers(answers, text_key=text_key)
    pairs = _paired(annotations, data, rows, partial)
    told = [(q, a) for q, a in pairs if q.row["type"] == GENERATIVE]
    asked = [(q, a) for q, a in pairs if q.row["type"] != GENERATIVE]
    groups: dict[str, dict[str, Any]] = {}
    samples: list[dict[str, Any]] = []
    files = [annotations, answers]
    if told:
        sources = [require_file(data, "amber", name) for name in _WORD_FILES]
        counts = count_texts([(a.text, q.row["truth"], q.row["hallu"]) for q, a in told], data, similarity)
        groups[GENERATIVE] = {"n": len(counts), **amber_captions(counts)}
        samples += [_told_sample(q, a, c) for (q, a), c in zip(told, counts, strict=True)]
        files += sources
    if asked:
        predictions = [_read(a.text, parser) for _, a in asked]
        groups |= _dimensions([q for q, _ in asked], predictions)
        samples += [_asked_sample(q, a, p) for (q, a), p in zip(asked, predictions, strict=True)]
    metrics = {key: value for name in (GENERATIVE, "discriminative") for key, value in groups.get(name, {}).items()
               if key != "n"}  # fmt: skip
    if told and asked:
        metrics["score"] = (100 - 100 * metrics["chair"] + 100 * metrics["f1"]) / 2
    return Report(
        benchmark="amber",
        n=len(pairs),
        metrics=metrics,
        groups=groups,
        settings={"parser": parser, "similarity": similarity or "exact words", "partial": partial},
        files={path.name: file_hash(path) for path in files},
        notes=_left_out(groups),
        samples=samples,
    )


def _paired(annotations: Path, data: Path, rows: Sequence[Answer], partial: bool) -> list[tuple[Question, Answer]]:
    """Responses with their annotations; every type that occurs must be complete."""
    queries = find_file(data, "amber", ["query_all.jsonl"])  # several yes/no questions share a picture
    images = {} if queries is None else {row["id"]: row["image"] for row in json_lines(queries)}
    listed = [Question(str(row["id"]), images.get(row["id"], ""), "", row) for row in json_lines(annotations)]
    types = {question.id: question.row["type"] for question in listed}
    ids = [row.get(*ID_FIELDS) for row in rows]
    if None in ids:
        raise ValueError(f"{rows[ids.index(None)].place} has no id: AMBER responses are matched by the field id.")
    present = {types.get(str(i)) for i in ids}
    return pair([q for q in listed if q.row["type"] in present], rows, partial=partial)


def count_texts(
    told: Sequence[tuple[str, Sequence[str], Sequence[str]]], data: Path, similarity: str | None = None
) -> list[AmberCount]:
    """What each response adds to the sums; ``told`` holds (response, objects there, objects people imagine)."""
    related, safe = (require_file(data, "amber", name) for name in _WORD_FILES)
    words = Vocabulary(read_json(related), frozenset(safe.read_text(encoding="utf-8").split("\n")) - {""})
    language, vocabulary, similar = language_of(data), words.nouns, _similar(similarity)
    out = []
    for text, truth, imaginable in told:
        nouns = [noun for noun in language.nouns(treebank_tokens(text)) if noun in vocabulary]
        out.append(count_response(nouns, truth, imaginable, words, similar))
    return out


def _similar(name: str | None) -> Similar | None:
    """Word vectors of spaCy's large English model; smaller models give other figures and are refused."""
    if name is None:
        return None
    if name != "en_core_web_lg":
        raise ValueError(f"similarity is en_core_web_lg or left out, got {name!r}: others are not comparable.")
    try:
        import spacy  # type: ignore[import-not-found]

        model = spacy.load(name)
    except (ModuleNotFoundError, OSError) as error:
        raise ValueError(f"similarity={name} needs spaCy and its model: pip install spacy; python -m spacy download "
                         f"{name} ({error})") from error  # fmt: skip
    document = lru_cache(maxsize=None)(model)
    return lru_cache(maxsize=1 << 18)(lambda a, b: float(document(a).similarity(document(b))) > 0.8)


def _read(text: str, parser: str) -> str:
    if parser == "ours":
        return parse_answer(text, "ours")
    return {"Yes": YES, "No": NO}.get(text, UNKNOWN)


def _dimensions(questions: Sequence[Question], predictions: Sequence[str]) -> dict[str, dict[str, Any]]:
    parts = {"discriminative": tuple({q.row["type"] for q in questions}), **DIMENSIONS}
    out = {}
    for name, types in parts.items():
        chosen = [(p, q.row["truth"]) for q, p in zip(questions, predictions, strict=True) if q.row["type"] in types]
        if chosen:
            out[name] = {"n": len(chosen), **amber_questions(*map(list, zip(*chosen, strict=True)))}
    return out


def _left_out(groups: Mapping[str, Any]) -> list[str]:
    parts = [name for name in (GENERATIVE, *DIMENSIONS) if name not in groups]
    return [f"Not in the file, so not scored: {', '.join(parts)}."] if parts else []


def _told_sample(question: Question, answer: Answer, count: AmberCount) -> dict[str, Any]:
    return {
        "id": int(question.id),
        "type": GENERATIVE,
        "nouns": list(count.nouns),
        "hallucinated": list(count.hallucinated),
        "covered": count.covered,
        "imagined": count.imagined,
        "text": answer.text,
    }


def _asked_sample(question: Question, answer: Answer, prediction: str) -> dict[str, Any]:
    return {"id": int(question.id), "type": question.row["type"], "label": question.row["truth"],
            "prediction": prediction, "text": answer.text}  # fmt: skip
