"""VHD and T-VHD against dense streams with and without the picture."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

import vlm_attn
from tests import models
from tests.reference import family as on_family
from tests.reference.edits import LastRow
from tests.reference.llava import image_features
from vlm_attn.errors import UnsupportedError
from vlm_attn.families.checks import batches
from vlm_attn.families.zoo import SPECIMENS
from vlm_attn.families.zoo.base import BOS
from vlm_attn.readouts.reader import read

STEPS = 4


@functools.cache
def specimen(name: str) -> Any:
    return SPECIMENS[name].build()


class Outputs(LastRow):
    """Head outputs ``[H, d]`` of the newest row of every pass and layer."""

    def run(self, ids: Tensor, features: Tensor | None, forced: Any = ()) -> Tensor:
        """See `Dense.run`."""
        self.steps: list[list[Tensor]] = []
        return super().run(ids, features, forced)

    def edit_heads(self, layer: int, outputs: Tensor, prefill: bool) -> Tensor:
        """Reads only."""
        if layer == 0:
            self.steps.append([])
        self.steps[-1].append(outputs[:, -1].clone())
        return outputs


@pytest.mark.parametrize("ratio", [1, 4])
@pytest.mark.parametrize("kind", ["padded", "mixed"])
def test_divergence_is_two_dense_streams(kind: str, ratio: int) -> None:
    model, batch = models.llava(ratio), getattr(models, kind)()
    with vlm_attn.attach(model) as session:
        records = read(session, batch.inputs(), ["vhd", "t_vhd"], max_new_tokens=STEPS)
        first = read(session, batch.inputs(), "vhd", max_new_tokens=STEPS)
    for sample, record, single in zip(batch.samples, records, first, strict=True):
        image, text = Outputs(model), Outputs(model)
        image.run(sample.ids, image_features(model, sample.pixels), list(record.tokens[:-1]))
        text.run(sample.ids[~sample.visual], None, list(record.tokens[:-1]))
        for step in range(STEPS):
            total = 0.0
            for layer in range(4):
                gaps = (image.steps[step][layer] - text.steps[step][layer]).norm(dim=-1)
                torch.testing.assert_close(record.vhd[step, layer], gaps, atol=1e-4, rtol=1e-3)
                total += float(gaps.sort(descending=True).values[:2].sum())
            assert float(record.t_vhd(2)[step]) == pytest.approx(total, rel=1e-3)
        torch.testing.assert_close(single.vision_aware(), record.vision_aware())
        assert len(single.vhd) == 1


class FamilyOutputs(on_family.OnModel):
    """The same inside a family's stock model."""

    def begin(self, inputs: dict[str, Tensor]) -> None:
        """Nothing seen."""
        self.steps: list[list[Tensor]] = []

    def edit_heads(self, layer: int, outputs: Tensor, prefill: bool) -> Tensor:
        """Reads only."""
        if layer == 0:
            self.steps.append([])
        self.steps[-1].append(outputs[:, -1].clone())
        return outputs


@pytest.mark.parametrize("name", ["llava_next", "qwen2_5_vl"])
def test_divergence_on_families(name: str) -> None:
    model, rows = specimen(name), batches(SPECIMENS[name])["padded"]
    with vlm_attn.attach(model) as session:
        records = read(session, SPECIMENS[name].inputs(rows), "t_vhd", max_new_tokens=STEPS)
    for row, record in zip(rows, records, strict=True):
        inputs = SPECIMENS[name].inputs([row])
        words = [word for run in row.words() for word in run]
        text = torch.tensor([[*([BOS] if BOS in inputs["input_ids"] else []), *words]])
        forced = torch.tensor(record.tokens)
        streams = []
        for given in (inputs, {"input_ids": text, "attention_mask": torch.ones_like(text)}):
            stream = FamilyOutputs(model)
            stream.answer(given, forced)
            streams.append(torch.stack([torch.stack(step) for step in stream.steps]))
        expected = (streams[0] - streams[1]).norm(dim=-1)
        torch.testing.assert_close(record.vhd, expected, atol=1e-3, rtol=1e-3)


def test_divergence_is_measured_before_the_heads_of_the_layer_are_scaled() -> None:
    """As VHR measures it: reinforced layers below, this one not yet."""
    model, inputs = models.llava(4), models.padded().inputs()
    with vlm_attn.attach(model, vlm_attn.method("vhr", last_layers=4, filter_outliers=False)) as session:
        records = read(session, inputs, "vhd", max_new_tokens=1)
        factors = session.last.factors
    for index, record in enumerate(records):
        vhd = record.vision_aware()
        for layer in range(4):
            chosen = vhd[layer] > vhd[layer].median()
            assert torch.equal(chosen, factors[0, layer][index] != 1)


def test_an_answer_that_changes_its_prompt_is_refused() -> None:
    """In a prefix that attends both ways, one pass over prompt and answer is no sequence of steps."""
    model, inputs = (
        specimen("paligemma"),
        SPECIMENS["paligemma"].inputs(batches(SPECIMENS["paligemma"])["single"]),
    )
    with vlm_attn.attach(model) as session:
        assert read(session, inputs, "vhd", max_new_tokens=3)[0].vision_aware().isfinite().all()
        with pytest.raises(UnsupportedError, match="both directions"):
            read(session, inputs, "t_vhd", max_new_tokens=3)
