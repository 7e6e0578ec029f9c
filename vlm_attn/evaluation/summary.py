"""From samples to figures: scores with intervals, paired comparison with the baseline, latency, kept tokens.

A sample row is one line of ``samples.jsonl``: ``doc`` holds the facts (label or true objects, image id), ``text`` the
answer. Scoring needs nothing else, so a file produced elsewhere can be scored too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm_attn.evaluation import chair, mme, parsers
from vlm_attn.evaluation import statistics as st

__all__ = [
    "HEADLINE",
    "Rater",
    "compare",
    "decoder_tokens",
    "flips",
    "kept_tokens",
    "latency",
    "pope_averages",
    "rater_for",
]

Array = NDArray[np.float64]
Row = Mapping[str, Any]

HEADLINE = {"pope": "f1", "chair": "chair_i", "mme": "score", "amber_g": "chair", "amber_d": "f1",
            "hallusion": "a_acc", "mmhal": "empty_rate"}  # fmt: skip
"""The metric of each kind that plots and short tables show."""
LOWER_IS_BETTER = frozenset({"chair_s", "chair_i", "chair", "hal", "cog", "empty_rate"})


def _divide(top: Array, bottom: Array) -> Array:
    return np.divide(top, bottom, out=np.zeros_like(top), where=bottom > 0)


def _column(top: int, bottom: int) -> st.Statistic:
    return lambda sums: _divide(sums[:, top], sums[:, bottom])


def _f1(found: int, predicted: int, truth: int) -> st.Statistic:
    return lambda sums: _divide(2 * sums[:, found], sums[:, predicted] + sums[:, truth])


POPE_STATISTICS: dict[str, st.Statistic] = {
    "accuracy": _column(4, 6),
    "precision": lambda s: _divide(s[:, 0], s[:, 0] + s[:, 1]),
    "recall": lambda s: _divide(s[:, 0], s[:, 0] + s[:, 3]),
    "f1": lambda s: _divide(2 * s[:, 0], 2 * s[:, 0] + s[:, 1] + s[:, 3]),
    "yes_ratio": _column(5, 6),
}
"""Of rows ``tp, fp, tn, fn, correct, predicted yes, 1`` (`parsers.outcome`)."""
POPE_PROPORTIONS = {"accuracy": (4, 6)}
CHAIR_STATISTICS: dict[str, st.Statistic] = {
    "chair_s": _column(0, 8),
    "chair_i": _column(1, 2),
    "recall": _column(3, 5),
    "precision": _column(3, 4),
    "f1": _f1(3, 4, 5),
    "len_words": _column(6, 8),
    "len_tokens": _column(7, 8),
}
"""Of rows ``any hallucination, hallucinated, mentions, found, distinct, truth, words, tokens, 1``
(`chair.CaptionCount.row`)."""
CHAIR_PROPORTIONS = {"chair_s": (0, 8)}


@dataclass(frozen=True)
class Rater:
    """How one kind of benchmark is scored: a row of sums per sample, and statistics of those sums."""

    kind: str
    rows: Callable[[Sequence[Row]], list[tuple[float, ...]]]
    statistics: Mapping[str, st.Statistic]
    proportions: Mapping[str, tuple[int, int]]
    """Metrics that are plain proportions of independent units: columns of successes and of trials."""
    verdicts: Callable[[Sequence[Row]], list[bool]] | None = None
    """Right/wrong per sample, for McNemar."""
    details: Callable[[Sequence[Row]], dict[str, Any]] = lambda rows: {}
    mistakes: Callable[[Row], list[str]] = lambda row: []
    """Objects that an answer makes up, where that is what is scored."""
    cluster: Callable[[Row], str] = lambda row: image_of(row)
    """Samples that are resampled together: those of one picture, or more where a figure spans several."""

    def score(self, samples: Sequence[Row], *, seed: int = 0, resamples: int = 2000) -> dict[str, Any]:
        """``{n, images, metrics, intervals, ...details}`` of one method on one benchmark."""
        clusters = [self.cluster(row) for row in samples]
        measured = intervals(
            self.rows(samples), clusters, self.statistics, self.proportions, seed=seed, resamples=resamples
        )
        return {
            "kind": self.kind,
            "n": len(samples),
            "images": len({image_of(row) for row in samples} - {""}),  # "": asked without a picture
            "metrics": {name: interval["value"] for name, interval in measured.items()},
            "intervals": measured,
            **self.details(samples),
        }


def intervals(
    rows: Sequence[Sequence[float]],
    clusters: Sequence[str],
    statistics: Mapping[str, st.Statistic],
    proportions: Mapping[str, tuple[int, int]],
    *,
    seed: int = 0,
    resamples: int = 2000,
) -> dict[str, dict[str, float]]:
    """Every statistic of the rows with its 95 % interval: Wilson for proportions, else a bootstrap over clusters."""
    sums, _ = st.cluster_sums(rows, clusters)
    total = sums.sum(0, keepdims=True)
    out: dict[str, dict[str, float]] = {}
    for name, statistic in statistics.items():
        if name in proportions:
            good, n = proportions[name]
            interval = st.wilson(int(total[0, good]), int(total[0, n]))
        else:
            interval = st.bootstrap(sums, statistic, seed=seed, resamples=resamples)
        out[name] = interval.to_dict()
    return out


def image_of(row: Row) -> str:
    """The picture a sample is about: samples of one picture are resampled together."""
    doc = row["doc"]
    for key in ("image_id", "image", "image_source", "question_id"):
        if doc.get(key) is not None:
            return str(doc[key])
    return str(row["doc_id"])


def label_of(doc: Mapping[str, Any]) -> str:
    """Ground truth of a yes/no question, in our files (``label``) or lmms-eval's (``answer``)."""
    return parsers.check_label(str(doc["label"] if "label" in doc else doc["answer"]))


def _pope_rater(parser: str) -> Rater:
    rule = parsers.get_parser(parser)

    def predictions(samples: Sequence[Row]) -> list[tuple[str, str]]:
        labels = [label_of(row["doc"]) for row in samples]
        return [(rule.read(row["text"], label), label) for row, label in zip(samples, labels, strict=True)]

    def rows(samples: Sequence[Row]) -> list[tuple[float, ...]]:
        return [(*parsers.outcome(p, label, rule.unknown), 1) for p, label in predictions(samples)]

    def details(samples: Sequence[Row]) -> dict[str, Any]:
        texts, labels = [row["text"] for row in samples], [label_of(row["doc"]) for row in samples]
        return {
            "parser": parser,
            "parsers": {name: parsers.pope_metrics(texts, labels, name).to_dict() for name in parsers.PARSERS},
        }

    return Rater(
        kind="pope",
        rows=rows,
        statistics=POPE_STATISTICS,
        proportions=POPE_PROPORTIONS,
        verdicts=lambda samples: [p == label for p, label in predictions(samples)],
        details=details,
    )


def _chair_rater(words: chair.ObjectWords) -> Rater:
    def counts(samples: Sequence[Row]) -> list[chair.CaptionCount]:
        return [chair.count_caption(row["text"], row["doc"]["truth"], words) for row in samples]

    return Rater(
        kind="chair",
        rows=lambda samples: [(*count.row(), 1) for count in counts(samples)],
        statistics=CHAIR_STATISTICS,
        proportions=CHAIR_PROPORTIONS,
        details=lambda samples: {"variant": words.name, "mentions": sum(len(c.mentions) for c in counts(samples))},
        mistakes=lambda row: sorted(set(counts([row])[0].hallucinated)),
    )


def _mme_rater() -> Rater:
    def answers(samples: Sequence[Row]) -> list[mme.MmeAnswer]:
        return [
            mme.MmeAnswer(d["category"], str(d["pair"]), d["label"], row["text"])
            for row in samples
            for d in (row["doc"],)
        ]

    def verdicts(samples: Sequence[Row]) -> list[bool]:
        return [answer.correct for answer in answers(samples)]

    def rows(samples: Sequence[Row]) -> list[tuple[float, ...]]:
        """(right, asked, pairs right, pairs) per sample and category; a pair's verdict sits on its last sample."""
        listed = answers(samples)
        categories = sorted({answer.category for answer in listed})
        last = {(a.category, a.pair): place for place, a in enumerate(listed)}
        good: dict[tuple[str, str], list[bool]] = {}
        out = []
        for place, answer in enumerate(listed):
            key = (answer.category, answer.pair)
            good.setdefault(key, []).append(answer.correct)
            closing = last[key] == place
            row = [0.0] * (4 * len(categories))
            base = 4 * categories.index(answer.category)
            row[base : base + 4] = [answer.correct, 1, closing and len(good[key]) == 2 and all(good[key]), closing]
            out.append((*row, float(sum(row[0::4])), 1.0, float(sum(row[2::4])), float(sum(row[3::4]))))
        return out

    def score(sums: Array) -> Array:
        blocks = [sums[:, i : i + 4] for i in range(0, sums.shape[1] - 4, 4)]
        return sum(
            (100 * (_divide(b[:, 0], b[:, 1]) + _divide(b[:, 2], b[:, 3])) for b in blocks), start=np.zeros(len(sums))
        )

    return Rater(
        kind="mme",
        rows=rows,
        statistics={"score": score, "acc": _column(-4, -3), "acc_plus": _column(-2, -1)},
        proportions={"acc": (-4, -3), "acc_plus": (-2, -1)},
        verdicts=verdicts,
        details=lambda samples: {"categories": mme.mme_metrics(answers(samples))},
    )


def rater_for(task: str, parser: str = "pope", data: str | None = None) -> Rater | None:
    """The rater of a benchmark by its task name, or None where lmms-eval's own figures are all there is.

    ``data``: folder of the benchmark's own files, which a benchmark from local folders needs for its words."""
    if task.startswith("local_"):
        return _local_rater(task, parser, data or "data")
    if task.startswith("scenes_pope") or task in ("pope", "pope_random", "pope_pop", "pope_adv"):
        return _pope_rater(parser)
    if task == "scenes_chair":
        from vlm_attn.evaluation.scenes_docs import object_words

        return _chair_rater(object_words())
    return _mme_rater() if task == "scenes_mme" else None


def _local_rater(task: str, parser: str, data: str) -> Rater:
    from vlm_attn.evaluation import amber_rater, judged_raters
    from vlm_attn.evaluation.local_docs import kind_of
    from vlm_attn.evaluation.scorers.data import language_of, require_file
    from vlm_attn.evaluation.words.coco import coco_words_b, read_synonyms

    kind, folder = kind_of(task), Path(data)
    if kind == "chair":
        nodes = read_synonyms(require_file(folder, "chair", "synonyms.txt"))
        return _chair_rater(coco_words_b(nodes, language_of(folder)))
    if kind == "amber_g":
        return amber_rater.captions(data)
    return {"pope": lambda: _pope_rater(parser), "mme": _mme_rater, "amber_d": amber_rater.questions,
            "hallusion": judged_raters.hallusion, "mmhal": judged_raters.mmhal}[kind]()  # fmt: skip


def pope_averages(scores: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Plain means over the POPE splits of one method, and how far F1 falls from random to adversarial negatives.

    Empty with fewer than two splits.
    """
    splits = {task: score["metrics"] for task, score in scores.items() if score["kind"] == "pope"}
    if len(splits) < 2:
        return {}
    out = {name: float(np.mean([row[name] for row in splits.values()])) for name in ("accuracy", "f1", "yes_ratio")}
    ends = [next((row["f1"] for task, row in splits.items() if task.endswith(end)), None)
            for end in ("random", "adversarial")]  # fmt: skip
    if ends[0] is not None and ends[1] is not None:
        out["f1_random_minus_adversarial"] = ends[0] - ends[1]
    return out


def compare(
    rater: Rater, before: Sequence[Row], after: Sequence[Row], *, seed: int = 0, resamples: int = 2000
) -> dict[str, Any]:
    """Paired comparison of two methods on the same samples: per metric the difference (after - before) with its 95 %
    interval and p-value from a bootstrap over pictures, McNemar's exact test where answers are right or wrong."""
    ids = [row["doc_id"] for row in before]
    if ids != [row["doc_id"] for row in after]:
        raise ValueError("The two methods were not run on the same samples; finish both runs before comparing.")
    clusters = [rater.cluster(row) for row in before]
    first, _ = st.cluster_sums(rater.rows(before), clusters)
    second, _ = st.cluster_sums(rater.rows(after), clusters)
    out: dict[str, Any] = {"n": len(ids), "difference": {}}
    for name, statistic in rater.statistics.items():
        interval, p = st.paired_bootstrap(first, second, statistic, seed=seed, resamples=resamples)
        out["difference"][name] = {**interval.to_dict(), "p": p}
    if rater.verdicts is not None:
        out["mcnemar"] = st.mcnemar(rater.verdicts(before), rater.verdicts(after)).to_dict()
    same = sum(a["text"] == b["text"] for a, b in zip(before, after, strict=True))
    out["same_text"] = parsers.ratio(same, len(ids))
    return out


def flips(rater: Rater, before: Sequence[Row], after: Sequence[Row], most: int = 6) -> list[tuple[Row, Row]]:
    """The samples a method spoils most: right before and wrong now, or captions with the most added hallucinations."""
    if rater.verdicts is not None:
        verdicts = zip(rater.verdicts(before), rater.verdicts(after), strict=True)
        loss = [int(was) - int(is_) for was, is_ in verdicts]
    else:
        loss = [int(b[1] - a[1]) for a, b in zip(rater.rows(before), rater.rows(after), strict=True)]
    order = sorted(range(len(loss)), key=lambda place: (-loss[place], place))
    return [(before[place], after[place]) for place in order[:most] if loss[place] > 0]


def latency(timings: Sequence[Row], warmup: int) -> dict[str, Any]:
    """Median, p90 and mean of every measured time (seconds), with the number of samples and of discarded warm-ups.

    ``first_token_s`` is vision encoding plus prefill where the session reports these two."""
    series: dict[str, list[float]] = {}
    for row in timings:
        times = {k: float(v) for k, v in row["times"].items() if isinstance(v, int | float)}
        if "first_token_s" not in times and {"encode_s", "prefill_s"} <= times.keys():
            times["first_token_s"] = times["encode_s"] + times["prefill_s"]
        for name, seconds in times.items():
            series.setdefault(name, []).append(seconds)
    out: dict[str, Any] = {"n": sum(bool(row["times"]) for row in timings), "warmup": warmup}  # cached: no times
    for name in sorted(series):
        values = series[name]
        out[name] = {"median": median(values), "p90": float(np.quantile(values, 0.9)), "mean": float(np.mean(values))}
    return out


def kept_tokens(samples: Sequence[Row]) -> dict[str, float]:
    """Mean visual tokens per sample, mean kept ones (mean over layers), and their ratio; empty if not reported."""
    pairs = [
        (total, kept)
        for row in samples
        if (total := number(row.get("visual_tokens"))) and (kept := number(row.get("kept_tokens"))) is not None
    ]
    if not pairs:
        return {}
    total, kept = (float(np.mean(column)) for column in zip(*pairs, strict=True))
    return {"visual_tokens": total, "kept_tokens": kept, "keep_ratio": kept / total}


def decoder_tokens(samples: Sequence[Row]) -> float | None:
    """Mean decoder work per sample (`compute.Work`), None if not reported."""
    found = [float(row["decoder_tokens"]) for row in samples if row.get("decoder_tokens") is not None]
    return float(np.mean(found)) if found else None


def number(value: Any) -> float | None:
    """A count given as a number, as ``{"mean": number, ...}``, or as a list of numbers (their mean)."""
    if isinstance(value, Mapping):
        value = value.get("mean", value.get("mean_over_layers"))
    if isinstance(value, list) and value and all(isinstance(item, int | float) for item in value):
        return float(np.mean(value))
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
