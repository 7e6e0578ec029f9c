"""Mechanics of token removal: before the language model, or between decoder layers, with ragged caches.

Original positions are kept, or the gaps are closed when a method renumbers. Samples that keep fewer tokens than the
longest one carry filler slots that nobody sees.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from .attention import masks
from .errors import UnsupportedError
from .families import Family
from .request import PruneStage, Request
from .selection import protected
from .tokens import TokenMap


def choose(tokens: TokenMap, keep: Tensor, keep_padding: bool) -> tuple[Tensor, Tensor]:
    """Slots to keep from the visual tokens a method wants.

    Args:
        tokens: roles of the ``N`` slots.
        keep: bool ``[B, N]``, wanted visual tokens.
        keep_padding: padding stays in place (before the language model, where the parent built the masks).

    Returns:
        ascending slot indices ``[B, n]`` and their validity.
    """
    if keep.shape != tokens.vis.shape or keep.dtype != torch.bool:
        raise ValueError(f"keep_mask must be bool {tuple(tokens.vis.shape)}, got {keep.dtype} {tuple(keep.shape)}")
    text = tokens.valid & ~tokens.vis
    wanted = (keep & tokens.vis) | text
    held = wanted | ~tokens.valid if keep_padding else wanted
    n = max(int(held.sum(1).max()), 1)
    rank = torch.where(held, 0, torch.where(tokens.valid, 2, 1))
    idx = torch.argsort(rank, dim=1, stable=True)[:, :n].sort(dim=1).values
    return idx, wanted.gather(1, idx)


def stage(tokens: TokenMap, keep: Tensor, layer: int, previous: PruneStage | None) -> tuple[PruneStage, Tensor] | None:
    """The stage after keeping ``keep`` of ``tokens``, and its slots relative to ``tokens``; None if all stay.

    Tokens that frame a picture stay, whatever ``keep`` says.
    """
    keep = keep | protected(tokens)
    if bool((keep | ~tokens.vis).all()):
        return None
    relative, valid = choose(tokens, keep, keep_padding=layer == 0)
    inside = previous is not None and layer > 0 and previous.layer > 0
    idx = previous.idx.gather(1, relative) if inside and previous is not None else relative
    return PruneStage(layer, idx, valid, tokens.gather(relative, valid)), relative


def renumbered(stage: PruneStage, entered: TokenMap) -> PruneStage:
    """The stage with the tokens counted that left in front of each slot, so that positions can close the gaps.

    Args:
        entered: roles of the sequence that ``stage.idx`` counts in.
    """
    there, here = entered.vis.long(), stage.tokens.vis.long()
    before = (there.cumsum(1) - there).gather(1, stage.idx) - (here.cumsum(1) - here)
    return dataclasses.replace(stage, before=before, gone=there.sum(1) - here.sum(1))


def rotary(family: Family, hidden: Tensor, positions: Any, tables: Any = None) -> Any:
    """Rotary tables of ``positions [B or 1, n]`` from the decoder's own module.

    Args:
        tables: the model's tables of these positions; the module must reproduce them.

    Raises:
        UnsupportedError: it does not, so positions cannot be renumbered on this family.
    """
    reason = f"{family.name}: positions cannot be renumbered on this family; use positions='keep'"
    module = getattr(family.lm, "rotary_emb", None)
    if module is None or not isinstance(positions, Tensor) or positions.dim() != 2:
        raise UnsupportedError(reason)
    try:
        made = module(hidden, positions)
    except (TypeError, ValueError, RuntimeError, AttributeError, KeyError) as error:
        raise UnsupportedError(reason) from error
    if tables is not None:
        same = isinstance(tables, tuple) and len(tables) == len(made)
        if not same or any(a.shape != b.shape or not torch.allclose(a, b) for a, b in zip(made, tables)):
            raise UnsupportedError(reason)
    return made


def shift_prefill(pruned: PruneStage, family: Family, hidden: Tensor, before: Any, after: dict[str, Any]) -> None:
    """Closes the gaps in the positions of a prefill from layer ``pruned.layer > 0`` on.

    Args:
        hidden: kept hidden states ``[B, n, D]``.
        before: layer arguments over the whole sequence.
        after: layer arguments on the kept slots; changed in place.
    """
    if "tables" not in pruned.shifted:
        rotary(family, hidden, before.get("position_ids"), before.get("position_embeddings"))
        positions = after["position_ids"] - pruned.before
        pruned.shifted["tables"] = positions, rotary(family, hidden, positions)
    after["position_ids"], after["position_embeddings"] = pruned.shifted["tables"]


def shift_decode(pruned: PruneStage, family: Family, hidden: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Layer arguments of later calls at renumbered positions."""
    if pruned.gone is None or pruned.layer == 0:
        return kwargs
    positions = kwargs["position_ids"] - pruned.gone[:, None]
    return {**kwargs, "position_ids": positions, "position_embeddings": rotary(family, hidden, positions)}


def take(x: Tensor, idx: Tensor) -> Tensor:
    """Gathers slots ``idx [B, n]`` of ``x [B or 1, N, ...]``."""
    x = x.expand(idx.shape[0], *x.shape[1:])
    shaped = idx.reshape(*idx.shape, *([1] * (x.dim() - 2))).expand(*idx.shape, *x.shape[2:])
    return x.gather(1, shaped)


def last_axis(x: Tensor, idx: Tensor) -> Tensor:
    """Gathers slots of position ids ``[B or 1, N]`` or ``[planes, B or 1, N]``."""
    if x.dim() == 2:
        return take(x, idx)
    return torch.stack([take(plane, idx) for plane in x])


def compact(stage: PruneStage, cache: Any, layers: Iterable[int]) -> None:
    """Drops from the cache of some layers, which hold the whole prompt, what left at ``stage``.

    Raises:
        UnsupportedError: a cache that does not grow (its slots cannot be dropped).
    """
    for number in layers:
        layer = cache.layers[number]
        if not isinstance(layer, DynamicLayer):
            raise UnsupportedError(
                f"a {type(layer).__name__} cannot be shortened: use a DynamicCache, or compact=False"
            )
        layer.keys, layer.values = (
            take(x.transpose(1, 2), stage.idx).transpose(1, 2) for x in (layer.keys, layer.values)
        )


def prefill_inputs(
    pruned: PruneStage,
    kwargs: dict[str, Any],
    backend: str,
    dtype: torch.dtype,
    causal: bool,
    along: Sequence[str] = ("position_embeddings", "position_ids"),
) -> dict[str, Any]:
    """Decoder-layer arguments of the prefill on the kept slots (tables and masks are gathered once per stage).

    Args:
        along: names of the arguments that run along the sequence: tensors ``[B or 1, N, ...]``, position ids with
            planes in front, or tuples of tensors.
    """
    out = dict(kwargs)
    mask = kwargs.get("attention_mask")

    def once(value: Any, make: Any) -> Any:
        # Keyed by identity and kept alive beside the result, so that an id cannot be reused within the request.
        if id(value) not in pruned.cache:
            pruned.cache[id(value)] = (value, make())
        return pruned.cache[id(value)][1]

    for name in along:
        value = kwargs.get(name)
        if value is not None:
            out[name] = once(value, functools.partial(_along_sequence, name, value, pruned.idx))
    out["attention_mask"] = once(mask, lambda: masks.gather(mask, pruned.idx, pruned.valid, backend, dtype, causal))
    return out


def _along_sequence(name: str, value: Any, idx: Tensor) -> Any:
    if isinstance(value, tuple):
        return tuple(take(part, idx) for part in value)
    return last_axis(value, idx) if name == "position_ids" else take(value, idx)


def decode_mask(pruned: PruneStage, queries: int, past: int, backend: str, dtype: torch.dtype) -> Tensor | None:
    """Mask of later calls in a layer whose cache starts with the kept slots."""
    return masks.decode(pruned.valid, queries, past, backend, dtype)


def lm_prefill(pruned: PruneStage, kwargs: dict[str, Any], backend: str) -> dict[str, Any]:
    """Language-model arguments of the prefill when tokens leave before layer 0."""
    out = dict(kwargs)
    embeds = kwargs["inputs_embeds"]
    length = embeds.shape[1]
    positions = kwargs.get("position_ids")
    if positions is None:
        positions = torch.arange(length, device=embeds.device)[None]
    out["inputs_embeds"] = take(embeds, pruned.idx)
    out["position_ids"] = last_axis(positions, pruned.idx)
    if pruned.before is not None:
        if positions.dim() != 2:
            raise UnsupportedError("positions of several planes (M-RoPE) cannot be renumbered; use positions='keep'")
        out["position_ids"] = out["position_ids"] - pruned.before
    mask = kwargs.get("attention_mask")

    def gathered(given: Any) -> Any:
        # Masks that the parent model built (bidirectional prefixes, sliding layers).
        return masks.gather(given, pruned.idx, pruned.valid, backend, embeds.dtype, True)

    # Always explicit: gaps in the position ids would otherwise be read as several packed sequences.
    if mask is None:
        out["attention_mask"] = pruned.valid.long()
    elif isinstance(mask, dict):
        out["attention_mask"] = {name: gathered(given) for name, given in mask.items()}
    elif isinstance(mask, Tensor) and mask.dim() == 2:
        out["attention_mask"] = take(mask, pruned.idx) * pruned.valid
    else:
        out["attention_mask"] = gathered(mask)
    return out


def lm_decode(
    pruned: PruneStage, request: Request, kwargs: dict[str, Any], past: int, positions_given: bool = True
) -> dict[str, Any]:
    """Language-model arguments of later calls when tokens left before layer 0.

    Args:
        positions_given: whether the caller named positions; else the model counted them from the shortened cache.
    """
    out = dict(kwargs)
    rows = kwargs.get("inputs_embeds")
    rows = kwargs["input_ids"] if rows is None else rows
    b, queries = rows.shape[:2]
    length = request.tokens.length
    mask = kwargs.get("attention_mask")
    new = past + queries - pruned.idx.shape[1]
    if isinstance(mask, Tensor) and mask.dim() == 2:
        head = take(mask[:, :length], pruned.idx) * pruned.valid
        out["attention_mask"] = torch.cat([head, mask[:, mask.shape[1] - new :]], dim=1)
    elif mask is None:
        valid = pruned.valid.long()
        out["attention_mask"] = torch.cat([valid, valid.new_ones(b, new)], dim=1)
    missing = length - pruned.idx.shape[1]
    if kwargs.get("position_ids") is None:
        out["position_ids"] = torch.arange(past + missing, past + missing + queries, device=rows.device)[None]
    elif not positions_given:
        out["position_ids"] = kwargs["position_ids"] + missing
    if pruned.gone is not None:
        out["position_ids"] = out["position_ids"] - pruned.gone[:, None]
    return out


def visible(tokens: TokenMap, family: Family, processor: Any, sizes: list[list[tuple[int, int]]] | None) -> Tensor:
    """bool ``[B, N]``, False at visual tokens that show only padding.

    Args:
        processor: the model's processor; its image processor says whether pictures are padded at all.
        sizes: original (width, height) per sample and image; only needed when it pads.

    Raises:
        UnsupportedError: the processor or the sizes are needed and not known.
    """
    image_processor = getattr(processor, "image_processor", processor)
    if image_processor is None:
        raise UnsupportedError("pad_mask needs the processor: attach(model, method, processor=...) or vlm_attn.wrap")
    out = torch.ones_like(tokens.vis)
    if not getattr(image_processor, "do_pad", False):
        return out
    if not sizes or tokens.batch % len(sizes):
        raise UnsupportedError(
            "pad_mask on a padding processor needs the original picture sizes: use vlm.ask(...), or set "
            "session.image_sizes = [[(width, height), ...] per sample] before generate"
        )
    copies = tokens.batch // len(sizes)  # beams and several return sequences repeat each sample
    for row in range(tokens.batch):
        for image, (size, layout) in enumerate(zip(sizes[row // copies], tokens.layouts[row], strict=True)):
            mine = tokens.vis[row] & (tokens.img_id[row] == image)
            for view, box in enumerate(family.geometry(image_processor, size, layout)):
                slots = (mine & (tokens.frame[row] == view)).nonzero()[:, 0]
                cells = tokens.cell[row, slots]
                out[row, slots] = box.visible().to(out.device)[cells[:, 0], cells[:, 1]]
    return out
