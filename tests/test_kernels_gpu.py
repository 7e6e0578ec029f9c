"""The Triton kernels on a CUDA device, on the shapes of real models: LLaVA-1.5, Qwen2.5-VL, Gemma 3, a ViT."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.kernel_checks import MIXES, VAR, Case, Inputs, check_mass, check_segments
from vlm_attn import ops

pytestmark = pytest.mark.gpu
HALF = (torch.bfloat16, torch.float16)
PREFILL = [
    Case(kv_heads=32, queries=640, keys=640, head_dim=128, spread=2),
    Case(batch=2, kv_heads=4, group=7, queries=400, keys=400, head_dim=128, spread=2),
    Case(kv_heads=4, group=2, queries=300, keys=1300, head_dim=256),
    Case(kv_heads=16, queries=577, keys=577, head_dim=64, causal=False),
    Case(kv_heads=4, group=8, queries=129, keys=513, head_dim=80),
    Case(kv_heads=6, group=1, queries=200, keys=200, head_dim=96),
]
FEW_ROWS = [
    Case(kv_heads=32, queries=1, keys=2944, head_dim=128, spread=3),
    Case(batch=3, kv_heads=4, group=7, queries=1, keys=2944, head_dim=128, spread=3),
    Case(kv_heads=32, queries=64, keys=2944, head_dim=128, spread=2),
]


def in_dtype(case: Case, dtype: torch.dtype) -> Inputs:
    return Inputs.of(dataclasses.replace(case, dtype=dtype), "cuda")


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("case", PREFILL + FEW_ROWS, ids=str)
def test_mass(case: Case, dtype: torch.dtype) -> None:
    x = in_dtype(case, dtype)
    check_mass(x, all_rows=False, given=False, masked=True, gated=True, reduce_heads=True)
    check_mass(x, all_rows=True, given=True, masked=False, gated=False, reduce_heads=False)
    check_mass(x, all_rows=True, given=False, masked=True, gated=False, reduce_heads=False)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("case", PREFILL + FEW_ROWS, ids=str)
def test_segments(case: Case, dtype: torch.dtype) -> None:
    check_segments(in_dtype(case, dtype), VAR)


@pytest.mark.parametrize("name", sorted(MIXES))
@pytest.mark.parametrize("case", [PREFILL[1], FEW_ROWS[1]], ids=str)
def test_mixes(case: Case, name: str) -> None:
    check_segments(in_dtype(case, torch.bfloat16), MIXES[name])


@pytest.mark.parametrize("case", [PREFILL[1], PREFILL[4], FEW_ROWS[0]], ids=str)
def test_fp32(case: Case) -> None:
    x = in_dtype(case, torch.float32)
    check_mass(x, all_rows=True, given=False, masked=True, gated=False, reduce_heads=False)
    check_segments(x, VAR)


def test_kernels_run_not_the_reference() -> None:
    x = in_dtype(FEW_ROWS[0], torch.bfloat16)
    check_segments(x, VAR)
    for name in ("key_mass", "segment_attention"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"vlm_attn::{name}", "CUDA")


def test_mass_holds_no_matrix() -> None:
    """All rows of 4,096: rows x keys of 32 heads would be 2 GiB; inputs aside, a fraction is allocated."""
    x = in_dtype(Case(kv_heads=32, queries=4096, keys=4096, head_dim=64), torch.bfloat16)
    ops.key_mass(x.query, x.key, None, x.case.scaling)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ops.key_mass(x.query, x.key, None, x.case.scaling)
    assert torch.cuda.max_memory_allocated() - before < 16 * 2**20
