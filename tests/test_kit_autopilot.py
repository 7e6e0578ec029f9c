"""Budgets in time: the largest kept set whose prefill, by measured times, fits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vlm_attn
from tests import models
from vlm_attn import latency
from vlm_attn.errors import UnsupportedError
from vlm_attn.families.zoo import SPECIMENS
from vlm_attn.latency import Latency

# A layer takes 1 ms per ten tokens up to a hundred, then 2 ms per ten.
TIMES = Latency((10, 100, 200), (0.001, 0.010, 0.030), 4)
METHODS: list[tuple[str, int]] = [("fastv", 2), ("norm_prune", 0), ("norm_prune", 3), ("fastervlm", 0)]


def attached(name: str, layer: int, keep: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A session with known times."""
    monkeypatch.setattr(latency, "measure", lambda session: TIMES)
    params = {} if name == "fastervlm" else {"layer": layer}
    return vlm_attn.attach(models.llava(4), vlm_attn.method(name, keep=keep, **params))


def test_times_between_and_beyond_the_points() -> None:
    assert TIMES.layer(55) == pytest.approx(0.0055)
    assert TIMES.layer(150) == pytest.approx(0.020)
    assert TIMES.layer(400) == pytest.approx(0.060)
    assert TIMES.layer(1) == 0.001


@pytest.mark.parametrize("first", [0, 1, 3])
@pytest.mark.parametrize("target", [0.001, 0.012, 0.0222, 0.05, 1.0])
def test_budget_is_the_largest_that_fits(first: int, target: float) -> None:
    def takes(k: int) -> float:
        return first * TIMES.layer(90) + (4 - first) * TIMES.layer(20 + k)

    fits = [k for k in range(71) if takes(k) <= target]
    assert TIMES.budget(target, 20, 70, first) == max(fits, default=0)


@pytest.mark.parametrize(("name", "layer"), METHODS)
def test_a_target_in_time_is_kept(name: str, layer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of unequal length, one and two pictures: each sample by its own length, the largest that fits."""
    counts = set()
    for batch in (models.padded(), models.pairs()):
        for target in (5.0, 9.0, 12.5):
            with attached(name, layer, f"auto:{target}ms", monkeypatch) as session, torch.no_grad():
                session.model(**batch.inputs())
                request = session.last
                kept = [len(k) for k in request.kept(3)]
            for row, sample in enumerate(batch.samples):
                visual = int(sample.visual.sum())
                text, pictures = len(sample.ids) - visual, visual // models.N_VISUAL
                best = TIMES.budget(target / 1000, text, visual, layer)
                # Equal shares of the pictures, rounded down; one token each at least.
                assert kept[row] == pictures * max(1, int(best / pictures + 1e-6))
                counts.add(kept[row])
    assert len(counts) > 2


def test_a_batch_affords_what_its_samples_afford_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with attached("fastv", 1, "auto:7ms", monkeypatch) as session, torch.no_grad():
        session.model(**models.padded().inputs())
        together = [k.tolist() for k in session.last.kept_visual(3)]
        for row, sample in enumerate(models.padded().samples):
            session.model(**sample.inputs())
            assert session.last.kept_visual(3)[0].tolist() == together[row]


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "gemma3"])
def test_times_are_measured_when_a_method_is_attached(family: str) -> None:
    """On real decoders; nothing is measured for other budgets."""
    model = SPECIMENS[family].build()
    with vlm_attn.attach(model, vlm_attn.method("fastv", keep="auto:0.001ms")) as session:
        times = session.pruner.latency
        assert times is not None and times.layers == session.info.layers
        assert all(b >= a > 0 for a, b in zip(times.seconds, times.seconds[1:], strict=False))
        with pytest.raises(ValueError, match="no request has run"):
            _ = session.last
    with vlm_attn.attach(model, vlm_attn.method("fastv", keep="auto:0.9")) as session:
        assert session.pruner.latency is None


def test_a_decoder_that_cannot_be_timed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(session: Any, rows: torch.Tensor) -> float:
        raise UnsupportedError("a latency target cannot be measured")

    monkeypatch.setattr(latency, "_timed", fails)
    model = models.build_llava(4)
    with pytest.raises(UnsupportedError, match="cannot be measured"):
        vlm_attn.attach(model, vlm_attn.method("fastv", keep="auto:5ms"))
    vlm_attn.attach(model).detach()  # nothing was left behind


@pytest.mark.parametrize("wrong", ["auto:ms", "auto:-3ms", "auto:5s", "5ms"])
def test_other_times_are_refused(wrong: str) -> None:
    with pytest.raises(ValueError, match="keep"):
        vlm_attn.method("fastv", keep=wrong)
