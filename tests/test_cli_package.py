"""The folder layout: uniquely named packages, entry points, documents that agree with what is installed."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import vlm_attn

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_top_level_folders_are_no_packages() -> None:
    """A regular package called `kernels` would stand in for the one that transformers probes."""
    for folder in ("methods", "kernels", "demo_app", "eval_configs", "benchmarks", "docs"):
        assert not (ROOT / folder / "__init__.py").exists(), f"{folder}/ must not be an import package"


def test_imports_with_the_repository_on_the_path() -> None:
    """transformers loads, and the public functions stay functions although submodules share their names."""
    code = (
        "import transformers.modeling_utils, vlm_attn, vlm_attn.wrap, vlm_attn.families, vlm_attn_methods, types\n"
        "names = (vlm_attn.wrap, vlm_attn.families, vlm_attn.methods, vlm_attn.method, vlm_attn.attach)\n"
        "assert all(isinstance(n, types.FunctionType) for n in names), names"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr


def test_declared_entry_points_are_installed_and_load() -> None:
    declared = PROJECT["project"]["entry-points"]
    for group, points in declared.items():
        installed = {p.name: p for p in entry_points(group=group)}
        for name, value in points.items():
            assert name in installed, f"{name} is declared but not installed: run pip install -e . again"
            assert installed[name].value == value
    files = {p.stem for p in (ROOT / "methods" / "vlm_attn_methods").glob("[a-z]*.py")}
    assert files == set(declared["vlm_attn.methods"]), "every method file has its line in pyproject.toml"


def test_the_wheel_would_hold_what_the_package_needs() -> None:
    wheel = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert set(wheel["only-include"]) == {
        "vlm_attn",
        "methods/vlm_attn_methods",
        "demo_app/vlm_attn_demo",
        "kernels/vlm_attn_kernels",
        "eval_configs",
    }
    assert (ROOT / "vlm_attn" / "py.typed").exists() and PROJECT["project"]["version"] == vlm_attn.__version__


@pytest.mark.parametrize("page", ["README.md", "docs/reference.md", "methods/README.md"])
def test_every_method_has_its_row(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    missing = [row.name for row in vlm_attn.methods() if f"`{row.name}`" not in text]
    assert not missing, f"{page} lacks {missing}: run make docs (methods/README.md by hand)"


def test_documents_are_up_to_date_and_their_links_lead_somewhere(capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("docs_build", ROOT / "docs" / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    code = module.main(check=True)
    assert code == 0, capsys.readouterr().out


def test_no_file_is_too_long() -> None:
    code = [*(p for folder in ("vlm_attn", "methods", "demo_app") for p in (ROOT / folder).rglob("*.py"))]
    long = {str(p.relative_to(ROOT)): n for p in code if (n := len(p.read_text("utf-8").splitlines())) > 450}
    assert not long, f"split these: {long}"


def test_no_print_and_no_unsafe_loading_in_the_packages() -> None:
    found = []
    for folder in ("vlm_attn", "methods", "demo_app"):
        for path in (ROOT / folder).rglob("*.py"):
            for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
                if re.search(r"yaml\.(load|unsafe_load|full_load)\(|pickle\.load|\beval\(|\bexec\(", line) and (
                    "model.eval()" not in line and ".eval()" not in line
                ):
                    found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert not found, found
