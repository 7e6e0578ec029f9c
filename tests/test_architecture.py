"""The shape of the code: who may import whom, what a method must bring along, how large a file may be."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import vlm_attn
from tests.matrix import MATRIX

ROOT = Path(__file__).resolve().parents[1]
CORE = ROOT / "vlm_attn"
METHODS = ROOT / "methods" / "vlm_attn_methods"
OUTER = ("vlm_attn_methods", "vlm_attn_kernels", "vlm_attn_demo")
VERBS = ("vlm_attn.cli", "vlm_attn.__main__", "vlm_attn.bench_command", "vlm_attn.read_command")
UPPER = ("vlm_attn.evaluation", "vlm_attn.serve", "vlm_attn.bench", *VERBS)
MAX_LINES = 450
MAX_METHOD_LINES = 150
SOURCES = sorted(
    path
    for folder in ("vlm_attn", "methods", "kernels", "demo_app", "tests", "benchmarks")
    for path in (ROOT / folder).rglob("*.py")
)
PACKAGE_CODE = [path for path in SOURCES if "tests" not in path.parts and "benchmarks" not in path.parts]
METHOD_FILES = sorted(path for path in METHODS.glob("*.py") if not path.name.startswith("_"))
# The support matrix runs methods on families, so it stands above both.
FAMILY_FILES = sorted(p for p in (CORE / "families").glob("*.py") if p.name not in ("checks.py", "matrix.py"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def package(path: Path) -> str:
    """Dotted package that a file of the core or of the methods belongs to."""
    base = ROOT if CORE in path.parents else METHODS.parent
    return ".".join(path.relative_to(base).parent.parts)


def imports(path: Path, types_too: bool = False) -> set[str]:
    """Absolute dotted names a file imports, `if TYPE_CHECKING` blocks left out unless asked for."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped: set[ast.AST] = set()
    if not types_too:
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                skipped.update(child for statement in node.body for child in ast.walk(statement))
    found: set[str] = set()
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = node.module or ""
            if node.level:
                parts = package(path).split(".")
                parts = parts[: len(parts) - node.level + 1]
                prefix = ".".join([*parts, *([node.module] if node.module else [])])
            found.add(prefix)
            found.update(f"{prefix}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found.update(a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str))
    return found


def under(names: set[str], prefixes: tuple[str, ...]) -> list[str]:
    return sorted(n for n in names for p in prefixes if n == p or n.startswith(p + "."))


def test_the_reader_of_imports_reads() -> None:
    assert under(imports(CORE / "session.py"), ("vlm_attn.families",))
    assert "vlm_attn.attention.masks.BACKENDS" in imports(CORE / "attention" / "interface.py")
    assert "vlm_attn.attention.masks" in imports(CORE / "attention" / "call.py")


@pytest.mark.parametrize("path", sorted(CORE.rglob("*.py")), ids=name_of)
def test_core_imports_no_plug_in(path: Path) -> None:
    """Methods come through the registry, kernels register themselves; only the `demo` verb starts the demo."""
    outer = OUTER if path.name != "cli.py" else OUTER[:2]
    assert under(imports(path, types_too=True), outer) == []


@pytest.mark.parametrize(
    "path",
    [p for p in sorted(CORE.rglob("*.py")) if not under({f"{package(p)}.{p.stem}"}, (*UPPER, "vlm_attn.scenes"))],
    ids=name_of,
)
def test_core_does_not_look_up(path: Path) -> None:
    """evaluation, bench, serve and the command line stand on the core, not the other way round."""
    assert under(imports(path), UPPER) == []


@pytest.mark.parametrize("path", sorted(METHODS.glob("*.py")), ids=name_of)
def test_method_imports_no_method_and_no_family(path: Path) -> None:
    found = imports(path, types_too=True)
    others = [
        n
        for n in under(found, ("vlm_attn_methods",))
        if n != "vlm_attn_methods" and not n.split(".")[1].startswith("_")
    ]
    assert others == []
    assert under(found, ("vlm_attn.families", "vlm_attn.session", "vlm_attn.wrap", *UPPER)) == []


@pytest.mark.parametrize("path", FAMILY_FILES, ids=name_of)
def test_family_imports_no_method(path: Path) -> None:
    upper = ("vlm_attn.session", "vlm_attn.wrap", "vlm_attn.registry", "vlm_attn.recipe", *OUTER, *UPPER)
    assert under(imports(path, types_too=True), upper) == []


# --------------------------------------------------------------------------------------------- what a method brings


def registered() -> dict[str, str]:
    return {p.name: p.value for p in importlib.metadata.entry_points(group="vlm_attn.methods")}


@pytest.mark.parametrize("path", METHOD_FILES, ids=name_of)
def test_every_method_file_is_complete(path: Path) -> None:
    """File, registry line, test row, row in the table."""
    modules = {value.split(":")[0]: name for name, value in registered().items()}
    module = f"vlm_attn_methods.{path.stem}"
    assert module in modules, f"{path.name} has no entry point"
    assert modules[module] == path.stem
    assert path.stem in MATRIX, f"{path.name} has no row in tests/matrix.py"
    table = (ROOT / "methods" / "README.md").read_text(encoding="utf-8")
    assert f"| `{path.stem}` |" in table, f"{path.name} has no row in methods/README.md"
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_METHOD_LINES


def test_nothing_is_listed_that_does_not_exist() -> None:
    stems = {path.stem for path in METHOD_FILES}
    assert set(MATRIX) == stems
    assert {name for name, value in registered().items() if value.startswith("vlm_attn_methods.")} == stems
    lines = (ROOT / "methods" / "README.md").read_text(encoding="utf-8").splitlines()
    assert {line.split("`")[1] for line in lines if line.startswith("| `")} == stems


@pytest.mark.parametrize("name", sorted(MATRIX))
def test_catalogue_rows_are_filled(name: str) -> None:
    row = next(row for row in vlm_attn.methods() if row.name == name)
    assert row.summary
    assert row.cls.__doc__
    assert row.name == row.neutral().name
    data = row.neutral().to_dict()
    assert vlm_attn.method(data.pop("name"), **data) == row.neutral()
    documented = row.cls.__doc__
    for field in row.to_dict()["parameters"]:
        assert field in documented, f"{row.name}: parameter {field} is not in the docstring"


def test_families_say_what_was_run() -> None:
    rows = {row.name: row for row in vlm_attn.families()}
    assert rows["llava"].executed
    for row in rows.values():
        assert row.model_types
        assert all(reason for reason in row.refused.values())


# ----------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_files_stay_small(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


@pytest.mark.parametrize("path", PACKAGE_CODE, ids=name_of)
def test_package_code_neither_asserts_nor_prints(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        assert not isinstance(node, ast.Assert), f"assert in line {node.lineno}"
        is_print = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
        assert not is_print, f"print in line {getattr(node, 'lineno', 0)}"


@pytest.mark.parametrize("folder", ["methods", "kernels", "demo_app"])
def test_plain_folders_are_no_packages(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists()


def test_a_real_kernels_distribution_wins(tmp_path: Path) -> None:
    """transformers probes for a package `kernels`; the folder of that name must not stand in for it."""
    real = tmp_path / "site" / "kernels"
    real.mkdir(parents=True)
    (real / "__init__.py").write_text("REAL = True\n")
    folder = tmp_path / "tree" / "kernels" / "vlm_attn_kernels"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    code = (
        "import sys; sys.path[:0] = [sys.argv[1]]; sys.path.append(sys.argv[2])\n"
        "import kernels; raise SystemExit(0 if getattr(kernels, 'REAL', False) else 1)"
    )
    run = [sys.executable, "-c", code, str(tmp_path / "tree"), str(real.parent)]
    assert subprocess.run(run, check=False, cwd=tmp_path / "tree").returncode == 0


def test_plain_folders_are_not_importable_as_distributions() -> None:
    for name in ("methods", "kernels", "demo_app"):
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            ours = [p for p in spec.submodule_search_locations if Path(p).parent == ROOT]
            assert not ours or spec.origin is None  # a namespace at most


def test_importing_the_package_loads_no_torch() -> None:
    code = "import sys, vlm_attn; raise SystemExit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT).returncode == 0


def test_submodules_do_not_shadow_the_public_functions() -> None:
    code = (
        "import vlm_attn, vlm_attn.wrap, vlm_attn.families\n"
        "raise SystemExit(not (callable(vlm_attn.wrap) and callable(vlm_attn.families)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT).returncode == 0
