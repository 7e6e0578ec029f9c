"""The draft of ILVAD: only inside `generate`, per sample, ended by the end-of-sequence token."""

from __future__ import annotations

import pytest
import torch

import vlm_attn
from tests import models
from tests.runs import greedy
from vlm_attn.errors import UnsupportedError

METHOD = {"tau": 2.0, "first_layer": 1, "draft": 5}


def test_it_is_refused_where_it_cannot_draft() -> None:
    model, inputs = models.llava(4), models.single().inputs()
    with vlm_attn.attach(model, vlm_attn.method("ilvad", **METHOD)):
        with pytest.raises(UnsupportedError, match=r"ilvad.*generate\(\)"):
            model(**inputs)
        with pytest.raises(UnsupportedError, match="ilvad.*num_beams=1"):
            model.generate(**inputs, max_new_tokens=2, num_beams=2)


def test_several_return_sequences_share_their_draft() -> None:
    model, inputs = models.llava(4), models.padded().inputs()
    with vlm_attn.attach(model, vlm_attn.method("ilvad", **METHOD)) as session:
        model.generate(**inputs, max_new_tokens=2, do_sample=True, num_return_sequences=2)
        found = session.last.memory[0].map
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[1], found[2])


def test_a_draft_ends_with_its_sample() -> None:
    """Steps behind the end of the draft do not count: a sample gives alone what it gives beside a longer draft."""
    model, batch = models.build_llava(4), models.padded()
    tokens, _, _ = greedy(model, batch.inputs(), 5)
    model.generation_config.eos_token_id = int(tokens[1, 2])  # the second sample ends after three tokens
    method = vlm_attn.method("ilvad", **METHOD)
    maps = []
    with vlm_attn.attach(model, method) as session:
        for sample in (batch, models.Batch([batch.samples[1]])):
            model.generate(**sample.inputs(), max_new_tokens=1, do_sample=False)
            maps.append(session.last.memory[0].map[-1])
        model.generation_config.eos_token_id = None
        model.generate(**batch.inputs(), max_new_tokens=1, do_sample=False)
        unended = session.last.memory[0].map[-1]
    alone = torch.nn.functional.pad(maps[1], (len(maps[0]) - len(maps[1]), 0))
    assert torch.allclose(maps[0], alone, atol=1e-5)
    assert not torch.allclose(maps[0], unended, atol=1e-3)
