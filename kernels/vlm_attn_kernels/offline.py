"""Compiles the kernels for GPUs that are not there: does a tile shape fit, and does it spill?

Triton brings NVIDIA's assembler along, so registers, spilled bytes and shared memory of every tile shape are known
without a device. Run times are not.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import mass, segments
from .launch import OPTIONS, Footprint

# Shared memory one program may take, in bytes, by compute capability.
SHARED_MEMORY = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448}
FLOATS = ("scaling", "moved", "gate_min", "share_min")
VAR = {"DONORS": 0b1010, "RECEIVERS": 0b0100, "GATE": 0b1100, "ACTIVE": True}
PLAIN = {"DONORS": 0, "RECEIVERS": 0, "GATE": 0, "ACTIVE": False}


@dataclass(frozen=True)
class Kernel:
    """One kernel with the compile-time arguments of one use, and the tile shapes it is tuned over."""

    function: Any
    configs: list[triton.Config]
    footprint: Footprint
    meta: dict[str, Any]
    absent: tuple[str, ...] = ()


KERNELS = {
    "row_lse": Kernel(
        mass.row_lse_kernel,
        mass.LSE_CONFIGS,
        mass.LSE_FOOTPRINT,
        {"CAUSAL": True, "ALL_ROWS": False, "MASKED": True},
    ),
    "key_mass": Kernel(
        mass.key_mass_kernel,
        mass.MASS_CONFIGS,
        mass.MASS_FOOTPRINT,
        {"CAUSAL": True, "ALL_ROWS": False, "GATED": True, "MASKED": True, "GIVEN": False, "PARTS": 4},
    ),
    "segments": Kernel(
        segments.segment_kernel,
        segments.TILE_CONFIGS,
        segments.FOOTPRINT,
        {"CAUSAL": True, "SPLIT": False, **VAR},
        ("partial_ptr",),
    ),
    "segments_plain": Kernel(
        segments.segment_kernel,
        segments.TILE_CONFIGS,
        segments.FOOTPRINT,
        {"CAUSAL": True, "SPLIT": False, **PLAIN},
        ("partial_ptr", "active_ptr"),
    ),
    "segments_split": Kernel(
        segments.segment_kernel,
        segments.SPLIT_CONFIGS,
        segments.FOOTPRINT,
        {"CAUSAL": True, "SPLIT": True, "BLOCK_M": 16, **VAR},
        ("words_ptr",),
    ),
}


@dataclass(frozen=True)
class Build:
    """What the assembler says of one tile shape: bytes of shared memory, registers, bytes spilled per thread.

    ``copies`` counts asynchronous copies into shared memory in the intermediate code: 0 means loads are not pipelined.
    """

    shape: str
    shared: int
    registers: int
    spilled: int
    copies: int


def options(name: str, capability: int, head_dim: int, itemsize: int = 2) -> list[triton.Config]:
    """The tile shapes of a kernel that its tuner would try on a GPU of this compute capability."""
    kernel = KERNELS[name]
    meta = {**kernel.meta, "BLOCK_D": triton.next_power_of_2(head_dim)}
    return kernel.footprint.fitting(kernel.configs, meta, itemsize, SHARED_MEMORY[capability])


def builds(name: str, capability: int, head_dim: int, dtype: str = "bf16") -> Iterator[Build]:
    """Compiles every tile shape that fits, one after the other."""
    for one in options(name, capability, head_dim, 4 if dtype == "fp32" else 2):
        yield build(name, one, capability, head_dim, dtype)


def build(name: str, one: triton.Config, capability: int, head_dim: int, dtype: str = "bf16") -> Build:
    """Compiles one tile shape of one kernel."""
    kernel = KERNELS[name]
    width = triton.next_power_of_2(head_dim)
    fixed = {**kernel.meta, **one.kwargs, "HEAD_DIM": head_dim, "BLOCK_D": width, "WIDEN": False}
    source = _source(kernel, fixed, dtype)
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target, {**OPTIONS, "num_warps": one.num_warps, "num_stages": one.num_stages})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+).* LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump did not report the resources of {name}: {usage.strip()}")
    registers, stack, local = map(int, found.groups())
    copies = compiled.asm["ttgir"].count("async_copy_global_to_local")
    return Build(str(one), compiled.metadata.shared, registers, stack + local, copies)


def _source(kernel: Kernel, fixed: dict[str, Any], dtype: str) -> ASTSource:
    """The kernel with argument types as in a call on contiguous, aligned tensors."""
    pointers = dict.fromkeys(("query_ptr", "key_ptr", "value_ptr", "out_ptr"), dtype)
    pointers |= {"rows_ptr": "i64", "words_ptr": "i32", "labels_ptr": "u8", "active_ptr": "i1"}
    pointers |= {"gate_ptr": "i1", "mask_ptr": "i1"}
    signature, constants, attributes = {}, {}, {}
    for i, argument in enumerate(kernel.function.arg_names):
        if argument in fixed or argument in kernel.absent or argument.endswith(("_d", "labels_n", "mask_n", "gate_m")):
            signature[argument] = "constexpr"
            constants[(i,)] = fixed.get(argument, None if argument in kernel.absent else 1)
        elif argument.endswith("_ptr"):
            signature[argument] = "*" + pointers.get(argument, "fp32")
        else:
            signature[argument] = "fp32" if argument in FLOATS else "i32"
        if argument.endswith("_ptr") or re.fullmatch(r"[a-z]+_[bhmns]|span|size_class", argument):
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(
        kernel.function, signature, constants, {k: v for k, v in attributes.items() if k not in constants}
    )
