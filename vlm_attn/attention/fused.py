"""The fused attention of a call: the backend's own, or the same kernel with its LSE kept where an edit needs that."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from . import segments
from .call import Call, Run, fused_inputs
from .rows import row_logits, row_outputs

# Up to so many keys, a bias is applied to the finished output: a few products per row instead of wider heads.
FEW_KEYS = 8
# A weight that shrinks by more than this leaves a difference of equals behind in the finished output.
LEAST_BIAS, LEAST_BIAS_HALF = -3.0, -0.7


def attend(call: Call, run: Run, wants_lse: bool) -> tuple[Call, Tensor, Tensor | None]:
    """Attention of all rows with ``call.bias`` and the folded maps in it.

    Args:
        run: the backend's own attention.
        wants_lse: an edit needs each row's LSE.

    Returns:
        The call (with ``lse`` where the kernel gave it), the output ``[B, Q, H, d]``, the backend's weights, if any.
    """
    bare = call if call.bias is None else replace(call, bias=None)
    kept = bare.plain and keeps_lse(call)
    keys = few_keys(call.bias, call.query.dtype) if kept and call.bias is not None else None
    if kept and (keys is not None or (wants_lse and call.bias is None)):
        out, lse = segments.fused(call.query, call.key, call.value, call.scaling, causal=True)
        if keys is not None:
            out, lse = add_bias(call, out, lse, keys)
        return replace(call, lse=lse), out.transpose(1, 2), None
    out, weights = run(*fused_inputs(call))
    return call, out[..., : call.query.shape[-1]], weights


def keeps_lse(call: Call) -> bool:
    """Whether the backend's kernel is one that torch also offers with its LSE."""
    same_width = call.value.shape[-1] == call.query.shape[-1]
    return call.backend == "sdpa" and same_width and segments.gives_lse(call.query)


def few_keys(bias: Tensor, dtype: torch.dtype) -> Tensor | None:
    """int64 ``[B, K]``: the keys with a bias, where they are few and no weight nearly vanishes; else None."""
    least = LEAST_BIAS_HALF if dtype in (torch.float16, torch.bfloat16) else LEAST_BIAS
    acting = (bias != 0).any(1)
    count = int(acting.sum(-1).max())
    if count > FEW_KEYS or float(bias.min()) < least:
        return None
    return acting.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[:, :count]


def add_bias(call: Call, out: Tensor, lse: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """``O' = (O + sum_k f_k A_k v_k) / (1 + sum_k f_k A_k)`` with ``f = exp(bias) - 1`` and ``A_k = exp(z_k - L)``.

    Args:
        out, lse: ``[B, H, Q, d]`` and ``[B, H, Q]`` without the bias.
        keys: int64 ``[B, K]``, all keys whose bias is not 0.

    Returns:
        Output and LSE with it.
    """
    if call.bias is None or keys.shape[1] == 0:
        return out, lse
    wide = keys[:, None, :, None].expand(-1, call.key.shape[1], -1, call.key.shape[-1])
    logits = row_logits(call.query, call.key.gather(2, wide), call.scaling)
    hidden = keys[:, None, None, :] > torch.arange(call.queries, device=keys.device)[:, None]
    factor = call.bias.gather(2, keys[:, None].expand(-1, call.bias.shape[1], -1)).expm1()[:, :, None, :]
    added = (factor * (logits - lse[..., None]).exp()).masked_fill(hidden, 0.0)
    total = 1 + added.sum(-1)
    result = (out.float() + row_outputs(added, call.value.gather(2, wide))) / total[..., None]
    return result.to(out.dtype), lse + total.log()
