"""The references themselves: without a method they are the stock model, and pruning by mask is an ordinary mask."""

from __future__ import annotations

import pytest
import torch

from tests import models
from tests.reference.contrast import AttentionRows
from tests.reference.llava import Dense, image_features, visual_runs
from tests.reference.pruning import FastV, Masked


@pytest.mark.parametrize("ratio", [1, 4, 7])
def test_dense_is_the_stock_model(ratio: int) -> None:
    model = models.llava(ratio, "eager")
    prompt = models.sample(seed=1)
    out = model.generate(
        **prompt.inputs(), max_new_tokens=4, min_new_tokens=4, do_sample=False, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    stock = torch.cat(out.logits)
    forced = out.sequences[0, len(prompt.ids) :][:-1]
    dense = Dense(model).run(prompt.ids, image_features(model, prompt.pixels), forced)
    assert (stock - dense).abs().max() <= 1e-5 * stock.abs().max()


def test_rows_are_the_eager_attentions() -> None:
    model = models.llava(4, "eager")
    prompt = models.sample(seed=1)
    stock = model(**prompt.inputs(), output_attentions=True).attentions
    reference = AttentionRows(model)
    reference.run(prompt.ids, image_features(model, prompt.pixels))
    for layer, weights in enumerate(stock):
        row = weights[0, :, -1].mean(dim=0)[prompt.visual]
        assert torch.allclose(row, reference.rows[layer][0], atol=1e-6)


def test_attention_is_peaked_enough_to_matter() -> None:
    model = models.llava(4, "eager")
    weights = model(**models.sample(seed=1).inputs(), output_attentions=True).attentions
    largest = torch.stack([w[0, :, -1].max(dim=-1).values.mean() for w in weights])
    assert largest.min() > 0.15  # uniform over 26 keys would be 0.04


def test_masked_from_layer_zero_is_a_padding_mask() -> None:
    model = models.llava(4, "eager")
    prompt = models.sample(seed=1)
    kept = torch.arange(4, 14)
    reference = Masked(model, 0, [kept])
    masked = reference.run(prompt.ids, image_features(model, prompt.pixels))
    inputs = prompt.inputs()
    inputs["attention_mask"][0, reference.dropped] = 0
    inputs["position_ids"] = torch.arange(len(prompt.ids))[None]
    stock = model(**inputs).logits[:, -1]
    assert (stock - masked).abs().max() <= 1e-5 * stock.abs().max()


def test_fastv_keeps_the_best_attended() -> None:
    model = models.llava(4, "eager")
    prompt = models.sample(images=2, seed=4)
    reference = FastV(model, 2, 5)
    reference.run(prompt.ids, image_features(model, prompt.pixels))
    row = model(**prompt.inputs(), output_attentions=True).attentions[1][0, :, -1].mean(dim=0)
    for positions, kept in zip(visual_runs(prompt.visual), reference.kept, strict=True):
        best = positions[row[positions].topk(5).indices].sort().values
        assert torch.equal(kept, best)
