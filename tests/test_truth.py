"""Every method against its dense fp32 reference: one sample at a time, prefill and five cached steps."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import vlm_attn
from tests import models
from tests.conftest import FLEX
from tests.matrix import MATRIX, TENSOR_METHODS
from tests.reference.contrast import add_noise, vcd
from tests.reference.llava import Dense, image_features, visual_runs
from tests.reference.pruning import FastV, budget
from tests.runs import distance, greedy, manual

TOLERANCE = 1e-4
CASES = [(name, number) for name in TENSOR_METHODS for number in range(len(MATRIX[name].variants))]
MARGIN = 1e-5  # below it, fp32 may decide a gate or a cut either way


def dense_rows(model: Any, batch: models.Batch, tokens: torch.Tensor, make: Any) -> tuple[torch.Tensor, list[Dense]]:
    """Reference logits `[steps, B, V]` and the references themselves."""
    rows, references = [], []
    for row, sample in enumerate(batch.samples):
        reference = make(row)
        reference.pixels = sample.pixels
        rows.append(reference.run(sample.ids, image_features(model, sample.pixels), tokens[row, :-1]))
        margin = getattr(reference, "margin", 1.0)
        assert margin > MARGIN, f"this input sits on a threshold ({margin:.1e}): choose another seed"
        references.append(reference)
    return torch.stack(rows, dim=1), references


@pytest.mark.parametrize("kind", ["single", "padded", "two_images"])
@pytest.mark.parametrize("ratio", [1, 4, 7])
@pytest.mark.parametrize(("name", "number"), CASES)
def test_logits_are_the_references(name: str, number: int, ratio: int, kind: str) -> None:
    row = MATRIX[name]
    params = row.variants[number]
    model, batch = models.llava(ratio), models.BATCHES[kind]()
    with vlm_attn.attach(model, vlm_attn.method(name, **params)) as session:
        tokens, logits, _ = greedy(model, batch.inputs())
        last = session.last
    expected, references = dense_rows(model, batch, tokens, lambda i: row.reference(model, params, last, i))
    assert distance(logits, expected) <= TOLERANCE
    check_facts(name, references, last)


def check_facts(name: str, references: list[Dense], last: Any) -> None:
    """What the session reports is what the reference did."""
    for index, reference in enumerate(references):
        pad = int((~last.tokens.valid[index]).sum())
        if name == "fastv":
            kept = last.kept(reference.layer)[index] - pad
            assert torch.equal(kept, torch.cat(reference.kept))
        if name == "vhr":
            for (_, layer), factors in last.factors.items():
                chosen = (factors[index] != 1).nonzero()[:, 0]
                assert torch.equal(chosen, reference.selected[layer])
            assert {layer for _, layer in last.factors} == reference.layers
    if name in ("var", "placebo"):
        edited = sum(r.edited for r in references)
        assert edited > 0, "the reference edited nothing: this row tests nothing"
        assert sum(last.edited.values()) == edited


@pytest.mark.parametrize("ratio", [1, 4, 7])
@pytest.mark.parametrize("backend_name", ["eager"])
@pytest.mark.parametrize("name", TENSOR_METHODS)
def test_other_backends(name: str, backend_name: str, ratio: int) -> None:
    row, params = MATRIX[name], MATRIX[name].variants[0]
    model, batch = models.llava(ratio, backend_name), models.mixed()
    with vlm_attn.attach(model, vlm_attn.method(name, **params)) as session:
        tokens, logits, _ = greedy(model, batch.inputs())
        last = session.last
    expected, _ = dense_rows(model, batch, tokens, lambda i: row.reference(model, params, last, i))
    assert distance(logits, expected) <= TOLERANCE


@pytest.mark.parametrize("backend", [FLEX], indirect=True)
@pytest.mark.parametrize("name", TENSOR_METHODS)
def test_flex_attention(name: str, backend: str) -> None:
    row, params = MATRIX[name], MATRIX[name].variants[0]
    model, batch = models.llava(4, backend), models.padded()
    with vlm_attn.attach(model, vlm_attn.method(name, **params)) as session:
        tokens, logits, _ = greedy(model, batch.inputs())
        last = session.last
    expected, _ = dense_rows(model, batch, tokens, lambda i: row.reference(model, params, last, i))
    assert distance(logits, expected) <= TOLERANCE


@pytest.mark.parametrize("name", [n for n in TENSOR_METHODS if not MATRIX[n].generates_only])
def test_hand_written_loop(name: str) -> None:
    """`forward` with a cache of one's own gives what `generate` gives."""
    row, params = MATRIX[name], MATRIX[name].variants[-1]
    model, batch = models.llava(4), models.padded()
    with vlm_attn.attach(model, vlm_attn.method(name, **params)) as session:
        tokens, _, _ = greedy(model, batch.inputs())
        looped = manual(model, batch.inputs(), tokens[:, :-1])
        last = session.last
    expected, _ = dense_rows(model, batch, tokens, lambda i: row.reference(model, params, last, i))
    assert distance(looped, expected) <= TOLERANCE


@pytest.mark.parametrize("ratio", [1, 4, 7])
@pytest.mark.parametrize("number", range(len(MATRIX["vcd"].variants)))
@pytest.mark.parametrize("kind", ["single", "padded", "two_images"])
def test_vcd_is_two_cache_free_forwards(kind: str, number: int, ratio: int) -> None:
    params = MATRIX["vcd"].variants[number]
    model, batch = models.llava(ratio), models.BATCHES[kind]()
    method = vlm_attn.method("vcd", **params)
    inputs = batch.inputs()
    noised = torch.stack([method.alter_pixels(picture) for picture in inputs["pixel_values"]])
    with vlm_attn.attach(model, method):
        tokens, logits, scores = greedy(model, inputs)
    start = 0
    for row, sample in enumerate(batch.samples):
        mine = noised[start : start + len(sample.pixels)]
        start += len(sample.pixels)
        forced = tokens[row, :-1].tolist()
        expected = vcd(
            model, sample.ids, sample.pixels, mine, forced, params.get("alpha", 1.0), params.get("beta", 0.1)
        )
        assert distance(scores[:, row], expected) <= TOLERANCE
        plain = Dense(model).run(sample.ids, image_features(model, sample.pixels), forced)
        assert distance(logits[:, row], plain) <= TOLERANCE


@pytest.mark.parametrize("step", [0, 500, 999])
def test_vcd_noise_is_the_schedule(step: int) -> None:
    """`x_t - sqrt(abar) x` is the same Gaussian at every step, of unit scale after division."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn((2, 3, 56, 56), generator=generator)
    first = vlm_attn.method("vcd", noise_step=999).alter_pixels(pixels)
    zero = add_noise(pixels, torch.zeros_like(pixels), 999)
    unit = add_noise(torch.zeros_like(pixels), torch.ones_like(pixels), 999)
    epsilon = (first - zero) / unit
    assert abs(float(epsilon.mean())) < 0.03
    assert abs(float(epsilon.std()) - 1) < 0.03
    got = vlm_attn.method("vcd", noise_step=step).alter_pixels(pixels)
    assert torch.allclose(got, add_noise(pixels, epsilon, step), atol=1e-4)


@pytest.mark.parametrize("sigma", [0.0, 1.3])
def test_fastv_with_the_positional_trend(sigma: float) -> None:
    model, batch = models.llava(4), models.two_images()
    method = vlm_attn.method("fastv", keep=5, calibrate=["exp_trend"], sigma=sigma)
    with vlm_attn.attach(model, method) as session:
        tokens, logits, _ = greedy(model, batch.inputs())
        last = session.last
    expected, references = dense_rows(model, batch, tokens, lambda i: FastV(model, 2, 5, sigma=sigma))
    assert distance(logits, expected) <= TOLERANCE
    check_facts("fastv", references, last)


@pytest.mark.parametrize("name", ["random_prune", "uniform_prune"])
@pytest.mark.parametrize("keep", [1, 5, 16, 99, 0.25, 0.4, 1.0])
def test_budgets_are_per_image(name: str, keep: float) -> None:
    model, batch = models.llava(4), models.mixed()
    with vlm_attn.attach(model, vlm_attn.method(name, keep=keep)) as session:
        greedy(model, batch.inputs(), 1)
        kept = session.last.kept(2)
    for row, sample in enumerate(batch.samples):
        pad = batch.inputs()["input_ids"].shape[1] - len(sample.ids)
        for run in visual_runs(sample.visual):
            mine = [int(p) - pad for p in kept[row] if int(run[0]) <= int(p) - pad <= int(run[-1])]
            assert len(mine) == budget(keep, models.N_VISUAL)
            if name == "uniform_prune" and len(mine) > 2:
                gaps = [b - a for a, b in itertools.pairwise(mine)]
                assert max(gaps) - min(gaps) <= 1


def test_random_prune_follows_its_seed() -> None:
    model, inputs = models.llava(4), models.single().inputs()

    def kept(seed: int) -> list[int]:
        with vlm_attn.attach(model, vlm_attn.method("random_prune", keep=8, seed=seed)) as session:
            greedy(model, inputs, 1)
            return session.last.kept(2)[0].tolist()

    torch.manual_seed(1)
    first = kept(0)
    torch.manual_seed(2)
    assert kept(0) == first
    assert any(kept(seed) != first for seed in (1, 2, 3))
