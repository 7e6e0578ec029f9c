"""Published per-checkpoint data: found by the exact hub id, fits that model, overruled by a calibration."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import vlm_attn
from vlm_attn import profiles
from vlm_attn.errors import MissingProfileError
from vlm_attn.profiles import Profile
from vlm_attn.stages import ModelInfo

SHAPES = {  # layers, heads, key/value heads, hidden
    "llava-hf/llava-1.5-7b-hf": (32, 32, 32, 4096),
    "llava-hf/llava-1.5-13b-hf": (40, 40, 40, 5120),
    "llava-hf/llava-v1.6-vicuna-7b-hf": (32, 32, 32, 4096),
    "llava-hf/llava-v1.6-mistral-7b-hf": (32, 32, 8, 4096),
    "Qwen/Qwen2-VL-7B-Instruct": (28, 28, 4, 3584),
}
METHOD = {"sinks": "var", "gift": "gift", "adhh": "adhh"}


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
