"""Plain-data statistics of one answer."""

from __future__ import annotations

from typing import Any

from ..request import Request


def request_stats(request: Request, layers: int, new_tokens: int, total_s: float) -> dict[str, Any]:
    """Plain-data statistics of a single-sample request (see :class:`vlm_attn.wrap.Answer`)."""
    tokens = request.tokens
    per_layer = request.kept_per_layer(layers)[0]
    times = {**request.times, "total_s": total_s}
    spent = times.get("encode_s", 0.0) + times.get("prefill_s", 0.0) + times.get("text_stream_s", 0.0)
    times["decode_s_per_token"] = max(total_s - spent, 0.0) / max(new_tokens, 1)
    last = request.stages[-1].tokens if request.stages else None
    cells = None
    if last is not None:
        cells = [
            [tuple(c) for c in last.cell[0][last.vis[0] & (last.img_id[0] == image)].tolist()]
            for image in range(tokens.images(0))
        ]
    return {
        "times": times,
        "visual_tokens": int(tokens.vis[0].sum()),
        "kept_tokens": {
            "mean": float(per_layer.float().mean()),
            "last": int(per_layer[-1]),
            "stages": {stage.layer: int(stage.tokens.vis[0].sum()) for stage in request.stages},
        },
        "kept_cells": cells,
        "grid": list(tokens.grids[0]),
        "edited_heads": dict(request.edited),
        "new_tokens": new_tokens,
    }
