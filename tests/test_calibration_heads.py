"""Head searches: what they read, what they keep, and questions from a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import vlm_attn
from tests import models
from vlm_attn import calibration_heads as heads
from vlm_attn.calibration_heads import Bench, Question, Reading
from vlm_attn.wrap import VLM


@pytest.fixture(scope="module")
def vlm() -> Any:
    with VLM(models.build_llava(4), models.tiny_processor()) as wrapped:
        yield wrapped


def asked(count: int = 3) -> list[Question]:
    return [Question(models.picture(seed=i), f"w{10 + i} w20", "w30", "w31") for i in range(count)]


def test_margin_and_entropy_are_those_of_the_model(vlm: VLM) -> None:
    reading = Bench(vlm, asked()).ask(None)
    for number, question in enumerate(asked()):
        logits = vlm.model(**vlm.inputs([question.image], question.text)).logits[0, -1]
        assert abs(float(reading.margins[number] - (logits[30] - logits[31]))) < 1e-4
        p = logits.softmax(-1)
        assert abs(float(reading.entropies[number] + (p * p.log()).sum())) < 1e-4


@pytest.mark.parametrize(
    ("name", "edit", "sign"),
    [("head_gate", {"mode": "block", "drop": "output"}, -1), ("adhh", {"threshold": 0.0}, 1)],
)
def test_ranked_heads_move_the_margin_most(vlm: VLM, name: str, edit: dict[str, Any], sign: int) -> None:
    found = heads.search(vlm, name, asked())
    bench = Bench(vlm, asked())
    base = bench.ask(None).margin
    score = {
        h: sign * (bench.ask(vlm_attn.method(name, heads=[h], **edit)).margin - base) for h in bench.heads(range(4))
    }
    best = sorted(score, key=lambda h: -score[h])[: len(found["heads"])]
    assert found["heads"] == [list(h) for h in best]
    assert found["questions"] == 3
    vlm.set_method(None)


def test_zerotuning_keeps_one_type_of_head_and_the_best_gamma(vlm: VLM) -> None:
    found = heads.search(vlm, "zerotuning", asked(), "entropy")
    bench = Bench(vlm, asked())
    base = bench.ask(None).entropy
    probe = {h: bench.ask(vlm_attn.method("zerotuning", gamma=2.0, heads=[h])).entropy for h in bench.heads(range(4))}
    wanted = {h for h, e in probe.items() if (e < base if found["type"] == "up" else e > base)}
    assert {tuple(h) for h in found["heads"]} == wanted
    assert found["tried"][str(found["gamma"])] == max(found["tried"].values())
    vlm.set_method(vlm_attn.method("zerotuning", gamma=found["gamma"], heads=found["heads"]))
    vlm.set_method(None)


def test_act_keeps_heads_that_raise_accuracy(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(self: Bench, edit: Any) -> Reading:
        right = 2 if edit is None else 3 if edit.heads in (((2, 1),), [(2, 1)]) else 1
        return Reading(torch.tensor([1.0] * right + [-1.0] * (4 - right)), torch.zeros(4))

    monkeypatch.setattr(Bench, "ask", ask)
    assert heads.search(vlm, "act", asked())["heads"] == [[2, 1]]
    monkeypatch.setattr(Bench, "ask", lambda self, edit: Reading(torch.ones(4), torch.zeros(4)))
    with pytest.raises(ValueError, match="no single head"):
        heads.search(vlm, "act", asked())


def test_questions_of_a_folder(vlm: VLM, tmp_path: Path) -> None:
    models.picture().save(tmp_path / "a.png")
    row = {"image": "../a.png", "question": "w5", "answer": "w30", "wrong": "w31"}
    with pytest.raises(ValueError, match="questions with answers"):
        heads.questions(vlm, 4, None)
    with pytest.raises(ValueError, match="does not exist"):
        heads.questions(vlm, 4, tmp_path)
    (tmp_path / heads.QUESTIONS).write_text(json.dumps(row) + "\n{}\n")
    assert heads.questions(vlm, 1, tmp_path)[0].right == "w30"
    with pytest.raises(ValueError, match="line 2"):
        heads.questions(vlm, 2, tmp_path)
    with pytest.raises(ValueError, match="same token"):
        Bench(vlm, [Question(models.picture(), "w5", "w30", "w30 w2")])


def test_gaze_layers_takes_the_layer_of_largest_shift(vlm: VLM) -> None:
    pairs = [(models.picture(seed=i), f"w{11 + i} w12 w13 w14") for i in range(2)]
    found = heads.gaze_layers(vlm, pairs)
    assert found["saliency_layer"] == max(range(4), key=lambda layer: found["shift"][layer])
    assert found["enhance_layers"] == [2, 3]
