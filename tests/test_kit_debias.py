"""Debiasing wraps every pruning method that ranks by attention of the language model, and its calibration runs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import vlm_attn
from tests import models
from tests.reference.pruning import exp_trend, pad_visible
from vlm_attn import calibration, readings, selection
from vlm_attn.contract import field_names
from vlm_attn.errors import MissingProfileError
from vlm_attn.families.zoo import SPECIMENS, Sample
from vlm_attn.profiles import Profile
from vlm_attn.stages import Prune

# Parameters with which the first ranking still sees all tokens of the picture, and cuts once by one sum.
WRAPPED: dict[str, dict[str, Any]] = {
    "fastv": {"keep": 6},
    "feather": {},
    "himap": {},
    "illava": {"encoder_drop": 0},
    "pyramiddrop": {},
    "sparsevlm": {},
    "spatten": {"layers": [2]},
    "tokencarve": {"keep": 5},
}
ROTARY = [name for name in WRAPPED if name not in ("feather", "spatten")]
ENCODER = ["visionzip", "fastervlm", "vispruner", "prumerge", "holov", "flowcut", "text_dominance_compress"]


def kept(name: str, seed: int = 4, **params: Any) -> tuple[list[list[int]], Tensor]:
    """Kept tokens after every stage, and the last logits, of one prompt with one picture."""
    model, inputs = models.llava(4), models.sample(3, 5, seed=seed).inputs()
    method = vlm_attn.method(name, **WRAPPED[name], **params)
    with vlm_attn.attach(model, method) as session, torch.no_grad():
        logits = model(**inputs).logits[0, -1]
        return [stage.tokens.order[0][stage.tokens.vis[0]].tolist() for stage in session.last.stages], logits


def test_all_methods_that_read_the_decoder_are_wrapped() -> None:
    """Those that rank by the vision encoder alone refuse the parameter by name."""
    known = {row.name: row.cls for row in vlm_attn.methods() if row.stage == "prune"}
    info = vlm_attn.attach(models.llava(4))
    try:
        reading = {
            name
            for name, cls in known.items()
            if any(s.score is not None for s in cls().resolve(info.info, info.profile).sites())  # type: ignore[attr-defined]
        }
    finally:
        info.detach()
    assert reading == set(WRAPPED) == {name for name, cls in known.items() if "sigma" in field_names(cls)}
    for name in ENCODER:
        with pytest.raises(ValueError, match=f"{name} has no parameter 'calibrate'"):
            vlm_attn.method(name, calibrate=["exp_trend"])


def weights_of(how: str) -> tuple[dict[str, Any], Tensor]:
    """Parameters of a way of debiasing, and its factor at each of the visual tokens, literally."""
    n = models.N_VISUAL
    if how == "exp_trend":
        return {"sigma": 2.0}, exp_trend(n, 2.0)
    if how == "grid_trend":
        grid = [[math.exp(-2.0 * r / 3 + 1.5 * c / 3) for c in range(models.GRID)] for r in range(models.GRID)]
        return {"grid_sigma": (2.0, -1.5)}, torch.tensor(grid).flatten()
    if how == "fastv_released":
        x = [i / (n - 1) for i in range(n)]
        return {}, torch.tensor([1 / (1 + 1.73373862 * t - 4.82643345 * t**2 + 4.88412565 * t**3) for t in x])
    mean = [0.05 + (5 * i) % 7 for i in range(n)]
    return {"mean": mean}, torch.tensor([1 / (m + 1e-7) for m in mean])


@pytest.mark.parametrize("how", ["exp_trend", "grid_trend", "mean_map", "fastv_released"])
@pytest.mark.parametrize("name", WRAPPED)
def test_debiasing_acts_as_if_the_attention_had_been_another(
    name: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that a method does - choosing, merging, later stages - follows the weighted first score, and only that."""
    if how == "fastv_released" and name != "fastv":
        with pytest.raises(ValueError, match="calibrate"):
            vlm_attn.method(name, calibrate=[how])
        return
    (given, factor), n = weights_of(how), models.N_VISUAL
    plain, seeds = readings.read, range(4, 20)

    def weighted(score: Any, call: Any, rows: Tensor, visual: Tensor, tables: Any = None) -> Tensor:
        out = plain(score, call, rows, visual, tables)
        if int(visual.sum()) == n:
            out = out.clone()
            out[..., visual[0]] *= factor
        return out

    without = [kept(name, seed) for seed in seeds]
    debiased = [kept(name, seed, calibrate=[how], **given) for seed in seeds]
    monkeypatch.setattr(readings, "read", weighted)
    for seed, (stages, logits) in zip(seeds, debiased, strict=True):
        expected, wanted = kept(name, seed)
        assert stages == expected
        assert torch.allclose(logits, wanted, atol=1e-5)
    assert [stages for stages, _ in debiased] != [stages for stages, _ in without]


@pytest.mark.parametrize("name", WRAPPED)
def test_padding_is_never_kept(name: str) -> None:
    model, processor = models.llava(4), models.tiny_processor()
    processor.image_processor.do_pad = True
    shown = pad_visible(200, 80, models.IMAGE_SIZE, models.GRID, 0.5).bool()
    assert 4 < int(shown.sum()) < 12
    method = vlm_attn.method(name, **WRAPPED[name], calibrate=["pad_mask"])
    with vlm_attn.attach(model, method, processor) as session, torch.no_grad():
        session.image_sizes = [[(200, 80)]]
        model(**models.single().inputs())
        tokens = session.last.stages[-1].tokens
    assert shown[tokens.order[0][tokens.vis[0]].cpu()].all()


@pytest.mark.parametrize("rope", ["free", "ones"])
@pytest.mark.parametrize("name", ROTARY)
def test_rotary_variants_change_the_first_reading_alone(name: str, rope: str) -> None:
    with vlm_attn.attach(models.llava(4), vlm_attn.method(name, calibrate=[f"rope_{rope}"])) as session:
        sites = [site for site in session.sites.values() if site.score is not None]
    assert [site.score.rope for site in sites] == [rope] + ["on"] * (len(sites) - 1)


@pytest.mark.parametrize("name", ["feather", "spatten"])
def test_rotary_variants_that_mean_nothing_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="calibrate"):
        vlm_attn.method(name, calibrate=["rope_ones"])


@pytest.mark.parametrize(
    ("family", "sample", "views"),
    [("llava", Sample(), 1), ("llava_next", Sample(pictures=((100, 50),)), 2), ("qwen2_5_vl", Sample(frames=4), 2)],
)
def test_positions_start_anew_in_every_view(family: str, sample: Sample, views: int) -> None:
    """Whole picture and canvas, frame by frame; row ends have no place."""
    model = SPECIMENS[family].build()
    with vlm_attn.attach(model) as session, torch.no_grad():
        model(**SPECIMENS[family].inputs([sample]))
        tokens = session.last.tokens
    ((row, slots, total),) = selection.images(tokens)
    x, view = selection.position(tokens, row, slots), tokens.frame[row, slots]
    assert len(slots) == total and len(view.unique()) == views
    for number in view.unique():
        mine = x[view == number]
        assert torch.allclose(mine, torch.linspace(0, 1, len(mine)))


# ------------------------------------------------------------------------------------------------------- calibration


@pytest.fixture(scope="module")
def scenes() -> Any:
    with vlm_attn.wrap("scenes") as vlm:
        yield vlm


def test_calibration_finds_a_trend_that_was_put_in(
    scenes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores with a known exponent: it comes back, and the self-check leaves next to nothing."""
    plain = readings.read

    def biased(score: Any, call: Any, rows: Tensor, visual: Tensor, tables: Any = None) -> Tensor:
        out = plain(score, call, rows, visual, tables)
        noise = 1 + 0.1 * torch.sin(torch.arange(int(visual.sum())) * 12.9898)
        out[..., visual[0]] = exp_trend(int(visual.sum()), -1.3) * noise
        return out

    monkeypatch.setattr(readings, "read", biased)
    (record,) = calibration.calibrate(scenes, ["fastv"], n=2, out=tmp_path / "p.json")["entries"].values()
    assert record["sigma"] == pytest.approx(1.3, abs=0.05)
    assert record["sigma_loglinear"] == pytest.approx(1.3, abs=0.05)
    assert abs(record["sigma_after"]) < 0.05


def test_calibration_finds_a_trend_of_rows_and_one_of_columns(
    scenes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, side = readings.read, 10
    places = torch.cartesian_prod(torch.arange(side), torch.arange(side)) / (side - 1)
    put_in = torch.exp(0.9 * places[:, 0] - 0.6 * places[:, 1]) * (1 + 0.05 * torch.sin(torch.arange(100) * 12.9898))

    def biased(score: Any, call: Any, rows: Tensor, visual: Tensor, tables: Any = None) -> Tensor:
        out = plain(score, call, rows, visual, tables)
        out[..., visual[0]] = put_in
        return out

    monkeypatch.setattr(readings, "read", biased)
    (record,) = calibration.calibrate(scenes, ["fastv"], n=2, out=tmp_path / "p.json")["entries"].values()
    assert record["grid_sigma"] == pytest.approx([0.9, -0.6], abs=0.05)
    assert record["grid_sigma_after"] == pytest.approx([0, 0], abs=0.05)


def test_calibration_measures_each_methods_own_score(scenes: Any, tmp_path: Path) -> None:
    """What is written is what the method asks for; a file may name other layers; the pipeline is back afterwards."""
    scenes.set_method("vcd")
    recipe, out = tmp_path / "himap.yaml", tmp_path / "p.json"
    recipe.write_text("{name: himap, layers: [2, 4]}\n")
    what = [*WRAPPED, str(recipe)]
    entries = calibration.calibrate(scenes, what, n=2, out=out)["entries"]
    assert [m.name for m in scenes.methods] == ["vcd"]
    scenes.set_method(None)
    info = scenes.session.info
    profile = Profile("scenes", info.signature, Profile.load(out, info.signature).entries)
    for method in (*(vlm_attn.method(n, calibrate=["exp_trend"]) for n in WRAPPED),
                   vlm_attn.method("himap", layers=[2, 4], calibrate=["exp_trend"])):  # fmt: skip
        assert isinstance(method, Prune)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("warnings.warn", lambda *args, **kwargs: None)  # two pictures make no trend
            resolved: Any = method.resolve(info, profile)
        assert resolved.sigma == entries[f"trend:{resolved.trend_id}"]["sigma"]
    assert {"trend:last_row@1", "trend:text_row@1-sum", "trend:last_row@1-rope_free"} <= set(entries)


def test_a_calibration_that_failed_its_check_says_so() -> None:
    with vlm_attn.attach(models.llava(4)) as session:
        info = session.info
    entry: dict[str, dict[str, Any]] = {"trend:last_row@1": {"sigma": 1.0, "sigma_after": 0.3}}
    with pytest.warns(UserWarning, match="failed its self-check"):
        method: Any = vlm_attn.method("fastv", calibrate=["exp_trend"])
        assert method.resolve(info, Profile("x", info.signature, entry)).sigma == 1.0
    method = vlm_attn.method("fastv", calibrate=["grid_trend"])
    with pytest.raises(MissingProfileError, match=r"rows and columns.*calibrate again"):
        method.resolve(info, Profile("x", info.signature, entry))
    entry["trend:last_row@1"].update(grid_sigma=[1.0, -0.5], grid_sigma_after=[0.0, -0.3])
    with pytest.warns(UserWarning, match=r"an exponent of -0.30 is left"):
        assert method.resolve(info, Profile("x", info.signature, entry)).grid_sigma == (1.0, -0.5)


def test_one_trend_is_taken_out_at_most() -> None:
    with vlm_attn.attach(models.llava(4)) as session:
        for first, second in (("exp_trend", "grid_trend"), ("grid_trend", "mean_map"), ("mean_map", "fastv_released")):
            method: Any = vlm_attn.method("fastv", calibrate=[second, first])
            with pytest.raises(ValueError, match=f"{first} and {second} both take out the trend"):
                method.resolve(session.info, session.profile)


def test_a_trend_of_rows_and_columns_needs_a_grid() -> None:
    """The queries of a query transformer stand for no place in the picture."""
    model, specimen = SPECIMENS["instructblip"].build(), SPECIMENS["instructblip"]
    method = vlm_attn.method("fastv", calibrate=["grid_trend"], grid_sigma=(1.0, 1.0), keep=2)
    with vlm_attn.attach(model, method), pytest.raises(ValueError, match="no grid of rows and columns.*exp_trend"):
        model(**specimen.inputs([Sample()]))
