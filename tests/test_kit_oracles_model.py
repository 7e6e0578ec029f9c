"""The oracles of token pruning that need a model: keep-all, masking, one row, batches, mandatory controls."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vlm_attn
from tests import models
from tests.matrix_pruning import PRUNING
from tests.reference.llava import image_features
from tests.reference.pruning import Masked
from tests.runs import distance, greedy
from vlm_attn.bench import prune
from vlm_attn.contract import field_names

EVERYTHING: dict[str, dict[str, Any]] = {
    "feather": {"layers": [1, 2], "keep": [1.0, 1.0]},
    "himap": {"layers": [1, 2], "keep": [1.0, 1.0]},
    "illava": {"encoder_drop": 0, "keep": 1.0},
    "prumerge": {"at_least": 1.0},
    "pyramiddrop": {"layers": [1, 2], "keep": [1.0, 1.0]},
    "sparsevlm": {"layers": [0, 1], "keep": [1.0, 1.0]},
    "spatten": {"keep": 1.0, "keep_heads": 1.0},
    "text_dominance_compress": {"reduction": 0.0},
}
THREE = models.Batch([models.sample(4, 9, seed=2), models.sample(2, 5, seed=3), models.sample(3, 7, seed=9)])


@pytest.mark.parametrize("name", [*PRUNING, "fastv", "random_prune", "uniform_prune"])
def test_oracle_1_keeping_everything_is_bit_exact(name: str) -> None:
    """With original and with renumbered positions."""
    model, inputs = models.llava(4), THREE.inputs()
    _, stock, _ = greedy(model, inputs, 2)
    params = EVERYTHING.get(name, {"keep": 1.0})
    policies = [{"positions": p} for p in ("keep", "renumber")] if has_positions(name) else [{}]
    for policy in policies:
        with vlm_attn.attach(model, vlm_attn.method(name, **params, **policy)):
            _, logits, _ = greedy(model, inputs, 2)
        assert torch.equal(logits, stock)


def has_positions(name: str) -> bool:
    return "positions" in field_names(type(vlm_attn.method(name)))


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("layer", [1, 2, 3])
def test_oracle_2_fastv_removal_is_masking(layer: int, backend: str) -> None:
    """Same kept set, batch of three unequal prompts, prefill and five decode steps."""
    model = models.llava(4, backend)
    with vlm_attn.attach(model, vlm_attn.method("fastv", layer=layer, keep=6)) as session:
        tokens, logits, _ = greedy(model, THREE.inputs())
        last = session.last
    for row, sample in enumerate(THREE.samples):
        kept = last.kept(layer)[row] - int((~last.tokens.valid[row]).sum())
        masked = Masked(model, layer, [kept])
        expected = masked.run(sample.ids, image_features(model, sample.pixels), tokens[row, :-1])
        assert distance(logits[:, row], expected) <= 1e-5


@pytest.mark.parametrize("ratio", [1, 4, 7])
def test_oracle_7_one_row_is_the_eager_row(ratio: int) -> None:
    """Grouped heads and left padding, against the attentions that the eager model returns."""
    inputs = models.padded().inputs()
    with torch.no_grad():
        eager = models.llava(ratio, "eager")(**inputs, output_attentions=True).attentions[1]
    model = models.llava(ratio)
    with vlm_attn.attach(model, vlm_attn.method("fastv", keep=1.0)) as session, torch.no_grad():
        model(**inputs)
        (score,) = session.last.scores.values()
    assert torch.allclose(score, eager[:, :, -1].mean(1), atol=1e-6)


@pytest.mark.parametrize(
    "name", ["fastv", "himap", "sparsevlm", "tokencarve", "visionzip", "flowcut", "tome", "spatten"]
)
def test_oracle_8_a_batch_is_its_singles(name: str) -> None:
    model = models.llava(4)
    with vlm_attn.attach(model, name) as session:
        _, together, _ = greedy(model, models.padded().inputs())
        kept = session.last.kept_visual(3)
        for row, sample in enumerate(models.padded().samples):
            _, alone, _ = greedy(model, sample.inputs())
            assert session.last.kept_visual(3)[0].tolist() == kept[row].tolist()
            assert distance(together[:, row], alone[:, 0]) <= 1e-5


def test_oracle_10_controls_stand_in_the_table() -> None:
    """Random, uniform and norm are measured beside every method, with the same budget."""
    for shape in prune.SHAPES.values():
        controls = {c.name: prune.nominal(c.method) for c in prune.chosen(prune.cases(shape), ()) if c.method}
        budgets = {controls[name] for name in ("random_prune", "uniform_prune", "norm_prune", "fastv", "divprune")}
        assert len(budgets) == 1
