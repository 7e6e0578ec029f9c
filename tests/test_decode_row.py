"""In decoding, an edited row replaces the fused kernel: attention is computed once per layer, not twice."""

from __future__ import annotations

from typing import Any

import pytest

import vlm_attn
from tests import models
from tests.matrix import SINKS
from tests.runs import greedy
from vlm_attn.attention import interface


@pytest.mark.parametrize(("name", "params"), [("var", SINKS), ("placebo", {})])
def test_edited_layers_skip_the_kernel(name: str, params: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []
    original = interface.base_function

    def counting(backend: str, module: Any) -> Any:
        base = original(backend, module)

        def run(module: Any, query: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append((module.layer_idx, query.shape[2]))
            return base(module, query, *args, **kwargs)

        return run

    monkeypatch.setattr(interface, "base_function", counting)
    model = models.llava(4)
    with vlm_attn.attach(model, vlm_attn.method(name, **params, first_layer=1)):
        calls.clear()  # attaching runs a probe of its own
        greedy(model, models.single().inputs(), 4)
    decoding = [layer for layer, rows in calls if rows == 1]
    assert decoding.count(0) == decoding.count(3) == 3
    assert 1 not in decoding
    assert 2 not in decoding
    assert len([1 for _, rows in calls if rows > 1]) == 4
