"""Edits composed with pruning, with contrast and with each other, against dense step-by-step references."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import vlm_attn
from tests import models
from tests.matrix import MATRIX
from tests.reference.compose import Chain
from tests.reference.contrast import contrast
from tests.reference.llava import Dense, image_features
from tests.reference.pruning import FastV
from tests.runs import distance, greedy
from tests.test_truth import MARGIN, TOLERANCE

EDITS = [r.name for r in vlm_attn.methods() if r.stage == "edit" and r.name in MATRIX and r.name != "placebo"]
EARLY = {"zerotuning"}  # enters before the softmax, so that pruning reads it


def parts(names: list[str], model: Any, last: Any, row: int) -> list[Dense]:
    """References in the engine's order: what enters the softmax, the pruning score, then weights and heads."""
    out = []
    for name in sorted(names, key=lambda n: 0 if n in EARLY else 1 if n == "fastv" else 2):
        out.append(
            FastV(model, 2, 0.5) if name == "fastv" else MATRIX[name].reference(model, MATRIX[name].default, last, row)
        )
    return out


def check(names: list[str], batch: models.Batch) -> None:
    model = models.llava(4)
    with vlm_attn.attach(model, [vlm_attn.method(n, **MATRIX[n].default) for n in names]) as session:
        tokens, logits, _ = greedy(model, batch.inputs(), 4)
        last = session.last
    for row, sample in enumerate(batch.samples):
        reference = Chain(parts(names, model, last, row))
        reference.pixels = sample.pixels
        expected = reference.run(sample.ids, image_features(model, sample.pixels), tokens[row, :-1])
        assert reference.margin > MARGIN
        assert distance(logits[:, row], expected) <= TOLERANCE


@pytest.mark.parametrize("name", EDITS)
def test_any_edit_with_pruning(name: str) -> None:
    check([name, "fastv"], MATRIX[name].batch)


@pytest.mark.parametrize("name", EDITS)
def test_any_edit_with_contrast(name: str) -> None:
    """The edited stream against an unedited one on the noised picture."""
    model, batch, row = models.llava(4), MATRIX[name].batch, MATRIX[name]
    noise = vlm_attn.method("vcd")
    with vlm_attn.attach(model, [vlm_attn.method(name, **row.default), noise]) as session:
        tokens, _, scores = greedy(model, batch.inputs(), 4)
        last = session.last
    for index, sample in enumerate(batch.samples):
        reference = row.reference(model, row.default, last, index)
        reference.pixels = sample.pixels
        forced = tokens[index, :-1]
        edited = reference.run(sample.ids, image_features(model, sample.pixels), forced)
        noised = torch.stack([noise.alter_pixels(picture) for picture in sample.pixels])
        other = Dense(model).run(sample.ids, image_features(model, noised), forced)
        expected = torch.stack([contrast(a, b, 1.0, 0.1) for a, b in zip(edited, other, strict=True)])
        assert distance(scores[:, index], expected) <= TOLERANCE


def test_guidance_with_pruning() -> None:
    """PAI whole: the edited and pruned stream against the text-only one, which is neither."""
    model, batch = models.llava(4), models.padded()
    pai = vlm_attn.method("pai", gamma=1.5)
    with vlm_attn.attach(model, [pai, "fastv"]) as session:
        tokens, _, scores = greedy(model, batch.inputs(), 4)
        last = session.last
    for row, sample in enumerate(batch.samples):
        reference = Chain([MATRIX[n].reference(model, {}, last, row) for n in ("fastv", "pai")])
        reference.pixels = sample.pixels
        edited = reference.run(sample.ids, image_features(model, sample.pixels), tokens[row, :-1]).log_softmax(-1)
        text = Dense(model).run(sample.ids[~sample.visual], None, tokens[row, :-1]).log_softmax(-1)
        floor = edited.amax(-1, keepdim=True) + math.log(pai.plausibility)
        expected = torch.where(edited < floor, -math.inf, 1.5 * (edited - text) + text)
        assert distance(scores[:, row], expected) <= TOLERANCE


@pytest.mark.parametrize(
    "names",
    [["var", "vhr"], ["gift", "vhr"], ["vaf", "zerotuning", "var"], ["pai", "var", "vhr"], ["adhh", "var"]],
    ids="+".join,
)
def test_edits_with_each_other(names: list[str]) -> None:
    check(names, models.padded())


@pytest.mark.parametrize(
    ("names", "message"),
    [(["var", "act"], "redistribute"), (["act", "sofa"], "columns"), (["act", "adhh"], "columns"),
     (["vhr", "head_gate"], "HeadScale")],
)  # fmt: skip
def test_contradicting_edits_are_refused(names: list[str], message: str) -> None:
    methods = [vlm_attn.method(n, **MATRIX[n].default) for n in names]
    with pytest.raises(ValueError, match=message):
        vlm_attn.attach(models.llava(4), methods)
