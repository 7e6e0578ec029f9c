"""Pruning methods keep what a literal implementation keeps, on 50 random prompts and pictures each."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import vlm_attn
from tests import models
from tests.matrix import MATRIX, given_kept
from tests.matrix_pruning import PRUNING
from tests.reference.llava import image_features
from tests.reference.pruning import FastV
from tests.reference.pruning_stages import OneCut, Staged
from vlm_attn.errors import MissingProfileError, UnsupportedError
from vlm_attn.families import checks
from vlm_attn.readouts.recorder import Recorder

PROMPTS = 50


def fastv(model: Any, params: dict[str, Any], last: Any, row: int) -> Staged:
    """Own selection, by layer."""
    return _FastV(model, **params)


class _FastV(Staged):
    """The last row of layer K - 1, spelled out in the reference of FastV itself."""

    def __init__(self, model: Any, layer: int = 2, keep: float | str = 0.5) -> None:
        super().__init__(model, [layer])
        self.plain = FastV(model, layer, keep)

    def run(self, ids: torch.Tensor, features: torch.Tensor | None, forced: Any = ()) -> torch.Tensor:
        """See `Dense.run`."""
        logits = self.plain.run(ids, features, forced)
        self.margin, self.kept = self.plain.margin, {self.layers[0]: torch.cat(self.plain.kept or [])}
        return logits


class _Drawn(OneCut):
    """The n-th picture of a prompt keeps the first k of a permutation drawn from the seed and n."""

    def __init__(self, model: Any, layer: int = 2, keep: float = 0.5, seed: int = 0) -> None:
        super().__init__(model, layer, keep, self.draw)
        self.seed, self.number = seed, 0

    def draw(self, x: torch.Tensor, k: int, text: torch.Tensor) -> list[int]:
        """Of the next picture."""
        generator = torch.Generator().manual_seed(1009 * self.seed + self.number)
        self.number += 1
        return sorted(torch.randperm(len(x), generator=generator).tolist()[:k])


def even(x: torch.Tensor, k: int, text: torch.Tensor) -> list[int]:
    """The middles of k equal stretches."""
    return [math.floor((j + 0.5) * len(x) / k) for j in range(k)]


REFERENCES: dict[str, Any] = {
    **{name: MATRIX[name].reference for name in PRUNING},
    "fastv": fastv,
    "random_prune": lambda model, params, last, row: _Drawn(model, **params),
    "uniform_prune": lambda model, params, last, row: OneCut(
        model, **{"layer": 2, "keep": 0.5, **params}, choose=even
    ),
}
"""Per method a selection of its own: masking with the kept set that the session reports is none."""
CASES = [(name, number) for name in REFERENCES for number in range(len(MATRIX[name].variants))]


def test_every_pruning_method_has_a_literal_selection() -> None:
    assert set(REFERENCES) == {row.name for row in vlm_attn.methods() if row.stage == "prune"}
    assert given_kept not in REFERENCES.values()


@pytest.mark.parametrize(("name", "number"), CASES)
def test_kept_sets(name: str, number: int) -> None:
    """Variants share the 50 prompts among them; every stage is compared."""
    row = MATRIX[name]
    params, model = row.variants[number], models.llava(4)
    compared = 0
    with vlm_attn.attach(model, vlm_attn.method(name, **params)) as session:
        for seed in range(number, PROMPTS, len(row.variants)):
            prompt = models.sample(2 + seed % 4, 4 + seed % 5, images=1 + seed % 2, seed=100 + seed)
            with torch.no_grad():
                model(**prompt.inputs())
            last = session.last
            reference: Any = REFERENCES[name](model, params, last, 0)
            reference.pixels = prompt.pixels
            with session.suspended():
                reference.run(prompt.ids, image_features(model, prompt.pixels))
            if reference.margin < 1e-5:
                continue  # fp32 may cut either way
            compared += 1
            for layer in reference.layers:
                assert last.kept(layer)[0].tolist() == reference.kept[layer].tolist(), (seed, layer)
    assert compared >= 0.8 * len(range(number, PROMPTS, len(row.variants)))


@pytest.mark.parametrize(("name", "prompts"), [("flowcut", 50), ("illava", 15), ("tome", 15)])
def test_kept_sets_of_a_deeper_encoder(name: str, prompts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight encoder layers: scores that run on, odd layers without a cut, sizes that grow."""
    plain = models.CLIPVisionConfig
    monkeypatch.setattr(models, "CLIPVisionConfig", lambda **config: plain(**{**config, "num_hidden_layers": 8}))
    model, row, compared = models.build_llava(4), MATRIX[name], 0
    with vlm_attn.attach(model, vlm_attn.method(name)) as session:
        for seed in range(prompts):
            prompt = models.sample(2, 4, seed=200 + seed)
            with torch.no_grad():
                model(**prompt.inputs())
            reference: Any = row.reference(model, {}, None, 0)
            reference.pixels = prompt.pixels
            with session.suspended():
                reference.run(prompt.ids, image_features(model, prompt.pixels))
            if reference.margin < 1e-5:
                continue
            compared += 1
            assert session.last.kept(0)[0].tolist() == reference.kept[0].tolist(), seed
    assert compared >= 0.8 * prompts


@pytest.mark.parametrize("name", ["pyramiddrop", "divprune", "sparsevlm"])
def test_renumbering_moves_positions_and_keeping_does_not(name: str) -> None:
    """The two policies keep the same tokens at the first stage and differ in their logits."""
    model, inputs = models.llava(4), models.single().inputs()
    seen = {}
    for positions in ("keep", "renumber"):
        with vlm_attn.attach(model, vlm_attn.method(name, positions=positions)) as session, torch.no_grad():
            logits = model(**inputs).logits[0, -1]
            seen[positions] = session.last.stages[0].idx, logits
    assert torch.equal(seen["keep"][0], seen["renumber"][0])
    assert (seen["keep"][1] - seen["renumber"][1]).abs().max() > 1e-3


def test_renumbering_is_refused_where_the_tables_cannot_be_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.build_llava(4)
    rotary = model.get_decoder().rotary_emb
    plain = type(rotary).forward
    calls: list[int] = []

    def drifting(self: Any, x: torch.Tensor, position_ids: torch.Tensor) -> Any:
        calls.append(1)
        cos, sin = plain(self, x, position_ids)
        return cos * (1 + 0.1 * len(calls)), sin

    with vlm_attn.attach(model, vlm_attn.method("pyramiddrop")):
        monkeypatch.setattr(type(rotary), "forward", drifting)
        with pytest.raises(UnsupportedError, match="positions='keep'"), torch.no_grad():
            model(**models.single().inputs())


def test_debiasing_variants_rank_differently() -> None:
    model, inputs = models.llava(4), models.single().inputs()
    kept = {}
    for calibrate in ((), ("exp_trend",), ("rope_free",), ("rope_ones",)):
        method = vlm_attn.method("fastv", keep=6, calibrate=list(calibrate), sigma=3.0)
        with vlm_attn.attach(model, method) as session, torch.no_grad():
            model(**inputs)
            kept[calibrate] = tuple(session.last.kept(2)[0].tolist())
    assert len(set(kept.values())) >= 3
    with pytest.raises(ValueError, match="exclude each other"):
        vlm_attn.attach(model, vlm_attn.method("fastv", calibrate=["rope_free", "rope_ones"]))


def test_rotary_variants_of_the_score_are_the_references() -> None:
    """FastV with the scores of FEATHER and of SparseVLM+."""
    model = models.llava(4)
    for seed in range(10):
        prompt = models.sample(3, 5, seed=seed)
        features = image_features(model, prompt.pixels)
        reference = _Rotary(model)
        reference.run(prompt.ids, features)
        for variant in ("free", "ones"):
            with (
                vlm_attn.attach(model, vlm_attn.method("fastv", keep=5, calibrate=[f"rope_{variant}"])) as session,
                torch.no_grad(),
            ):
                model(**prompt.inputs())
                (score,) = session.last.scores.values()
            image = reference.alive[0]
            assert torch.allclose(score[0, image], reference.rows[variant][image], atol=1e-6)


class _Rotary(Staged):
    """Reads the last row of layer 1 in both variants; cuts nothing."""

    def __init__(self, model: Any) -> None:
        super().__init__(model, [])
        self.rows: dict[str, torch.Tensor] = {}

    def before(self, layer: int, x: torch.Tensor) -> None:
        """At layer 1."""
        if layer == 1:
            self.rows["free"] = self.own_row(1, x, rotary=False).mean(0)
            row = self.own_row(1, x).mean(0)
            theta, n = self.lm.rotary_emb.inv_freq.double(), len(x)
            gain = [float(torch.cos((n - 1 - s) * theta).mean()) for s in range(n)]
            self.rows["ones"] = row / torch.tensor(gain).clamp(min=0.1)


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("pyramiddrop", {"layers": [2, 2], "keep": [0.5, 0.2]}, "ascend"),
        ("pyramiddrop", {"layers": [2]}, "as many budgets"),
        ("pyramiddrop", {"layers": [1, 2, 4]}, "not a layer"),
        ("himap", {"layers": [1, 2, 3], "keep": [0.5, 0.4, 0.3]}, "two layers"),
        ("sparsevlm", {"layers": [3], "keep": [0.5]}, "not a layer"),
        ("feather", {"layers": [0], "keep": [0.5]}, "greater than or equal to 1"),
    ],
)
def test_wrong_schedules_are_refused(name: str, params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vlm_attn.attach(models.llava(4), vlm_attn.method(name, **params))


@pytest.mark.parametrize("name", ["fastv", "random_prune", "divprune", "feather", "dart"])
def test_row_ends_of_tiles_are_never_dropped(name: str) -> None:
    """Any-resolution pictures: the row-end tokens stay, and the budget counts the others."""
    bench = checks.bench("llava_next", "sdpa")
    inputs = bench.inputs("padded")
    params = {"keep": [0.25], "layers": [1]} if name == "feather" else {"keep": 0.25}
    with vlm_attn.attach(bench.model, vlm_attn.method(name, **params)) as session, torch.no_grad():
        bench.model(**inputs)
        first, last = session.last.tokens, session.last.stages[-1].tokens
    ends = first.vis & (first.frame < 0)
    assert ends.any()
    kept = {(row, int(i)) for row in range(last.batch) for i in last.index[row][last.vis[row]]}
    assert {(int(r), int(i)) for r, i in ends.nonzero()} <= kept
    if name in ("fastv", "random_prune", "divprune", "dart"):
        for row, layouts in enumerate(first.layouts):
            wanted = sum(round(0.25 * int((layout.view >= 0).sum())) for layout in layouts)
            assert int((last.vis[row] & (last.frame[row] >= 0)).sum()) == wanted


@pytest.mark.parametrize(
    ("family", "message"), [("llava_next", "one visual token per patch"), ("qwen2_5_vl", "vision encoder")]
)
def test_encoder_methods_refuse_tokens_that_are_no_patches(family: str, message: str) -> None:
    bench = checks.bench(family, "sdpa")
    with (
        pytest.raises(UnsupportedError, match=f"fastervlm.*{message}"),
        vlm_attn.attach(bench.model, vlm_attn.method("fastervlm")),
        torch.no_grad(),
    ):
        bench.model(**bench.inputs("single"))


def test_encoder_methods_refuse_finished_features() -> None:
    model, inputs = models.llava(4), models.single().inputs()
    features = model.get_image_features(pixel_values=inputs.pop("pixel_values"), return_dict=True)
    with (
        vlm_attn.attach(model, vlm_attn.method("visionzip")),
        pytest.raises(UnsupportedError, match="visionzip reads the vision encoder at work"),
        torch.no_grad(),
    ):
        model(**inputs, mm_encoder_outputs={"image": features})


def test_renumbering_is_refused_on_positions_of_several_planes() -> None:
    bench = checks.bench("qwen2_5_vl", "sdpa")
    for name in ("pyramiddrop", "divprune"):
        with (
            vlm_attn.attach(bench.model, vlm_attn.method(name)),
            pytest.raises(UnsupportedError, match="positions='keep'"),
            torch.no_grad(),
        ):
            bench.model(**bench.inputs("single"))


def test_autopilot_keeps_as_few_as_hold_the_mass() -> None:
    """The kept count follows the picture, holds the share, and one token less would not."""
    model, counts = models.llava(4), set()
    for seed in range(12):
        inputs = models.sample(3, 5, seed=seed).inputs()
        with vlm_attn.attach(model, vlm_attn.method("fastv", keep="auto:0.9")) as session, torch.no_grad():
            model(**inputs)
            (score,) = session.last.scores.values()
            image, kept = session.last.tokens.vis[0], session.last.kept(2)[0]
        mass, whole = score[0, kept].double(), score[0, image].double().sum()
        assert mass.sum() >= 0.9 * whole > mass.sum() - mass.min()
        counts.add(len(kept))
    assert len(counts) > 1


@pytest.mark.parametrize("wrong", ["auto:1.5", "auto:", "best", "auto:0.9x"])
def test_autopilot_refuses_other_words(wrong: str) -> None:
    with pytest.raises(ValueError, match="keep"):
        vlm_attn.method("fastv", keep=wrong)


def test_budget_per_view_is_split_over_tiles() -> None:
    bench = checks.bench("llava_next", "sdpa")
    for name in ("fastv", "divprune", "random_prune", "uniform_prune", "norm_prune", "cdpruner"):
        method = vlm_attn.method(name, keep=9, per="view", layer=1)
        with vlm_attn.attach(bench.model, method) as session, torch.no_grad():
            bench.model(**bench.inputs("single"))
            first, last = session.last.tokens, session.last.stages[-1].tokens
        shown = first.frame[0][first.vis[0] & (first.frame[0] >= 0)]
        kept = last.frame[0][last.vis[0] & (last.frame[0] >= 0)]
        sizes = {view: int((shown == view).sum()) for view in shown.unique().tolist()}
        counts = {view: int((kept == view).sum()) for view in sizes}
        assert sum(counts.values()) == 9
        for view, count in counts.items():
            assert abs(count - 9 * sizes[view] / len(shown)) <= 1, (name, view)


def test_mean_map_divides_place_by_place() -> None:
    model, mean = models.llava(4), [0.1 + (7 * i) % 5 for i in range(models.N_VISUAL)]
    different = 0
    for seed in range(10):
        prompt = models.sample(3, 5, images=1 + seed % 2, seed=40 + seed)
        method = vlm_attn.method("fastv", keep=5, calibrate=["mean_map"], mean=mean)
        with vlm_attn.attach(model, method) as session, torch.no_grad():
            model(**prompt.inputs())
            kept = session.last.kept(2)[0]
        features = image_features(model, prompt.pixels)
        reference, plain = FastV(model, 2, 5, mean=mean), FastV(model, 2, 5)
        reference.run(prompt.ids, features)
        plain.run(prompt.ids, features)
        assert torch.equal(kept, torch.cat(reference.kept or []))
        different += not torch.equal(kept, torch.cat(plain.kept or []))
    assert different > 5


def test_mean_map_belongs_to_one_size_and_needs_data() -> None:
    model = models.llava(4)
    short = vlm_attn.method("fastv", calibrate=["mean_map"], mean=[1.0] * 9)
    with (
        vlm_attn.attach(model, short),
        pytest.raises(ValueError, match="9 visual tokens, this one has 16"),
        torch.no_grad(),
    ):
        model(**models.single().inputs())
    with pytest.raises(MissingProfileError):
        vlm_attn.attach(model, vlm_attn.method("fastv", calibrate=["mean_map"]))
    with pytest.raises(ValueError, match="choose one"):
        vlm_attn.attach(model, vlm_attn.method("fastv", calibrate=["mean_map", "exp_trend"], sigma=1.0))


def test_tokencarve_shortens_every_cache() -> None:
    """After the prefill all layers hold what was kept; the layers before the cut processed everything."""
    model, batch = models.llava(4), models.padded()
    text = [len(sample.ids) - models.N_VISUAL for sample in batch.samples]
    lengths = {}
    for compact in (True, False):
        cache = DynamicCache(config=model.config.get_text_config())
        with (
            vlm_attn.attach(model, vlm_attn.method("tokencarve", keep=5, compact=compact)) as session,
            torch.no_grad(),
        ):
            model(**batch.inputs(), past_key_values=cache, use_cache=True)
            assert session.last.kept_per_layer(4).tolist() == [[16, 16, 5, 5]] * 2
        lengths[compact] = [cache.get_seq_length(layer) for layer in range(4)]
    assert lengths[True] == [max(text) + 5] * 4
    assert lengths[False] == [max(text) + 16] * 2 + [max(text) + 5] * 2


def test_shortened_caches_refuse_edits_and_readouts() -> None:
    model, inputs = models.llava(4), models.single().inputs()
    with pytest.raises(ValueError, match="compact=False"):
        vlm_attn.attach(model, ["tokencarve", "vhr"])
    with vlm_attn.attach(model, [vlm_attn.method("tokencarve", compact=False), "vhr"]):
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
    with (
        vlm_attn.attach(model, "tokencarve") as session,
        session.recording(Recorder([0])),
        pytest.raises(UnsupportedError, match="compact=False"),
    ):
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
