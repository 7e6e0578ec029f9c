"""The HTML report: one file that needs nothing else, with every text escaped."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytest.importorskip("lmms_eval")
pytest.importorskip("matplotlib")

from tests.eval_fakes import FakeAnswer, FakeBackend, FakeVlm
from vlm_attn.evaluation.config import build_config
from vlm_attn.evaluation.runner import RunResult, run

HOSTILE = "<script>alert(1)</script> & yes"


class Talkative(FakeVlm):
    """Answers with markup where the method is named `hostile`."""

    def ask(self, image: object, text: str, **settings: object) -> FakeAnswer:
        answer = super().ask(image, text, **settings)
        if self.spec and self.spec["name"] == "hostile":
            answer.text = f"{HOSTILE}. A tree, a key, a boat." if "describe" in text else HOSTILE
        return answer


class Tags(HTMLParser):
    """Collects what a browser would fetch or run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    backend = FakeBackend()
    backend.vlm = Talkative()
    config = build_config(
        {
            "methods": [
                "noop",
                {"name": "hostile", "label": "hostile a, b"},
                {"name": "fastv", "params": {"harm": 90}},
            ],
            "benchmarks": ["scenes_pope_random", "scenes_pope_popular", "scenes_chair", "scenes_mme"],
            "limit": 12,
            "resamples": 100,
            "output": str(tmp_path_factory.mktemp("report")),
            "quiet": True,
        }
    )
    return run(config, backend)


def test_the_page_needs_nothing_else(result: RunResult) -> None:
    assert result.report is not None
    page = result.report.read_text(encoding="utf-8")
    tags = Tags()
    tags.feed(page)
    names = {tag for tag, _ in tags.seen}
    assert not names & {"script", "link", "iframe", "object"}
    for tag, attributes in tags.seen:
        for key in ("src", "href", "xlink:href", "data"):
            value = attributes.get(key) or ""
            assert not value or value.startswith(("data:image/", "#")), (tag, key, value[:60])
    outside = set(re.findall(r"url\(([^)]*)\)", page))
    assert all(value.startswith("#") for value in outside)
    assert "svg" in names
    assert "img" in names


def test_answers_are_escaped(result: RunResult) -> None:
    assert result.report is not None
    page = result.report.read_text(encoding="utf-8")
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; yes" in page


def test_the_page_says_what_matters(result: RunResult) -> None:
    assert result.report is not None
    page = result.report.read_text(encoding="utf-8")
    for text in ("Score against latency", "POPE by split", "CHAIR with recall and length", "Worst flips",
                 "read by every parser", "How it was made", "hostile a, b", "McNemar p",
                 "pooled"):  # fmt: skip
        assert text in page, text


def test_terminal_tables_fit(result: RunResult) -> None:
    from io import StringIO

    from rich.console import Console

    out = StringIO()
    Console(file=out, width=110).print(result.table())
    text = out.getvalue()
    assert "scenes_pope_random" in text
    assert "…" not in text
    for task in ("scenes_chair", "scenes_mme"):
        assert task in text


def test_averages_are_plain_means_of_the_splits(result: RunResult) -> None:
    means = result.results["pope_averages"]["noop"]
    scores = result.results["scores"]["noop"]
    both = [scores[f"scenes_pope_{split}"]["metrics"]["f1"] for split in ("random", "popular")]
    assert means["f1"] == pytest.approx(sum(both) / 2)
    assert "f1_random_minus_adversarial" not in means  # no adversarial split in this run


def test_splits_are_also_pooled(result: RunResult) -> None:
    pooled, scores = result.results["pooled"], result.results["scores"]["hostile a, b"]
    figures = pooled["hostile a, b"]["scenes_pope"]
    splits = ["scenes_pope_random", "scenes_pope_popular"]
    assert figures["splits"] == splits
    assert figures["n"] == figures["paired"]["n"] == 24
    for count in ("tp", "fp", "tn", "fn"):
        assert figures["parsers"]["pope"][count] == sum(scores[name]["parsers"]["pope"][count] for name in splits)
    changes = [result.results["paired"]["hostile a, b"][name]["mcnemar"] for name in splits]
    assert figures["paired"]["mcnemar"]["lost"] == sum(change["lost"] for change in changes)
    assert "paired" not in pooled["baseline"]["scenes_pope"]


def test_no_page_when_switched_off(tmp_path: Path) -> None:
    config = build_config(
        {"benchmarks": ["scenes_chair"], "limit": 3, "output": str(tmp_path), "quiet": True, "report": False}
    )
    assert run(config, FakeBackend()).report is None
    assert not (tmp_path / "report.html").exists()


def test_the_page_says_how_to_repeat_it_and_counts_its_comparisons(result: RunResult) -> None:
    assert result.report is not None
    text = result.report.read_text()
    assert "vlm-attn eval config.yaml --output" in text and "pip install" in text
    assert "p (Holm)" in text and "With 12 comparisons in this run" in text


# --------------------------------------------------------------------------------- score against kept visual tokens


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """Sweeps of a stand-in whose `harm` is both the share that leaves and how often it errs."""
    methods = [
        {"name": "random_prune", "sweep": {"harm": [50, 80]}},
        {"name": "fastv", "sweep": {"harm": [48, 78]}},
        {
            "label": "fastv debiased",
            "name": "fastv",
            "params": {"calibrate": ["pad_mask"]},
            "sweep": {"harm": [48, 60]},
        },
        {"name": "prumerge", "params": {"harm": 10}, "series": "prumerge"},
        "noop",
    ]
    config = build_config(
        {
            "methods": methods,
            "benchmarks": ["scenes_pope_random", "scenes_pope_popular", "scenes_chair"],
            "limit": 18,
            "resamples": 100,
            "output": str(tmp_path_factory.mktemp("swept")),
            "quiet": True,
        }
    )
    return run(config, FakeBackend())


def test_curves_stand_at_the_measured_share(swept: RunResult) -> None:
    columns = swept.results["curves"]
    assert "noop" not in columns  # on no curve
    assert {label: row["share"] for label, row in columns.items()} == pytest.approx(
        {
            "baseline": 1.0,
            "random_prune harm=50": 0.5,
            "random_prune harm=80": 0.2,
            "fastv harm=48": 0.52,
            "fastv harm=78": 0.22,
            "fastv debiased harm=48": 0.52,
            "fastv debiased harm=60": 0.4,
            "prumerge": 0.9,
        }
    )
    scores = swept.results["scores"]["fastv harm=48"]
    means = [scores[f"scenes_pope_{split}"]["metrics"]["accuracy"] for split in ("random", "popular")]
    assert columns["fastv harm=48"]["scores"]["accuracy"]["value"] == pytest.approx(sum(means) / 2)


def test_curves_are_paired_with_the_nearest_control_and_the_plain_twin(swept: RunResult) -> None:
    columns = swept.results["curves"]
    assert {label: (row["control"], row["plain"]) for label, row in columns.items()} == {
        "baseline": (None, None),
        "random_prune harm=50": (None, None),
        "random_prune harm=80": (None, None),
        "fastv harm=48": ("random_prune harm=50", None),
        "fastv harm=78": ("random_prune harm=80", None),
        "fastv debiased harm=48": ("random_prune harm=50", "fastv harm=48"),
        "fastv debiased harm=60": (None, None),  # no control within 5 points, no twin at this budget
        "prumerge": (None, None),
    }
    column, control = columns["fastv harm=78"], columns["random_prune harm=80"]
    difference = column["to_control"]["accuracy"]
    gap = column["scores"]["accuracy"]["value"] - control["scores"]["accuracy"]["value"]
    assert difference["value"] == pytest.approx(gap)
    assert difference["low"] <= difference["value"] <= difference["high"]


def test_curves_are_on_the_page(swept: RunResult, result: RunResult) -> None:
    assert swept.report is not None and result.report is not None
    page = swept.report.read_text()
    assert "Score against kept visual tokens" in page and "against the control, with and without debiasing" in page
    row = re.search(r"<tr class=''><td>fastv debiased harm=48</td><td>52.0</td><td>random_prune harm=50</td>", page)
    assert row, "the table names column, measured share and control"
    assert "against kept visual tokens" not in result.report.read_text()


def test_very_many_columns_leave_curves_to_their_own_plot(swept: RunResult, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlm_attn.evaluation import plots

    labels = list(swept.results["results"])
    assert plots.single(swept.results, labels) == labels
    monkeypatch.setattr(plots, "MANY", 3)
    assert plots.single(swept.results, labels) == ["baseline", "noop"]
    monkeypatch.delitem(swept.results["results"], "noop")
    assert [title for title, *_ in plots.all_plots(swept.results)] == ["Score against kept visual tokens"]


def test_pooled_splits_are_resampled_by_picture(swept: RunResult) -> None:
    """Three pictures in all: the interval of 36 answers may not be that of 36 independent ones."""
    from vlm_attn.evaluation.statistics import wilson

    row = swept.results["curves"]["fastv harm=48"]["scores"]["accuracy"]
    independent = wilson(round(36 * row["value"]), 36)
    assert (row["low"], row["high"]) != (independent.low, independent.high)
    assert row["low"] < row["value"] < row["high"]
