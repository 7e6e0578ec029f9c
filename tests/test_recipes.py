"""Every recipe in eval_configs/ validates, and runs on a tiny random model of its family, saved as a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("lmms_eval")

from tests.local_data import write_data
from vlm_attn.evaluation.runner import run_config, validate_config
from vlm_attn.families.zoo import SPECIMENS, Sample

FOLDER = Path(__file__).resolve().parents[1] / "eval_configs"
FAMILY = {
    "llava15_7b": "llava",
    "llava15_13b": "llava",
    "llava_next_7b": "llava_next",
    "qwen25_vl_7b": "qwen2_5_vl",
    "qwen3_vl_8b": "qwen3_vl",
    "internvl3_8b": "internvl",
    "smolvlm2": "smolvlm",
}
TEMPLATE = (
    "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}PLACEHOLDER "
    "{% else %}{{ c['text'] }} {% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}w7{% endif %}"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder per family that `--set model=FOLDER` takes: weights, processor, chat template."""
    out = {}
    for name in sorted(set(FAMILY.values())):
        specimen, folder = SPECIMENS[name], tmp_path_factory.mktemp(name)
        specimen.build().save_pretrained(folder)
        processor = specimen.processor()
        placeholder = " ".join(specimen.prompt(Sample(before=1, after=1)).split()[1:-1])
        processor.chat_template = TEMPLATE.replace("PLACEHOLDER", placeholder)
        processor.save_pretrained(folder)
        out[name] = folder
    return out


def test_every_recipe_has_a_family_or_needs_none() -> None:
    recipes = {path.stem: yaml.safe_load(path.read_text())["model"] for path in FOLDER.glob("*.yaml")}
    assert {name for name, model in recipes.items() if model != "scenes"} == set(FAMILY)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_validates_and_says_how_it_is_started(path: Path) -> None:
    resolved = validate_config(path)
    assert resolved["output"] == f"runs/{path.stem}"
    header = path.read_text().split("\nmodel:")[0]
    assert f"vlm-attn eval eval_configs/{path.name}" in header
    if resolved["model"] != "scenes":
        assert all(word in header for word in ("single word", "greedy", "16 new", "512 new", "opera500", "Batch 1"))
        assert all(path.read_text().count(key) for key in ("\nseed:", "\ndtype:", "\nattention:"))


@pytest.mark.parametrize("name", FAMILY)
def test_a_recipe_runs_on_a_tiny_model(
    name: str, data: tuple[Path, Path], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """All benchmarks of the recipe, four samples each; only what the machine cannot give is replaced. The methods are
    the same everywhere: one recipe runs all of them, the others the first ones."""
    replaced: dict[str, Any] = {
        "model": str(checkpoints[FAMILY[name]]), "data": str(data[0]), "images": str(data[1]), "limit": 4,
        "device": "cpu", "dtype": "float32", "max_new_tokens": 2, "warmup": 0, "resamples": 100, "report": False,
        "quiet": True, "output": str(tmp_path),
    }  # fmt: skip
    labels = [entry if isinstance(entry, str) else entry["name"] for entry in
              yaml.safe_load((FOLDER / f"{name}.yaml").read_text())["methods"]]  # fmt: skip
    if name != "llava15_7b":
        labels = replaced["methods"] = labels[:3]
    result = run_config(FOLDER / f"{name}.yaml", replaced)
    assert result is not None and result.failed == {}
    assert list(result.results["scores"]) == labels
    counts = [score["n"] for score in result.results["scores"]["fastv"].values()]
    assert counts == [4, 4, 4, 2, 4]
    assert all(pair["same_text"] == 1 for pair in result.results["paired"]["noop"].values())
    assert result.results["kept_tokens"]["fastv"]["local_mme"]["keep_ratio"] < 1


def test_the_table_of_published_figures_names_methods_that_exist() -> None:
    import re

    import vlm_attn

    text = (FOLDER.parent / "docs" / "reproduction.md").read_text(encoding="utf-8")
    rows = set(re.findall(r"^\| `(\w+)` \|", text, flags=re.MULTILINE))
    names = {row.name for row in vlm_attn.methods()}
    assert len(rows) > 20 and rows <= names
