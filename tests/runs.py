"""Running models the same way everywhere: greedy generation, a hand-written cached loop, fingerprints of a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

STEPS = 6


def greedy(model: Any, inputs: dict[str, Tensor], steps: int = STEPS, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """New tokens `[B, steps]`, raw logits and processed scores `[steps, B, V]` of greedy `generate`."""
    out = model.generate(
        **inputs, max_new_tokens=steps, do_sample=False, return_dict_in_generate=True, output_logits=True,
        output_scores=True, **kwargs,
    )  # fmt: skip
    return out.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(out.logits), torch.stack(out.scores)


def manual(model: Any, inputs: dict[str, Tensor], forced: Tensor) -> Tensor:
    """Logits `[1 + n, B, V]` of a prefill and of `n` forced tokens `[B, n]`, through `forward` and a cache."""
    cache = DynamicCache(config=model.config.get_text_config())
    mask = inputs["attention_mask"]
    position = (mask.cumsum(1) - 1).clamp(min=0)
    out = model(**inputs, position_ids=position, past_key_values=cache, use_cache=True, logits_to_keep=1)
    rows = [out.logits[:, -1]]
    position = position[:, -1:]
    for step in range(forced.shape[1]):
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        position = position + 1
        out = model(
            input_ids=forced[:, step : step + 1], attention_mask=mask, position_ids=position, past_key_values=cache,
            use_cache=True,
        )  # fmt: skip
        rows.append(out.logits[:, -1])
    return torch.stack(rows)


def distance(left: Tensor, right: Tensor) -> float:
    """Largest difference relative to the scale of `right`; infinities must stand at the same places."""
    finite = right.isfinite()
    if not torch.equal(finite, left.isfinite()):
        return float("inf")
    return float((left[finite] - right[finite]).abs().max() / right[finite].abs().max())


HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks",
)  # fmt: skip


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """All a session could leave behind: hooks, attributes, classes, attention implementations, configurations."""
    mark: dict[str, Any] = {}
    for name, module in model.named_modules():
        mark[name] = (
            type(module),
            tuple(len(getattr(module, hook)) for hook in HOOKS),
            tuple(sorted(module.__dict__)),
            getattr(getattr(module, "config", None), "_attn_implementation", None),
            id(getattr(module.forward, "__func__", module.forward)),
        )
    mark["generate"] = getattr(model.generate, "__func__", model.generate)
    mark["generation_config"] = model.generation_config.to_dict()
    mark["config"] = model.config.to_dict()
    mark["training"] = model.training
    mark["weights"] = {name: (value.data_ptr(), value._version) for name, value in model.named_parameters()}
    return mark
