"""Rows of the test matrix for pruning methods, as keyword arguments of `matrix.Row`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tests.reference import kit as loops
from tests.reference import kit_select as literal
from tests.reference import pruning_encoder as encoder
from tests.reference import pruning_inside as inside
from tests.reference import pruning_stages as stages
from tests.reference.llava import Dense

Choice = Callable[[Tensor, int, Tensor], list[int]]


def carried(model: Any, layers: Sequence[int], lowest: int = 1) -> list[int]:
    """Layers of a 32-layer model at the same share of this one's depth, no two of them the same."""
    depth, out = len(model.get_decoder().layers), []
    for layer in layers:
        number = max(round(layer / 32 * depth), lowest)
        while number in out:
            number += 1
        out.append(number)
    return out


def pyramiddrop(model: Any, params: dict[str, Any], last: Any, row: int) -> Dense:
    """Own selection."""
    return stages.PyramidDrop(model, **{"layers": carried(model, (8, 16, 24)), **params})


def himap(model: Any, params: dict[str, Any], last: Any, row: int) -> Dense:
    """Own selection."""
    return stages.HiMAP(model, **{"layers": carried(model, (2, 8)), **params})


def feather(model: Any, params: dict[str, Any], last: Any, row: int) -> Dense:
    """Own selection."""
    vision = model.config.vision_config
    side = vision.image_size // vision.patch_size
    return stages.Feather(model, **{"layers": carried(model, (8, 16)), "side": side, **params})


def sparsevlm(model: Any, params: dict[str, Any], last: Any, row: int) -> Dense:
    """Own selection, raters and clusters; the published lists in shares of 576."""
    lists = {"1.5": {192: (300, 200, 110), 64: (66, 30, 17)}, "plus": {192: (300, 200, 118), 64: (66, 34, 20)}}
    version = params.get("version", "1.5")
    keep = [count / 576 for count in lists[version][params.get("budget", 192)]]
    given = {k: v for k, v in params.items() if k != "budget"}
    return stages.SparseVLM(model, **{"layers": carried(model, (2, 6, 15), 0), "keep": keep, **given})


def one_cut(choose: Choice, **defaults: Any) -> Callable[..., Dense]:
    """A reference that cuts once by a rule on features."""

    def build(model: Any, params: dict[str, Any], last: Any, row: int) -> Dense:
        given = {**defaults, **{k: v for k, v in params.items() if k in ("layer", "keep", "positions")}}
        return stages.OneCut(model, choose=lambda x, k, text: choose(x, k, text, **_extra(params)), **given)

    return build


def _extra(params: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in params.items() if k not in ("layer", "keep", "positions")}


def dart(x: Tensor, k: int, text: Tensor, pivots: int = 4) -> list[int]:
    """The longest tokens, then the least similar to any of them."""
    first = loops.top([loops.length(row) for row in loops.rows_of(x)], min(pivots, k))
    likeness = loops.duplication(x, first)
    rest = [i for i in range(len(x)) if i not in first]
    return sorted(first + sorted(rest, key=lambda i: (likeness[i], i))[: k - len(first)])


def divprune(x: Tensor, k: int, text: Tensor) -> list[int]:
    """Max-min diversity."""
    return literal.maxmin(x, k)


def cdpruner(x: Tensor, k: int, text: Tensor, relevance: str = "none", theta: float | None = None) -> list[int]:
    """Greedy determinants."""
    r = [1.0] * len(x)
    if relevance == "embedding":
        r = loops.minmax([loops.mean([loops.cosine(i, t) for t in text.tolist()]) for i in x.tolist()], 1e-6)
    if theta is not None:
        r = torch.exp(theta / (2 * (1 - theta)) * torch.tensor(r)).tolist()
    return literal.dpp(x, r, k)


def norm_prune(x: Tensor, k: int, text: Tensor) -> list[int]:
    """The longest features."""
    return loops.top([loops.length(row) for row in loops.rows_of(x)], k)


def built_by(kind: Callable[..., Dense]) -> Callable[..., Dense]:
    """A reference that takes the method's own parameters."""
    return lambda model, params, last, row: kind(model, **params)


PRUNING: dict[str, dict[str, Any]] = {
    "pyramiddrop": {
        "variants": (
            {},
            {"layers": [2, 3], "keep": [0.7, 0.3], "positions": "keep"},
            {"layers": [1, 3], "keep": [0.5, 0.2]},
        ),
        "reference": pyramiddrop,
    },
    "himap": {"variants": ({}, {"layers": [1, 3], "keep": [7, 3]}), "reference": himap},
    "feather": {
        "variants": ({}, {"layers": [2], "keep": [0.4], "stride": 2}, {"layers": [1, 3], "keep": [0.5, 0.3]}),
        "reference": feather,
    },
    "sparsevlm": {
        "variants": (
            {},
            {"budget": 64, "seed": 3},
            {"version": "plus"},
            {"version": "plus", "layers": [0, 2], "keep": [0.5, 3]},
            {"layers": [1], "keep": [2]},
        ),
        "reference": sparsevlm,
    },
    "dart": {
        "variants": ({}, {"layer": 0, "keep": 5, "pivots": 2}, {"layer": 3, "keep": 3}),
        "reference": one_cut(dart, layer=2, keep=0.5),
    },
    "divprune": {
        "variants": ({}, {"keep": 5, "positions": "keep"}, {"layer": 2, "keep": 0.3}),
        "reference": one_cut(divprune, layer=0, keep=0.098, positions="renumber"),
    },
    "cdpruner": {
        "variants": (
            {},
            {"keep": 0.4, "relevance": "embedding"},
            {"keep": 5, "positions": "keep", "relevance": "embedding", "theta": 0.6},
        ),
        "reference": one_cut(cdpruner, layer=0, keep=0.1112, positions="renumber"),
    },
    "norm_prune": {
        "variants": ({}, {"layer": 2, "keep": 5}, {"keep": "auto:0.8"}),
        "reference": one_cut(norm_prune, layer=0, keep=0.5),
    },
    "tokencarve": {
        "variants": (
            {},
            {"layer": 1, "keep": 7},
            {"layer": 3, "keep": 0.5, "compact": False},
            {"layer": 3, "keep": 4},
        ),
        "reference": built_by(stages.TokenCarve),
    },
    "fastervlm": {
        "variants": ({}, {"keep": 7, "positions": "keep"}, {"keep": "auto:0.7"}),
        "reference": built_by(encoder.FasterVLM),
    },
    "text_dominance_compress": {
        "variants": ({}, {"reduction": 0.5, "encoder": "last"}),
        "reference": built_by(encoder.Compress),
    },
    "vispruner": {
        "variants": ({}, {"keep": 9, "important": 0.3, "positions": "keep"}),
        "reference": built_by(encoder.VisPruner),
    },
    "visionzip": {
        "variants": ({}, {"keep": 8}, {"keep": 0.5, "contextual": 3, "true_mean": True, "positions": "keep"}),
        "reference": built_by(encoder.VisionZip),
    },
    "prumerge": {
        "variants": ({}, {"plus": True}, {"at_least": 6, "positions": "keep"}),
        "reference": built_by(encoder.PruMerge),
    },
    "holov": {
        "variants": ({"runs": 4}, {"keep": 9, "runs": 3, "version": "intended"}, {"keep": 6, "positions": "keep"}),
        "reference": built_by(encoder.HoloV),
    },
    "zoo_prune": {
        "variants": (
            {"keep": 0.4},
            {"keep": 0.3, "m": 8, "seed": 2, "positions": "keep"},
            {"keep": 0.5, "score": "jvp", "m": 8},
            {"keep": 0.4, "m": 8, "rank": 4},
            {"keep": 0.3, "score": "jvp", "m": 8, "rank": 3},
            {"keep": 0.4, "score": "norm"},
        ),
        "reference": built_by(encoder.Zoo),
    },
    "apet": {
        "variants": ({"keep": 6, "basis": 3}, {"keep": 12, "seed": 4}, {"positions": "keep"}),
        "reference": built_by(encoder.ApET),
    },
    "tome": {
        "variants": ({}, {"r": 3, "positions": "keep"}, {"keep": 9}),
        "reference": built_by(inside.ToMe),
    },
    "flowcut": {
        "variants": ({}, {"keep": 9, "positions": "keep"}),
        "reference": built_by(inside.FlowCut),
    },
    "illava": {
        "variants": ({}, {"encoder_layers": [1], "encoder_drop": 6, "layer": 2, "keep": 5}, {"encoder_drop": 0}),
        "reference": built_by(inside.ILLaVA),
    },
    "spatten": {
        "variants": ({}, {"layers": [1, 3], "keep": 4, "keep_heads": 0.5}, {"keep": 1.0, "keep_heads": 0.4}),
        "reference": built_by(inside.SpAtten),
    },
}
