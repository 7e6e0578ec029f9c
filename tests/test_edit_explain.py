"""`session.explain()` says what runs: every edited layer, with the plan that the engine takes."""

from __future__ import annotations

import vlm_attn
from tests import models
from tests.matrix import GIFT, SINKS
from vlm_attn.explain import Explanation


def explained(*methods: object) -> Explanation:
    with vlm_attn.attach(models.llava(4), list(methods)) as session:
        return session.explain()


def plans(found: Explanation, method: str, phase: str) -> dict[int, str]:
    return {row.layer: row.plan[:2] for row in found.rows if (row.method, row.phase) == (method, phase)}


def test_every_layer_and_phase_is_there() -> None:
    found = explained(vlm_attn.method("var", **SINKS), "vhr", "fastv")
    assert {(row.layer, row.phase) for row in found.rows} == {(n, p) for n in range(4) for p in ("prefill", "decode")}
    assert plans(found, "var", "prefill") == {2: "P2"}
    assert plans(found, "var", "decode") == {2: "P1"}
    assert set(plans(found, "vhr", "prefill").values()) == {"P0"}
    assert plans(found, "fastv", "prefill") == {2: "st"}
    assert plans(found, "-", "prefill") == {0: "st"}


def test_plans_follow_the_method() -> None:
    assert set(plans(explained(vlm_attn.method("zerotuning", gamma=2.0)), "zerotuning", "prefill").values()) == {"P3"}
    assert set(plans(explained("vas_boost"), "vas_boost", "prefill").values()) == {"P3"}
    assert plans(explained(vlm_attn.method("pai", first_layer=3)), "pai", "prefill") == {3: "P2"}
    assert plans(explained(vlm_attn.method("act", heads="all")), "act", "prefill") == {2: "P3"}
    assert plans(explained("sofa"), "sofa", "decode") == {}


def test_a_map_that_is_needed_early_is_read_ahead() -> None:
    early = vlm_attn.method("gift", **GIFT, saliency_layer=2, enhance_layers=[0, 3])
    late = vlm_attn.method("gift", **GIFT, saliency_layer=2, enhance_layers=[3])
    assert "once more" in str(explained(early))
    assert "once more" not in str(explained(late))


def test_it_reads_as_a_table_and_as_data() -> None:
    found = explained(vlm_attn.method("var", **SINKS, first_layer=0))
    text = str(found).splitlines()
    assert text[0].split() == ["layers", "phase", "method", "plan", "why"]
    assert any(line.startswith("0-2") and "var" in line for line in text)
    assert found.to_dict()[0]["layer"] == 0
