"""Two tokens through the decoder at attach time: every layer reaches our attention function, its mask reads right."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .attention import interface, masks
from .errors import AttachError

if TYPE_CHECKING:
    from .session import Session

_PASSED: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


class MaskProbe:
    """Stands in for a session during the probe: forwards every call and notes how its mask reads."""

    def __init__(self) -> None:
        self.sees_later: dict[int, bool] = {}

    def attend(
        self,
        base: interface.AttentionFunction,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        kwargs: dict[str, Any],
    ) -> interface.Result:
        """Runs the call unchanged."""
        causal = kwargs.get("is_causal")
        causal = interface.is_causal(module) if causal is None else bool(causal)
        rows = torch.zeros(1, dtype=torch.long, device=query.device)
        seen = masks.visible(mask, rows, query.shape[0], query.shape[2], key.shape[2], query.device, causal)
        self.sees_later[module.layer_idx] = bool(seen[..., 1].any())
        return base(module, query, key, value, mask, **kwargs)


def check(session: Session) -> None:
    """Runs the probe once per model and backend.

    Raises:
        AttachError: a decoder layer bypasses the attention function, or its mask means something else than we read.
    """
    model, family = session.model, session.family
    passed = _PASSED.setdefault(model, set())
    # FlexAttention compiles per shape, which takes minutes on a CPU; its masks are functions and read exactly.
    if session.backend in passed or session.backend == "flex_attention":
        return
    probe = MaskProbe()
    for _, attention in family.attentions():
        interface.connect(attention, probe)
    try:
        with session.suspended(), torch.no_grad():
            hidden = _two_tokens(session)
    finally:
        for _, attention in family.attentions():
            interface.connect(attention, session)
    missing = [n for n, _ in family.attentions() if n not in probe.sees_later]
    if missing:
        raise AttachError(
            f"{type(model).__name__}: decoder layer {missing[0]} does not call the attention function registered with "
            "transformers; load the model unmodified, or call model.set_attn_implementation('sdpa') first"
        )
    change = (hidden[0, 0] - hidden[1, 0]).float().abs().max()
    scale = hidden[0, 0].float().abs().max()
    sees_later = bool(change > 1e-2 * scale)
    if sees_later != any(probe.sees_later.values()):
        reads = "bidirectional" if any(probe.sees_later.values()) else "causal"
        raise AttachError(
            f"{type(model).__name__}: its attention mask reads as {reads} but the decoder behaves otherwise; this "
            "model cannot be served with this attention backend"
        )
    passed.add(session.backend)


def _two_tokens(session: Session) -> Tensor:
    """Last hidden states ``[2, 2, D]`` of two prompts that differ in their second token only."""
    embed = session.model.get_input_embeddings()
    device = next((p.device for p in embed.parameters() if p.device.type != "meta"), torch.device("cpu"))
    ids = torch.tensor([[3, 4], [3, 9]], device=device)
    out = session.family.lm(inputs_embeds=embed(ids), attention_mask=torch.ones_like(ids), use_cache=False)
    return out.last_hidden_state if hasattr(out, "last_hidden_state") else out[0]
