"""The code in README.md and docs/ runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import vlm_attn
from vlm_attn import recipe
from vlm_attn.evaluation.config import build_config

ROOT = Path(__file__).parent.parent


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of one language of a page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.S | re.M)


def test_the_example_of_the_readme(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = blocks("README.md", "python")
    room: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec", dont_inherit=True), room)
    said = capsys.readouterr().out
    assert room["answer"].text in said and "'last': 50" in said
    assert room["heat"].shape == (80, 80)


def test_the_method_of_the_guide() -> None:
    (code,) = blocks("docs/methods.md", "python")
    room: dict[str, Any] = {"__name__": "guide"}
    exec(compile(code, "docs/methods.md", "exec", dont_inherit=True), room)
    picture = torch.randint(0, 255, (80, 80, 3), dtype=torch.uint8).numpy()
    with vlm_attn.wrap("scenes", room["Middle"](keep=4)) as vlm:
        answer = vlm.ask(picture, "What place is this?", max_new_tokens=4)
        assert answer.stats["kept_cells"] == [[(4, 4), (4, 5), (5, 4), (5, 5)]]
        plain = vlm.set_method(None).ask(picture, "What place is this?", max_new_tokens=4)
        neutral = vlm.set_method(room["Middle"].neutral()).ask(picture, "What place is this?", max_new_tokens=4)
        assert neutral.tokens == plain.tokens


def test_the_files_of_the_configuration_page() -> None:
    config, sweeps, recipe_file = (yaml.safe_load(block) for block in blocks("docs/configuration.md", "yaml"))
    assert [m.label for m in build_config(config).methods] == ["baseline", "fastv", "fastv 24", "both"]
    labels = [m.label for m in build_config({**config, **sweeps}).methods]
    assert labels[:3] == ["baseline", "fastv keep=0.5", "fastv keep=0.3334"]
    assert "himap debiased keep=0.17+0.04" in labels
    assert labels[-1] == "fastv auto"
    assert [m.name for m in recipe.pipeline(recipe_file)] == ["fastv", "vcd"]
    for code in blocks("docs/usage.md", "python")[3:4]:
        for line in code.splitlines():
            if argument := re.search(r"set_method\((.*)\)$", line):
                recipe.pipeline(eval(argument[1], {"vlm_attn": vlm_attn}))
