"""CHAIR, MME and the statistics, against hand counts and scipy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats as reference

from vlm_attn.evaluation.chair import ObjectWords, chair_metrics, count_caption, word_tokens
from vlm_attn.evaluation.mme import MmeAnswer, mme_metrics, mme_parse
from vlm_attn.evaluation.statistics import bootstrap, cluster_sums, mcnemar, paired_bootstrap, wilson

WORDS = ObjectWords.from_kinds({"dog": ["dogs", "puppy"], "hot dog": ["hot dogs"], "cup": ["cups"], "key": ["keys"]})


def test_words_and_double_words() -> None:
    assert word_tokens("A dog's T-shirt, two cups.") == ["a", "dog's", "t-shirt", ",", "two", "cups", "."]
    assert WORDS.mentions("A puppy eats a hot dog beside two Cups.") == ["dog", "hot dog", "cup"]
    assert WORDS.tokens("a hot dog.") == ["a", "hot dog", "."]


def test_a_form_has_one_meaning() -> None:
    with pytest.raises(ValueError, match="one meaning"):
        ObjectWords.from_kinds({"dog": ["pet"], "cat": ["pet"]})
    with pytest.raises(ValueError, match="two words"):
        ObjectWords.from_kinds({"stove": ["stove top oven"]})


def test_caption_counts() -> None:
    count = count_caption("A dog, a dog and a key.", ["dog", "cup"], WORDS)
    assert count.mentions == ("dog", "dog", "key")
    assert count.hallucinated == ("key",)
    assert (count.n_found, count.n_distinct, count.n_truth) == (1, 2, 2)
    assert (count.len_words, count.len_tokens) == (7, 9)


def test_chair_by_hand() -> None:
    counts = [
        count_caption("A dog, a dog and a key.", ["dog", "cup"], WORDS),
        count_caption("Two cups.", ["cup"], WORDS),
        count_caption("Nothing at all", ["key"], WORDS),
    ]
    score = chair_metrics(counts, "hand")
    assert score.chair_s == pytest.approx(1 / 3)
    assert score.chair_i == pytest.approx(1 / 4)  # mentions with repeats
    assert score.recall == pytest.approx(2 / 4)
    assert score.precision == pytest.approx(2 / 3)  # distinct objects
    assert score.f1 == pytest.approx(2 * (2 / 3) * 0.5 / (2 / 3 + 0.5))
    assert score.len_words == pytest.approx((7 + 2 + 3) / 3)
    assert score.variant == "hand"


def test_chair_without_captions_or_mentions_is_zero() -> None:
    assert chair_metrics([]).chair_s == 0
    assert chair_metrics([count_caption("", [], WORDS)]).chair_i == 0
    with pytest.raises(TypeError, match="caption"):
        count_caption(None, [], WORDS)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("Yes", "yes"), ("no.", "no"), ("yes, it is", "yes"), ("n/a", "other"), ("It is yes", "other"), ("", "other")],
)
def test_mme_reads_the_first_four_characters(text: str, expected: str) -> None:
    assert mme_parse(text) == expected


def test_mme_pairs_by_image_not_by_order() -> None:
    rows = [
        MmeAnswer("color", "a", "yes", "Yes"),
        MmeAnswer("color", "b", "yes", "no"),
        MmeAnswer("color", "a", "no", "No"),
        MmeAnswer("color", "b", "no", "no"),
        MmeAnswer("count", "a", "yes", "yes"),
        MmeAnswer("count", "a", "no", "yes"),
    ]
    out = mme_metrics(rows)
    assert out["color_acc"] == pytest.approx(3 / 4)
    assert out["color_acc_plus"] == pytest.approx(1 / 2)
    assert out["count_score"] == pytest.approx(50)
    assert out["score"] == pytest.approx(75 + 50 + 50)
    assert (out["n"], out["pairs"]) == (6, 3)
    assert mme_metrics(rows[:1])["acc_plus"] == 0  # a pair cut in half is not a pair


@pytest.mark.parametrize(("k", "n"), [(0, 10), (7, 10), (10, 10), (450, 500)])
def test_wilson_equals_scipy(k: int, n: int) -> None:
    ours = wilson(k, n)
    theirs = reference.binomtest(k, n).proportion_ci(method="wilson")
    assert ours.low == pytest.approx(theirs.low, abs=1e-12)
    assert ours.high == pytest.approx(theirs.high, abs=1e-12)


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (1, 0), (5, 15), (12, 12), (300, 200), (0, 2000)])
def test_mcnemar_equals_scipy(gained: int, lost: int) -> None:
    before = [False] * gained + [True] * lost + [True, False]
    after = [True] * gained + [False] * lost + [True, False]
    test = mcnemar(before, after)
    expected = reference.binomtest(min(gained, lost), gained + lost).pvalue if gained + lost else 1.0
    assert (test.gained, test.lost) == (gained, lost)
    assert test.p == pytest.approx(expected, rel=1e-9, abs=1e-300)


def test_bootstrap_agrees_with_the_normal_interval_of_a_mean() -> None:
    values = np.random.default_rng(1).normal(3, 1, size=400)
    sums = np.stack([values, np.ones(400)], axis=1)
    interval = bootstrap(sums, lambda s: s[:, 0] / s[:, 1], seed=3, resamples=4000)
    half = 1.96 * values.std(ddof=1) / 20
    assert interval.value == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - half, abs=0.02)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.02)
    assert bootstrap(sums, lambda s: s[:, 0] / s[:, 1], seed=3, resamples=4000) == interval


def test_questions_of_one_picture_move_together() -> None:
    """Six equal answers per picture carry the information of one: the interval must be that of the pictures."""
    right = np.random.default_rng(0).random(100) < 0.7
    rows = [(float(r), 1.0) for r in right for _ in range(6)]
    sums, clusters = cluster_sums(rows, [i for i in range(100) for _ in range(6)])
    assert (sums.shape, clusters[:2]) == ((100, 2), [0, 1])
    clustered = bootstrap(sums, lambda s: s[:, 0] / s[:, 1])
    naive = bootstrap(np.array(rows), lambda s: s[:, 0] / s[:, 1])
    assert clustered.high - clustered.low > 2 * (naive.high - naive.low)


def test_paired_difference() -> None:
    ones = np.ones(50)
    base = np.stack([np.arange(50) % 2, ones], axis=1).astype(float)
    better = np.stack([ones, ones], axis=1)
    rate = lambda s: s[:, 0] / s[:, 1]  # noqa: E731
    same, p_same = paired_bootstrap(base, base, rate)
    assert (same.value, same.low, same.high, p_same) == (0, 0, 0, 1)
    gain, p_gain = paired_bootstrap(base, better, rate)
    assert gain.value == pytest.approx(0.5)
    assert 0.3 < gain.low < 0.5 < gain.high < 0.7
    assert p_gain < 0.01
    with pytest.raises(ValueError, match="equal shapes"):
        paired_bootstrap(base, better[:10], rate)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"0\.\.n"):
        wilson(5, 3)
    with pytest.raises(ValueError, match="same questions"):
        mcnemar([True], [True, False])
    with pytest.raises(ValueError, match="cluster ids"):
        cluster_sums([(1.0,)], [1, 2])
    with pytest.raises(ValueError, match="resamples"):
        bootstrap(np.ones((3, 2)), lambda s: s[:, 0], resamples=0)
