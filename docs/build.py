"""Writes what the documents say about installed methods and families, and checks their links.

python docs/build.py            rewrites docs/reference.md and the tables between marks
python docs/build.py --check    changes nothing; exit code 1 if a page is out of date or a link is broken
"""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path

import vlm_attn
from vlm_attn_demo.parameters import parameters

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "methods/README.md", "demo_app/README.md")


def cell(value: object) -> str:
    """Text that cannot break a table."""
    return str(value).replace("|", "\\|").replace("\n", " ")


def method_table() -> str:
    """The table of README.md."""
    lines = ["| name | stage | what it does | paper | per checkpoint |", "| --- | --- | --- | --- | --- |"]
    for row in vlm_attn.methods():
        paper = re.sub(r"arXiv:(\S+)", r"[arXiv:\1](https://arxiv.org/abs/\1)", row.paper) or "this project"
        needs = ", ".join(row.needs) or "nothing"
        lines.append(f"| `{row.name}` | {row.stage} | {cell(row.summary)} | {paper} | {cell(needs)} |")
    return "\n".join(lines)


def reference() -> str:
    """The page docs/reference.md."""
    out = ["# Reference", "", "Written by `make docs` from what is installed; do not edit.", "", "## Methods", ""]
    for row in vlm_attn.methods():
        out += [f"### `{row.name}`", "", f"Stage {row.stage}: {row.summary}. {row.paper or 'A control'}.", ""]
        if row.needs:
            out += [f"Needs per checkpoint: {', '.join(row.needs)}.", ""]
        wanted = parameters(row.cls)
        if wanted:
            out += ["| parameter | type | default | meaning |", "| --- | --- | --- | --- |"]
        types = {f.name: str(f.type) for f in dataclasses.fields(row.cls)}  # type: ignore[arg-type]
        for p in wanted:
            out.append(f"| `{p.name}` | `{cell(types[p.name])}` | `{cell(p.default)}` | {cell(p.help)} |")
        out += [""] if wanted else ["No parameters.", ""]
    out += [
        "## Model families",
        "",
        "| name | model types | in the test matrix | refused |",
        "| --- | --- | --- | --- |",
    ]
    for family in vlm_attn.families():
        refused = "; ".join(f"{stage}: {reason}" for stage, reason in family.refused.items()) or "nothing"
        types_of = ", ".join(f"`{t}`" for t in family.model_types)
        out.append(f"| `{family.name}` | {types_of} | {'yes' if family.executed else 'no'} | {cell(refused)} |")
    return "\n".join(out) + "\n"


def config_table() -> str:
    """Keys of a benchmark config with their defaults."""
    from vlm_attn.evaluation.config import EvalConfig

    lines = ["| key | type | default |", "| --- | --- | --- |"]
    for name, field in EvalConfig.model_fields.items():
        kind = str(EvalConfig.__annotations__[name]).replace("vlm_attn.evaluation.config.", "")
        default = "required" if field.is_required() else "`baseline`" if name == "methods" else f"`{field.default!r}`"
        lines.append(f"| `{name}` | `{cell(kind)}` | {cell(default)} |")
    notes = re.findall(r"^    - (``.+?)(?=^    - ``|\Z)", EvalConfig.__doc__ or "", re.S | re.M)
    return "\n".join([*lines, "", *("- " + " ".join(n.split()).replace("``", "`") for n in notes)])


def filled(page: str, mark: str, text: str) -> str:
    """A page with ``text`` between its two marks."""
    old = (ROOT / page).read_text(encoding="utf-8")
    return re.sub(rf"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)", lambda m: f"{m[1]}{text}\n{m[2]}", old, flags=re.S)


def built() -> dict[Path, str]:
    """File -> content that it should have."""
    return {
        ROOT / "README.md": filled("README.md", "methods", method_table()),
        ROOT / "docs" / "configuration.md": filled("docs/configuration.md", "config", config_table()),
        ROOT / "docs" / "reference.md": reference(),
    }


def broken_links() -> list[str]:
    """Relative links that lead nowhere."""
    found = []
    for page in [*(ROOT / p for p in PAGES), *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if "://" not in target and not (page.parent / target).exists():
                found.append(f"{page.relative_to(ROOT)}: {target} does not exist")
    return found


def main(check: bool) -> int:
    """Writes or checks; returns the exit code."""
    stale = [path for path, text in built().items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    if not check:
        for path in stale:
            path.write_text(built()[path], encoding="utf-8")
    complaints = [
        f"{path.relative_to(ROOT)} is out of date: run make docs" for path in stale if check
    ] + broken_links()
    sys.stdout.write("".join(f"{line}\n" for line in complaints) or "documents are up to date\n")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
