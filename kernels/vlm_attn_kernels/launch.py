"""How kernels are launched: tile shapes tuned per GPU, precision flags, splits of the keys."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# The interpreter computes tl.dot on bfloat16 wrongly: operands are widened there.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Compiler options, given with every launch: multiply and add in one instruction.
OPTIONS: dict[str, Any] = {} if INTERPRETED else {"enable_fp_fusion": True}
INTERPRETED_TILE = {"BLOCK_M": 32, "BLOCK_N": 64, "STAGES": 1}
MAX_HEAD_DIM = 256
# Fewest keys worth a program of their own where keys are split.
MIN_SPAN = 256
# Beyond this, by the estimate of Footprint.registers, the compiler was seen to spill to memory.
MAX_REGISTERS = 144
LOG2E = tl.constexpr(1.4426950408889634)
# Below every logit: a row that saw no key yet has this maximum, and no infinity is ever subtracted from another.
LOWEST = tl.constexpr(-1e30)


def config(rows: int, keys: int, warps: int, stages: int) -> triton.Config:
    """One tile shape: query rows x keys per step, and how many steps are loaded ahead."""
    return triton.Config({"BLOCK_M": rows, "BLOCK_N": keys, "STAGES": stages}, num_warps=warps, num_stages=stages)


@dataclass(frozen=True)
class Footprint:
    """What a program holds: one operand for good, ``streams`` others in ``STAGES`` copies, fp32 accumulators.

    Attributes:
        resident, streamed: the tile lengths of the operands, ``"BLOCK_M"`` or ``"BLOCK_N"``.
        streams: operands streamed. classes: accumulators of ``BLOCK_M x BLOCK_D``, from the compile-time arguments.
    """

    resident: str
    streamed: str
    streams: int
    classes: Callable[[Mapping[str, Any]], int] = lambda meta: 0

    def shared(self, meta: Mapping[str, Any], itemsize: int) -> int:
        """Shared memory in bytes, with room for reductions and row statistics."""
        tiles = meta[self.resident] + meta["STAGES"] * self.streams * meta[self.streamed]
        return meta["BLOCK_D"] * itemsize * tiles + 4096

    def registers(self, meta: Mapping[str, Any], warps: int) -> int:
        """Registers per thread that accumulators and one tile of logits and of weights take."""
        columns = self.classes(meta) * meta["BLOCK_D"] + 2 * meta["BLOCK_N"]
        return columns * meta["BLOCK_M"] // (32 * warps)

    def fitting(
        self, configs: list[triton.Config], meta: Mapping[str, Any], itemsize: int, limit: int
    ) -> list[triton.Config]:
        """The tile shapes within ``limit`` bytes of shared memory and without spills; the smallest if none is."""
        whole = {id(one): {**meta, **one.kwargs} for one in configs}
        found = [
            one
            for one in configs
            if self.shared(whole[id(one)], itemsize) <= limit
            and self.registers(whole[id(one)], one.num_warps) <= MAX_REGISTERS
        ]
        return found or [min(configs, key=lambda one: self.shared(whole[id(one)], itemsize))]


def tuned(kernel: Any, configs: list[triton.Config], key: list[str], footprint: Footprint) -> Any:
    """The kernel with its tile shape chosen by timing, among those that fit the GPU at hand."""

    def prune(options: list[triton.Config], named: dict[str, Any], **meta: Any) -> list[triton.Config]:
        tensor = named["query_ptr"]
        limit = torch.cuda.get_device_properties(tensor.device).shared_memory_per_block_optin
        return footprint.fitting(options, {**named, **meta}, tensor.element_size(), limit)

    return triton.autotune(configs, key=key, prune_configs_by={"early_config_prune": prune})(kernel)


def common(query: Tensor) -> dict[str, Any]:
    """Compile-time arguments every kernel takes."""
    width = query.shape[-1]
    return {"HEAD_DIM": width, "BLOCK_D": max(16, triton.next_power_of_2(width)), "WIDEN": INTERPRETED, **OPTIONS}


@functools.cache
def processors(device: torch.device) -> int:
    """Programs that run at once; a small number for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


def splits(programs: int, keys: int, device: torch.device) -> int:
    """Into how many spans, a power of two, to cut the keys so that a small grid fills the device (1: not at all)."""
    most = min(triton.cdiv(2 * processors(device), programs), keys // MIN_SPAN)
    return 1 << max(0, most.bit_length() - 1)


def span_of(keys: int, parts: int) -> int:
    """Keys per span, a multiple of every ``BLOCK_N``."""
    return triton.cdiv(triton.cdiv(keys, parts), 128) * 128


def strides(tensor: Tensor | None, count: int) -> tuple[int, ...]:
    """The first ``count`` strides, or zeros for an absent tensor."""
    return (0,) * count if tensor is None else tensor.stride()[:count]
