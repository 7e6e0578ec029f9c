"""Published per-checkpoint data: found by the exact hub id, fits that model, overruled by a calibration."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import vlm_attn
from vlm_attn import calibration_heads, profiles
from vlm_attn.calibration import calibrate
from vlm_attn.errors import MissingProfileError
from vlm_attn.profiles import Profile
from vlm_attn.stages import ModelInfo

SHAPES = {  # layers, heads, key/value heads, hidden
    "llava-hf/llava-1.5-7b-hf": (32, 32, 32, 4096),
    "llava-hf/llava-1.5-13b-hf": (40, 40, 40, 5120),
    "llava-hf/llava-v1.6-vicuna-7b-hf": (32, 32, 32, 4096),
    "llava-hf/llava-v1.6-mistral-7b-hf": (32, 32, 8, 4096),
    "llava-hf/llava-v1.6-vicuna-13b-hf": (40, 40, 40, 5120),
    "llava-hf/llama3-llava-next-8b-hf": (32, 32, 8, 4096),
    "Qwen/Qwen2-VL-7B-Instruct": (28, 28, 4, 3584),
    "Qwen/Qwen2.5-VL-3B-Instruct": (36, 16, 2, 2048),
    "Qwen/Qwen2.5-VL-7B-Instruct": (28, 28, 4, 3584),
    "Salesforce/instructblip-vicuna-7b": (32, 32, 32, 4096),
}
METHOD = {"sinks": "var", "gift": "gift", "adhh": "adhh", "vhr": "vhr"}


def test_every_entry_fits_its_model() -> None:
    data = json.loads(profiles.PUBLISHED.read_text(encoding="utf-8"))
    assert set(data) - {"comment"} == set(SHAPES)
    for checkpoint, (layers, heads, kv, hidden) in SHAPES.items():
        info = ModelInfo(checkpoint, "any", layers, heads, kv, hidden // heads, hidden)
        profile = profiles.find(checkpoint, info.signature)
        assert all(entry["source"] for entry in profile.entries.values())
        for entry in profile.entries:
            resolved = vlm_attn.method(METHOD[entry]).resolve(info, profile)
            assert resolved.edit_layers(info)


def test_another_name_gets_nothing() -> None:
    profile = profiles.find("llava-hf/llava-1.5-7b", {})
    assert not profile.entries
    info = ModelInfo("llava-hf/llava-1.5-7b", "llava", 32, 32, 32, 128, 4096)
    with pytest.raises(MissingProfileError, match="vlm-attn calibrate llava-hf/llava-1.5-7b --for adhh"):
        vlm_attn.method("adhh").resolve(info, profile)


def test_a_calibration_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLM_ATTN_PROFILES", str(tmp_path))
    name = "llava-hf/llava-1.5-7b-hf"
    Profile(name, {}, {"sinks": {"dims": [1], "tau": 2.0}}).save(profiles.user_file(name))
    found = profiles.find(name, {})
    assert found.entries["sinks"]["dims"] == [1]
    assert len(found.entries["adhh"]["heads"]) == 20


def test_vhr_takes_the_published_layers_unless_told_otherwise() -> None:
    name = "Salesforce/instructblip-vicuna-7b"
    info = ModelInfo(name, "any", 32, 32, 32, 128, 4096)
    own, other = profiles.find(name, {}), Profile("", {})
    assert vlm_attn.method("vhr").resolve(info, own).edit_layers(info) == frozenset(range(14, 32))
    assert vlm_attn.method("vhr").resolve(info, other).edit_layers(info) == frozenset({1, *range(18, 32)})
    told = vlm_attn.method("vhr", last_layers=2, include_layer1=True).resolve(info, own)
    assert told.edit_layers(info) == frozenset({1, 30, 31})


@pytest.mark.parametrize("name", ["var", "gift", "act", "adhh", "head_gate", "zerotuning"])
def test_missing_data_is_named_with_its_cure(name: str) -> None:
    info = ModelInfo("somebody/model", "any", 4, 4, 4, 8, 32)
    with pytest.raises(MissingProfileError, match=f"{name} needs .*vlm-attn calibrate somebody/model --for {name}"):
        vlm_attn.method(name).resolve(info, Profile("somebody/model", {}))


ENTRY = {"var": "sinks", **{name: name for name in ("gift", "adhh", "head_gate", "zerotuning")},
         "himap": "trend:text_row@0-sum", "sparsevlm": "trend:raters_row@0",
         "pyramiddrop": "trend:last_row@2"}  # fmt: skip


@pytest.mark.parametrize(("name", "entry"), ENTRY.items(), ids=ENTRY)
def test_calibrate_measures_what_is_missing(
    name: str, entry: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the shipped model, six questions, the heads of one layer: what is written is what the method then reads."""
    with vlm_attn.wrap("scenes") as vlm:
        info, layers = vlm.session.info, vlm.session.info.layers
        monkeypatch.setattr(calibration_heads.Bench, "heads", lambda self, wanted: [(layers - 2, h) for h in range(8)])
        calibrate(vlm, [name], n=6, out=tmp_path / "p.json", weak_sinks=True, by="entropy")
        profile = Profile.load(tmp_path / "p.json", info.signature)
    assert set(profile.entries) == {entry}
    bare = vlm_attn.method(name, **({"calibrate": ["exp_trend"]} if entry.startswith("trend") else {}))
    assert bare.resolve(info, profile).to_dict() != bare.to_dict()
