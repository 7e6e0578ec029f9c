"""The shipped record of the support matrix holds every cell, and the page says what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import vlm_attn
from vlm_attn.families import ADAPTERS
from vlm_attn.families.checks import Cell
from vlm_attn.families.matrix import BACKENDS, RECORD, document, merged, record

PAGE = Path(__file__).parent.parent / "docs" / "support.md"
DATA = json.loads(RECORD.read_text(encoding="utf-8"))
CELLS = [{"family": family, **cell} for family, entry in DATA["families"].items() for cell in entry["cells"]]


def test_no_cell_is_silent() -> None:
    found = {(c["family"], c["backend"], c["method"]) for c in CELLS}
    wanted = {(f, b, row.name) for f in ADAPTERS for b in BACKENDS for row in vlm_attn.methods()}
    assert found == wanted, f"run make test-matrix: {sorted(wanted ^ found)[:5]} ..."
    assert len(CELLS) == len(found)


def test_every_cell_is_executed_or_refused_with_a_reason() -> None:
    assert {c["status"] for c in CELLS} == {"executed", "refused"}
    for cell in CELLS:
        if cell["status"] == "refused":
            assert len(cell["detail"]) > 30, cell
        else:
            neutral = [value for name, value in cell["figures"].items() if name.startswith("neutral")]
            assert len(neutral) == 2
            assert max(neutral) <= 1e-5, cell


def test_a_family_is_executed_when_a_method_ran_on_it() -> None:
    acting = {row.name for row in vlm_attn.methods() if row.stage in ("prune", "edit", "decode")}
    ran = {c["family"] for c in CELLS if c["status"] == "executed" and c["method"] in acting}
    assert {row.name for row in vlm_attn.families() if row.executed} == ran
    assert len(ran) >= 24


def test_the_page_is_the_record() -> None:
    assert PAGE.read_text(encoding="utf-8") == document(DATA)


@pytest.mark.parametrize("status", ["failed", "refused"])
def test_a_new_cell_takes_the_place_of_the_old_one(status: str) -> None:
    new = Cell("llava", "sdpa", "fastv", "prune", status, "a reason that is long enough to be read", {})
    data = record(merged([new], DATA))
    mine = [c for c in data["families"]["llava"]["cells"] if c["method"] == "fastv" and c["backend"] == "sdpa"]
    assert [c["status"] for c in mine] == [status]
    assert sum(len(f["cells"]) for f in data["families"].values()) == len(CELLS)
    assert document(data).count("✗") == 1 + (status == "failed")  # the legend, and the cell
