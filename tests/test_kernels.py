"""The operators of `vlm_attn.ops`: references against dense fp64 definitions, dispatch, refusals, and the kernels.

Kernels run under Triton's interpreter in a process of their own; tile shapes are compiled for GPUs that are not there.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from tests.kernel_checks import ACT, MIXES, VAR, Case, Inputs, check_mass, check_segments
from vlm_attn import ops
from vlm_attn.attention import rows

ROOT = Path(__file__).resolve().parents[1]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

CASES = st.builds(
    Case,
    batch=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 8),
    queries=st.integers(1, 30),
    keys=st.integers(30, 90),
    head_dim=st.sampled_from([8, 64, 80]),
    dtype=st.sampled_from(ops.DTYPES),
    causal=st.booleans(),
    hide=st.sampled_from([0.0, 0.3, 1.0]),
    spread=st.sampled_from([1.0, 6.0]),
    seed=st.integers(0, 10**6),
)

# ---------------------------------------------------------------------------------------------------- references


@settings(max_examples=40, deadline=None)
@given(case=CASES, options=st.tuples(*[st.booleans()] * 5), chunk=st.sampled_from([1, 1 << 24]))
def test_mass_reference(case: Case, options: tuple[bool, ...], chunk: int) -> None:
    names = ("all_rows", "given", "masked", "gated", "reduce_heads")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "CHUNK_ELEMENTS", chunk)
        patch.setattr(rows, "BLOCK_ELEMENTS", chunk)
        check_mass(Inputs.of(case), **dict(zip(names, options, strict=True)))


@pytest.mark.parametrize("lse", [float("-inf"), -1e9, float("nan")])
def test_a_row_that_is_left_out_may_have_any_lse(lse: float) -> None:
    x = Inputs.of(Case(queries=12, keys=12, hide=0))
    gate = torch.ones(x.query.shape[0], 12, dtype=torch.bool)
    gate[:, 3] = False
    given = torch.zeros(x.query.shape[:3])
    expected = ops.key_mass(x.query, x.key, None, x.case.scaling, given, gate=gate)
    given[:, :, 3] = lse
    assert torch.equal(ops.key_mass(x.query, x.key, None, x.case.scaling, given, gate=gate), expected)


@settings(max_examples=40, deadline=None)
@given(case=CASES, name=st.sampled_from(sorted(MIXES)), per_head=st.booleans(), active=st.booleans())
def test_segments_reference(case: Case, name: str, per_head: bool, active: bool) -> None:
    check_segments(Inputs.of(case, per_head=per_head), MIXES[name], active)


def test_keep_one_changes_nothing() -> None:
    x = Inputs.of(Case())
    plain = ops.segment_attention(x.query, x.key, x.value, x.labels, x.case.scaling)
    neutral = ops.segment_attention(
        x.query, x.key, x.value, x.labels, x.case.scaling, ops.Mix(donors=(1, 3), receivers=(2,), keep=1.0)
    )
    assert all(torch.equal(a, b) for a, b in zip(plain, neutral, strict=True))


def test_a_row_in_the_middle_of_a_longer_cache_stands_where_it_stands() -> None:
    """Rows are the last of the keys: one row alone, or the tail of the prompt, equals its part of the whole."""
    x = Inputs.of(Case(queries=40, keys=40, hide=0))
    whole = ops.segment_attention(x.query, x.key, x.value, x.labels, x.case.scaling, VAR)
    tail = ops.segment_attention(x.query[:, :, 33:], x.key, x.value, x.labels, x.case.scaling, VAR)
    assert torch.allclose(whole.output[:, :, 33:], tail.output, atol=1e-6)
    mass = ops.key_mass(x.query, x.key, torch.tensor([39]), x.case.scaling)
    assert torch.allclose(mass, ops.key_mass(x.query[:, :, 39:], x.key, None, x.case.scaling), atol=1e-6)


def test_nothing_to_do() -> None:
    x = Inputs.of(Case())
    nobody = torch.empty(0, dtype=torch.long)
    assert (ops.key_mass(x.query, x.key, nobody, 1.0) == 0).all()
    empty = ops.segment_attention(x.query, x.key[:, :, :0], x.value[:, :, :0], x.labels[:, :0], 1.0, causal=False)
    assert (empty.output == 0).all()
    assert (empty.segment_lse == -torch.inf).all()


# ----------------------------------------------------------------------------------------- torch.library, dispatch


@pytest.mark.parametrize("reduce_heads", [False, True])
def test_shapes_are_known_without_computing(reduce_heads: bool) -> None:
    """Fake tensors, which torch.compile traces with, have the shapes, strides and dtypes of the result."""
    x = Inputs.of(Case(group=2))
    real = [ops.key_mass(x.query, x.key, x.rows, 0.1, reduce_heads=reduce_heads)]
    real += ops.segment_attention(x.query, x.key, x.value, x.labels, 0.1, VAR)
    with FakeTensorMode() as mode:
        query, key, value, labels = (mode.from_tensor(t) for t in (x.query, x.key, x.value, x.labels))
        fake = [ops.key_mass(query, key, mode.from_tensor(x.rows), 0.1, reduce_heads=reduce_heads)]
        fake += ops.segment_attention(query, key, value, labels, 0.1, VAR)
    for one, other in zip(real, fake, strict=True):
        assert isinstance(other, FakeTensor)
        assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)


def test_output_keeps_the_layout_of_the_query() -> None:
    """Heads inside positions, so that handing the output to o_proj copies nothing."""
    x = Inputs.of(Case())
    found = ops.segment_attention(x.query, x.key, x.value, x.labels, 0.1)
    assert found.output.stride() == x.query.stride()


def test_kernels_are_an_entry_point() -> None:
    points = entry_points(group=ops.GROUP)
    assert {(point.name, point.value) for point in points} == {("cuda", "vlm_attn_kernels:register")}


class _Broken:
    def load(self) -> None:
        raise ImportError("No module named 'triton'")


def test_missing_kernels_are_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "entry_points", lambda **_: [_Broken()])
    ops.load_kernels.cache_clear()
    x = Inputs.of(Case())
    try:
        with pytest.warns(UserWarning, match="No module named 'triton'.*vlm-attn\\[gpu\\]") as seen:
            for _ in range(2):
                check_segments(x, ACT)
        assert len(seen) == 1
    finally:
        ops.load_kernels.cache_clear()


def test_references_run_in_place_of_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    x = Inputs.of(Case())
    mass = ops.key_mass(x.query, x.key, None, 0.1)
    labelled = ops.segment_attention(x.query, x.key, x.value, x.labels, 0.1)
    monkeypatch.setattr(ops, "_ACCELERATED", {"cpu"})
    monkeypatch.setattr(ops, "key_mass_reference", lambda *_: "reference")
    monkeypatch.setattr(ops, "segment_attention_reference", lambda *_: "abc")
    with pytest.raises(KeyError), ops.references():
        assert not ops.accelerated("cpu")
        assert ops.key_mass(x.query, x.key, None, 0.1) == "reference"
        assert ops.segment_attention(x.query, x.key, x.value, x.labels, 0.1) == ("a", "b", "c")
        raise KeyError
    assert ops.accelerated("cpu")
    assert torch.equal(ops.key_mass(x.query, x.key, None, 0.1), mass)
    assert torch.equal(ops.segment_attention(x.query, x.key, x.value, x.labels, 0.1).output, labelled.output)


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(1, 3, 20, 64)}, "multiple of the key heads"),
        ({"query": torch.zeros(1, 2, 50, 64)}, "at least as many keys"),
        ({"query": torch.zeros(2, 20, 64)}, "heads, length"),
        ({"query": torch.zeros(1, 2, 20, 64, dtype=torch.float64)}, "share one of"),
        ({"rows": torch.tensor([-1])}, "not all in 0..19"),
        ({"rows": torch.tensor([20])}, "not all in 0..19"),
        ({"rows": torch.tensor([True])}, "integer vector"),
        ({"lse": torch.zeros(1, 2, 5)}, "lse must be"),
        ({"key_mask": torch.ones(1, 40)}, "key_mask must be torch.bool"),
        ({"gate": torch.ones(1, 3, dtype=torch.bool)}, "gate must be"),
    ],
)
def test_mass_refuses(change: dict[str, torch.Tensor], message: str) -> None:
    x = Inputs.of(Case())
    args = {"query": x.query, "key": x.key, "rows": None, "scaling": 0.1, **change}
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        ops.key_mass(**args)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": torch.zeros(1, 2, 40, 32)}, "must be like key"),
        ({"labels": torch.zeros(1, 40)}, "labels must be uint8"),
        ({"labels": torch.zeros(1, 41, dtype=torch.uint8)}, "n <= 40"),
        ({"labels": torch.zeros(1, 3, 40, dtype=torch.uint8)}, "labels must be uint8"),
        ({"active": torch.zeros(1, 2, 20)}, "active must be bool"),
    ],
)
def test_segments_refuse(change: dict[str, torch.Tensor], message: str) -> None:
    x = Inputs.of(Case())
    args = {"query": x.query, "key": x.key, "value": x.value, "labels": x.labels, "scaling": 0.1, **change}
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        ops.segment_attention(**args)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"donors": ()}, "needs donors"),
        ({"donors": (4,)}, "0..3"),
        ({"donors": (1,), "receivers": (1, 2)}, "donor and receiver"),
        ({"donors": (1,), "keep": 1.5}, "keep=1.5"),
    ],
)
def test_mix_refuses(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        ops.Mix(**fields)  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------------------------- kernels


def _release(package: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version(package).split(".")[:2])


@needs_triton
@pytest.mark.timeout(900)
def test_kernels_under_the_interpreter() -> None:
    """Runs `test_kernels_triton.py` where the variable is set before triton is imported."""
    if _release("triton") < (3, 9) and _release("numpy") >= (2, 4):
        pytest.skip("the interpreter of this triton cannot read scalars of numpy >= 2.4")
    run = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-x"]
    result = subprocess.run(
        [*run, "tests/test_kernels_triton.py"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    report = result.stdout + result.stderr
    assert result.returncode == 0, report
    passed = re.search(r"(\d+) passed", report)
    assert passed is not None, report
    assert int(passed[1]) >= 30
    assert "skipped" not in report


@needs_triton
@pytest.mark.timeout(900)
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels cannot be compiled")
@pytest.mark.parametrize(("name", "capability"), [("key_mass", 90), ("segments", 90), ("segments_split", 80)])
def test_tiles_compile_and_fit(name: str, capability: int) -> None:
    """Compiled for Hopper and Ampere, the largest shape tried stays in shared memory, loads ahead, hardly spills."""
    from vlm_attn_kernels import offline

    tried = offline.options(name, capability, head_dim=128)
    assert len(tried) >= 4
    built = offline.build(
        name, max(tried, key=lambda one: one.kwargs["BLOCK_N"] * one.kwargs["STAGES"]), capability, 128
    )
    assert built.shared <= offline.SHARED_MEMORY[capability]
    assert built.copies > 0
    assert built.spilled <= 64


@needs_triton
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels cannot be compiled")
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_every_gpu_has_tiles(head_dim: int, itemsize: int) -> None:
    from vlm_attn_kernels import offline

    for capability in offline.SHARED_MEMORY:
        for name, kernel in offline.KERNELS.items():
            meta = {**kernel.meta, "BLOCK_D": 128 if head_dim in (80, 96) else head_dim}
            for one in offline.options(name, capability, head_dim, itemsize):
                assert kernel.footprint.shared({**meta, **one.kwargs}, itemsize) <= offline.SHARED_MEMORY[capability]
