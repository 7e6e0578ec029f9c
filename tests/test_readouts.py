"""Readouts against dense references: eager attentions of the stock model, and explicit weights of edited ones."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

import vlm_attn
from tests import models
from tests.matrix import MATRIX
from tests.reference.compose import Chain
from tests.reference.llava import image_features
from tests.runs import fingerprint
from vlm_attn import scenes
from vlm_attn.attention import rows
from vlm_attn.attention.call import Call
from vlm_attn.errors import UnsupportedError
from vlm_attn.families.checks import batches
from vlm_attn.families.zoo import SPECIMENS
from vlm_attn.profiles import BUNDLED
from vlm_attn.readouts import SEGMENTS, WHAT, Record
from vlm_attn.readouts.reader import read

STEPS = 4
ATTENTION = tuple(name for name in WHAT if "vhd" not in name)
NAN = float("nan")


@dataclass
class Seen:
    """Dense weights of one sample: prompt ``[L, H, P, P]``, the row of each fed back token ``[L, H, keys]``."""

    ids: Tensor
    image_id: int
    prompt: Tensor
    rows: list[Tensor]

    @property
    def kinds(self) -> list[str]:
        """Kind of every key, new tokens included."""
        image = [int(i) == self.image_id for i in self.ids]
        first = image.index(True) if any(image) else 0
        last = len(image) - 1 - image[::-1].index(True) if any(image) else -1
        out = []
        for place, visual in enumerate(image):
            text = "question" if place > last else "system" if place < first else "between"
            out.append("image" if visual else "first" if place == 0 else text)
        return out + ["generated"] * len(self.rows)

    def keys(self, *kinds: str) -> list[int]:
        return [i for i, kind in enumerate(self.kinds) if kind in kinds]

    def row(self, step: int) -> Tensor:
        """``[L, H, keys]``, the row that predicted a token."""
        return self.prompt[:, :, -1] if step == 0 else self.rows[step - 1]

    def share(self, weights: Tensor, *kinds: str) -> Tensor:
        return weights[..., [k for k in self.keys(*kinds) if k < weights.shape[-1]]].sum(-1)


def check(record: Record, seen: Seen, tolerance: float = 2e-5, kept: list[Tensor] | None = None) -> None:
    """Every number of a record that comes from attention. ``kept``: bool ``[P]`` per layer, keys still there."""
    layers, _, length = seen.prompt.shape[:3]
    alive = kept or [torch.ones(length, dtype=torch.bool)] * layers

    def close(left: Tensor, right: Tensor) -> None:
        torch.testing.assert_close(left, right, atol=tolerance, rtol=10 * tolerance, equal_nan=True)

    assert record.shares.shape[:2] == (len(seen.rows) + 1, layers)
    for step in range(len(record.shares)):
        row = seen.row(step)
        close(record.shares[step], torch.stack([seen.share(row, kind) for kind in SEGMENTS], dim=-1))
        for n in range(layers):
            w = row[n][:, [k for k in seen.keys("image") if alive[n][k]]]
            p = w / w.sum(-1, keepdim=True)
            expected = 1 + (p * p.clamp(min=1e-30).log()).sum(-1) / math.log(p.shape[1])
            torch.testing.assert_close(record.concentration[step, n], expected, atol=1e-3, rtol=0, equal_nan=True)
    question = [i for i in seen.keys("question") if i < length]
    own = seen.prompt[:, :, question]
    close(record.question, torch.stack([seen.share(own, kind).mean(-1) for kind in SEGMENTS], dim=-1))
    over, under = seen.share(own, "image"), seen.share(own, "first", "system")
    assert record.question_vas.isnan().all() or (under > 0).all()
    ratio = record.question_vas.nan_to_num(0.0) / (over / under).mean(-1).nan_to_num(1.0)
    assert seen.keys("image") == [] or float((ratio - 1).abs().max()) < 1e-2
    for n in range(layers):
        counted = [sum(bool(alive[n][k]) for k in seen.keys(kind) if k < length) for kind in SEGMENTS[:5]]
        assert record.counts[n].tolist() == counted
    assert record.received is not None
    expected = torch.full((layers, length), NAN)
    for key in range(length):
        rows = [i for i in question if i > key]
        for n in range(layers):
            if rows and 2 * len(rows) >= len(question) and alive[n][key]:
                expected[n, key] = seen.prompt[n][:, rows, key].mean()
    close(record.received, expected)
    assert [SEGMENTS[k] for k in record.kinds.tolist()] == seen.kinds[:length]


def eager(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Seen]:
    """Greedy tokens and every weight of one unpadded sample, from transformers' own eager attention."""
    out = model.generate(
        **inputs, max_new_tokens=STEPS, do_sample=False, return_dict_in_generate=True, output_attentions=True
    )
    prompt, *steps = (torch.stack([layer[0] for layer in step]).float() for step in out.attentions)
    ids = inputs["input_ids"][0]
    return out.sequences[0, -STEPS:], Seen(ids, model.config.image_token_id, prompt, [s[:, :, 0] for s in steps])


@functools.cache
def specimen(name: str, backend: str) -> Any:
    return SPECIMENS[name].build(backend=backend)


def llava_case(ratio: int, kind: str) -> tuple[Any, Any, dict[str, Tensor], list[dict[str, Tensor]]]:
    batch = getattr(models, kind)()
    return models.llava(ratio), models.llava(ratio, "eager"), batch.inputs(), [s.inputs() for s in batch.samples]


def family_case(name: str) -> tuple[Any, Any, dict[str, Tensor], list[dict[str, Tensor]]]:
    rows = batches(SPECIMENS[name])["padded"]
    alone = [SPECIMENS[name].inputs([row]) for row in rows]
    return specimen(name, "sdpa"), specimen(name, "eager"), SPECIMENS[name].inputs(rows), alone


def scenes_case() -> tuple[Any, Any, dict[str, Tensor], list[dict[str, Tensor]]]:
    folder = BUNDLED["scenes"]
    ours, theirs = (
        AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation=backend).eval()
        for backend in ("sdpa", "eager")
    )
    for model in (ours, theirs):
        model.generation_config.eos_token_id = None
    with vlm_attn.wrap(ours, processor=AutoProcessor.from_pretrained(folder)) as vlm:
        inputs = dict(vlm.inputs([scenes.make_scene(3).image], "Describe the image."))
    return ours, theirs, inputs, [inputs]


CASES = {
    "llava gqa 1": lambda: llava_case(1, "padded"),
    "llava gqa 4": lambda: llava_case(4, "mixed"),
    "tiles": lambda: family_case("llava_next"),
    "tiles with separators": lambda: family_case("smolvlm"),
    "m-rope": lambda: family_case("qwen2_5_vl"),
    "scenes": scenes_case,
}


@pytest.mark.parametrize("case", CASES)
def test_attention_is_that_of_eager_rows(case: str) -> None:
    """Prefill and decode rows of every sample in a padded batch, and the same sample alone."""
    model, stock, inputs, alone = CASES[case]()
    with vlm_attn.attach(model) as session:
        together = read(session, inputs, ATTENTION, max_new_tokens=STEPS)
        singles = [read(session, one, ATTENTION, max_new_tokens=STEPS)[0] for one in alone]
    for record, single, one in zip(together, singles, alone, strict=True):
        tokens, seen = eager(stock, one)
        assert single.tokens == record.tokens == tuple(tokens.tolist())
        check(record, seen)
        check(single, seen)


@pytest.mark.parametrize("case", ["llava gqa 1", "llava gqa 4", "m-rope"])
def test_published_measures_are_their_formulas(case: str) -> None:
    model, stock, inputs, alone = CASES[case]()
    with vlm_attn.attach(model) as session:
        records = read(session, inputs, ATTENTION, max_new_tokens=STEPS)
    for record, one in zip(records, alone, strict=True):
        _, seen = eager(stock, one)
        text = seen.keys("first", "system", "between", "question")
        image = seen.keys("image")
        for first in (True, False):
            used = text if first else text[1:]
            for n in range(len(seen.prompt)):
                a_t = sum(float(row[n].mean(0)[used].sum()) for row in seen.rows)
                a_o = sum(float(row[n].mean(0)[image].sum()) for row in seen.rows)
                assert float(record.mdi(first=first)[n]) == pytest.approx(
                    (a_t / len(used)) / (a_o / len(image)), rel=1e-3
                )
                for found, part, keys in zip(record.aei(first=first), (a_t, a_o), (used, image), strict=True):
                    share = len(keys) / (len(used) + len(image))
                    assert float(found[n]) == pytest.approx(part / (a_t + a_o) / share, rel=1e-3)
        score = torch.stack([seen.share(row, "image") / seen.share(row, "first", "system") for row in seen.rows])
        torch.testing.assert_close(record.vas("generated"), score.mean(0), rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(record.share("text"), 1 - record.share("image") - record.share("system"))
        found = {(sink.position, layer) for sink in record.sinks(2.0) for layer in sink.layers}
        received = record.received
        assert received is not None
        limit = 2.0 / len(seen.ids)
        assert found == {(k, n) for n, k in (received > limit).nonzero().tolist()} != set()
        assert all(sink.primary == (2 * len(sink.layers) > len(seen.prompt)) for sink in record.sinks(2.0))


class Watch(Chain):
    """Weights after every edit."""

    def run(self, ids: Tensor, features: Tensor | None, forced: Any = ()) -> Tensor:
        """See `Chain.run`."""
        self.passes: list[list[Tensor]] = []
        return super().run(ids, features, forced)

    def edit_weights(self, layer: int, weights: Tensor, prefill: bool) -> Tensor:
        """Keeps what comes out."""
        out = super().edit_weights(layer, weights, prefill)
        if layer == 0:
            self.passes.append([])
        self.passes[-1].append(out.clone())
        return out


ACTING = [r.name for r in vlm_attn.methods() if r.stage == "edit" and r.name in MATRIX] + ["fastv"]


@pytest.mark.parametrize("name", ACTING)
def test_edits_and_pruning_are_read_as_they_act(name: str) -> None:
    """Weights after the edit, of the pass that answers: not of a draft, a text-only stream or a pass ahead."""
    row = MATRIX[name]
    model, batch = models.llava(4), row.batch
    plain, edited = [], []
    with vlm_attn.attach(model, vlm_attn.method(name, **row.default)) as session:
        records = read(session, batch.inputs(), ATTENTION, max_new_tokens=STEPS)
        last = session.last
    with vlm_attn.attach(model) as session:
        stock = read(session, batch.inputs(), ATTENTION, max_new_tokens=STEPS)
    for index, (sample, record) in enumerate(zip(batch.samples, records, strict=True)):
        reference = Watch([row.reference(model, row.default, last, index)])
        reference.pixels = sample.pixels
        reference.run(sample.ids, image_features(model, sample.pixels), list(record.tokens[:-1]))
        prompt, *steps = (torch.stack(layers) for layers in reference.passes)
        seen = Seen(sample.ids, models.IMAGE_ID, prompt, [step[:, :, -1] for step in steps])
        pad = batch.inputs()["input_ids"].shape[1] - len(sample.ids)
        alive = []
        for layer in range(4):
            there = torch.zeros(pad + len(sample.ids), dtype=torch.bool)
            tokens = last.tokens_at(layer)
            there[tokens.index[index][tokens.valid[index]]] = True
            alive.append(there[pad:])
        # Rows of a pruned token are its own in the reference and gone in the model: only its keys are compared.
        check(record, seen, 1e-4, alive)
        edited.append(record.shares)
        plain.append(stock[index].shares)
    assert max(float((a - b).abs().max()) for a, b in zip(edited, plain, strict=True)) > 1e-4


@pytest.mark.parametrize("methods", [None, "vcd", ["fastv", "vcd"]])
def test_second_branches_are_not_read(methods: Any) -> None:
    model, inputs = models.llava(4), models.padded().inputs()
    with vlm_attn.attach(model, methods) as session:
        records = read(session, inputs, ATTENTION, max_new_tokens=STEPS)
    without = [m for m in (methods or []) if m == "fastv"]
    with vlm_attn.attach(model, without) as session:
        own = read(session, inputs, ATTENTION, max_new_tokens=1)
    for a, b in zip(records, own, strict=True):
        assert torch.equal(a.shares[0], b.shares[0])
        assert len(a.shares) == STEPS


# --------------------------------------------------------------------------------------------------- behaviour


def test_reading_changes_nothing() -> None:
    model, inputs = models.build_llava(4), models.padded().inputs()
    seen: list[Tensor] = []
    handle = model.get_output_embeddings().register_forward_hook(lambda m, a, out: seen.append(out[:, -1]))
    with vlm_attn.attach(model, "vhr") as session:
        model.generate(**inputs, max_new_tokens=STEPS, do_sample=False)
        plain, before = list(seen), fingerprint(model)
        seen.clear()
        read(session, inputs, WHAT, max_new_tokens=STEPS)
        assert fingerprint(model) == before
        assert session.recorder is None
        for a, b in zip(seen, plain, strict=True):
            assert torch.equal(a, b)
        with pytest.raises(RuntimeError, match="no more"):
            read(session, inputs, WHAT, max_new_tokens=2, logits_processor=[_fail])
        assert fingerprint(model) == before
        assert session.recorder is None
    handle.remove()


def test_no_matrix_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of the question, in blocks, and the newest row; never those of the picture."""
    taken: list[tuple[int, int]] = []
    original = Call.weights

    def weights(self: Call, wanted: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        taken.append((wanted.numel(), self.queries))
        return original(self, wanted, *args, **kwargs)

    monkeypatch.setattr(Call, "weights", weights)
    monkeypatch.setattr(rows, "CHUNK_ELEMENTS", 3 * 8 * 30)
    model, sample = models.llava(4), models.sample(4, 9, seed=2)
    with vlm_attn.attach(model) as session:
        blocks = read(session, sample.inputs(), ATTENTION, max_new_tokens=STEPS)[0]
        monkeypatch.setattr(rows, "CHUNK_ELEMENTS", 1 << 24)
        whole = read(session, sample.inputs(), ATTENTION, max_new_tokens=STEPS)[0]
    prefill = [count for count, queries in taken if queries > 1]
    assert prefill == [3, 3, 3, 1] * 4 + [9, 1] * 4
    assert {count for count, queries in taken if queries == 1} == {1}
    torch.testing.assert_close(blocks.question, whole.question)
    # Ratios to almost nothing: products of other sizes round otherwise.
    torch.testing.assert_close(blocks.question_vas, whole.question_vas, rtol=1e-5, atol=0)
    torch.testing.assert_close(blocks.received, whole.received, equal_nan=True)


def _fail(ids: Tensor, scores: Tensor) -> Tensor:
    raise RuntimeError("no more")


def test_a_sample_that_ends_is_read_to_its_end() -> None:
    model, batch = models.build_llava(4), models.padded()
    with vlm_attn.attach(model) as session:
        free = read(session, batch.inputs(), WHAT, max_new_tokens=STEPS)
        model.generation_config.eos_token_id = [int(free[1].tokens[1])]
        records = read(session, batch.inputs(), WHAT, max_new_tokens=STEPS)
        alone = read(session, batch.samples[1].inputs(), WHAT, max_new_tokens=STEPS)[0]
    assert records[0].tokens == free[0].tokens
    assert records[1].tokens == free[1].tokens[:2] == alone.tokens
    assert len(records[1].shares) == len(records[1].t_vhd()) == 2
    torch.testing.assert_close(records[1].shares, alone.shares, atol=1e-5, rtol=0)
    torch.testing.assert_close(records[1].t_vhd(), alone.t_vhd(), atol=1e-4, rtol=1e-4)


def test_words_without_a_picture() -> None:
    model = models.llava(4)
    words = models.Sample(torch.tensor([models.BOS, 5, 6, 7, 8, 9]), torch.zeros(0, 3, 56, 56))
    inputs = {k: v for k, v in words.inputs().items() if k != "pixel_values"}
    with vlm_attn.attach(model) as session:
        record = read(session, inputs, WHAT, max_new_tokens=3)[0]
    assert float(record.share("image").max()) == 0
    torch.testing.assert_close(record.shares.sum(-1), torch.ones(3, 4, 8))
    assert record.mdi().isnan().all()
    assert record.concentration.isnan().all()
    assert float(record.vision_aware().max()) < 1e-4  # both streams are the same prompt
    assert record.summary()["mdi"]["all text"]["early"] is None


def test_what_cannot_be_read_is_refused() -> None:
    model, inputs = models.llava(4), models.single().inputs()
    with vlm_attn.attach(model) as session:
        with pytest.raises(ValueError, match="no such readout: 'vass'"):
            read(session, inputs, ["vass"])
        with pytest.raises(ValueError, match="none given"):
            read(session, inputs, [])
        with pytest.raises(UnsupportedError, match="num_beams=1"):
            read(session, inputs, num_beams=2)
        with pytest.raises(UnsupportedError, match="default"):
            read(session, inputs, max_new_tokens=3, use_cache=False)
        with pytest.raises(UnsupportedError):
            read(session, inputs, max_new_tokens=8, prompt_lookup_num_tokens=2)
        record = read(session, inputs, "shares", max_new_tokens=1)[0]
    with pytest.raises(ValueError, match="at least 2"):
        record.mdi()
    for name, call in (("sinks", record.sinks), ("vhd", record.vision_aware), ("t_vhd", record.t_vhd)):
        with pytest.raises(ValueError, match=f"'{name}' was not read"):
            call()
    with pytest.raises(ValueError, match="unknown group 'picture'"):
        record.share("picture")


def test_pictures_that_are_no_tokens_are_refused() -> None:
    with (
        vlm_attn.attach(specimen("mllama", "sdpa")) as session,
        pytest.raises(UnsupportedError, match="mllama.*cross-attention"),
    ):
        read(session, SPECIMENS["mllama"].inputs(batches(SPECIMENS["mllama"])["single"]), "shares")


def test_several_return_sequences_have_a_record_each() -> None:
    model, inputs = models.llava(4), models.padded().inputs()
    torch.manual_seed(0)
    with vlm_attn.attach(model) as session:
        records = read(session, inputs, ["shares", "t_vhd"], max_new_tokens=3, do_sample=True, num_return_sequences=2)
    assert len(records) == 4
    torch.testing.assert_close(records[0].shares[0], records[1].shares[0])
    torch.testing.assert_close(records[2].vision_aware(), records[3].vision_aware())
    assert records[0].tokens != records[1].tokens
