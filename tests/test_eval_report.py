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
                 "read by every parser", "How it was made", "hostile a, b", "McNemar p"):  # fmt: skip
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
