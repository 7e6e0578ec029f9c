"""The Triton kernels through the public operators, on the CPU under Triton's interpreter, on small shapes.

``TRITON_INTERPRET=1`` must be set before triton is imported, so these tests run in a process of their own, which
``test_kernels.py`` starts. By hand: ``TRITON_INTERPRET=1 pytest tests/test_kernels_triton.py``.
"""

from __future__ import annotations

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("test_kernels.py runs this module with TRITON_INTERPRET=1", allow_module_level=True)

import dataclasses

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vlm_attn
import vlm_attn_kernels
from tests.kernel_checks import ACT, ADHH, MIXES, VAR, Case, Inputs, check_mass, check_segments
from vlm_attn import ops
from vlm_attn.attention import columns, plans, rows
from vlm_attn.attention.call import Call
from vlm_attn.attention.labelled import Labelled
from vlm_attn_kernels import launch

vlm_attn_kernels.register("cpu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero encountered in log2:RuntimeWarning")

# Every head dimension, group sizes 1 to 8, every dtype; few programs, because one takes milliseconds.
SHAPES = [
    Case(batch=2, kv_heads=2, group=2, queries=20, keys=40, head_dim=64),
    Case(kv_heads=1, group=7, queries=5, keys=70, head_dim=80, dtype=torch.bfloat16),
    Case(kv_heads=3, group=1, queries=33, keys=33, head_dim=96, dtype=torch.float16),
    Case(kv_heads=1, group=4, queries=9, keys=90, head_dim=128, dtype=torch.bfloat16, spread=3),
    Case(kv_heads=1, group=8, queries=3, keys=50, head_dim=256, dtype=torch.float16),
    Case(batch=2, kv_heads=1, group=3, queries=12, keys=7, head_dim=64, dtype=torch.bfloat16, causal=False),
]


@pytest.fixture
def short_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the keys be split where they are few."""
    monkeypatch.setattr(launch, "MIN_SPAN", 64)


def test_kernels_are_dispatched() -> None:
    for name in ("key_mass", "segment_attention"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"vlm_attn::{name}", "CPU")
    assert launch.INTERPRETED


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_mass(case: Case) -> None:
    x = Inputs.of(case)
    check_mass(x, all_rows=False, given=False, masked=True, gated=True, reduce_heads=False)
    check_mass(x, all_rows=True, given=True, masked=False, gated=False, reduce_heads=True)


def test_mass_of_one_row_over_split_keys(short_spans: None) -> None:
    """The last row, as pruning asks for it; four spans, the last of which is empty."""
    case = Case(kv_heads=1, group=4, queries=1, keys=300, head_dim=64, dtype=torch.bfloat16, spread=2)
    assert launch.splits(1, 300, torch.device("cpu")) == 4
    check_mass(Inputs.of(case), all_rows=True, given=False, masked=True, gated=False, reduce_heads=True)


@pytest.mark.parametrize("name", MIXES)
@pytest.mark.parametrize("case", SHAPES[:2], ids=str)
def test_segments_tile(case: Case, name: str) -> None:
    check_segments(Inputs.of(case), MIXES[name])


@pytest.mark.parametrize("case", SHAPES[2:], ids=str)
def test_segments_shapes(case: Case) -> None:
    check_segments(Inputs.of(case), VAR)


@pytest.mark.parametrize("name", MIXES)
def test_segments_split(name: str, short_spans: None) -> None:
    """Decoding: one row per sample, keys in parallel spans."""
    case = Case(batch=2, kv_heads=1, group=7, queries=1, keys=300, head_dim=80, dtype=torch.bfloat16, spread=2)
    assert launch.splits(2, 300, torch.device("cpu")) == 4
    check_segments(Inputs.of(case), MIXES[name])


def test_segments_split_over_a_few_causal_rows(short_spans: None) -> None:
    case = Case(kv_heads=2, group=1, queries=17, keys=280, head_dim=64)
    check_segments(Inputs.of(case), VAR)


def test_segments_with_labels_per_head() -> None:
    case = Case(batch=2, kv_heads=1, group=3, queries=10, keys=40, head_dim=64)
    check_segments(Inputs.of(case, per_head=True), ACT)


def test_keys_without_a_label_are_text(short_spans: None) -> None:
    """Generated tokens come after the labels; both forms of the kernel."""
    for queries in (1, 40):
        x = Inputs.of(Case(kv_heads=1, group=2, queries=queries, keys=200, head_dim=64, hide=0))
        labels = torch.nn.functional.pad(x.labels[:, :150], (0, 50))
        whole = ops.segment_attention(x.query, x.key, x.value, labels, x.case.scaling, ADHH)
        short = ops.segment_attention(x.query, x.key, x.value, x.labels[:, :150], x.case.scaling, ADHH)
        assert all(torch.equal(a, b) for a, b in zip(whole, short, strict=True))


@pytest.mark.parametrize("queries", [1, 30])
def test_rows_that_see_nothing(queries: int, short_spans: None) -> None:
    """A sample of padding only gives zeros and -inf, no NaN, and no mass."""
    x = Inputs.of(Case(batch=2, kv_heads=1, queries=queries, keys=200, head_dim=64, dtype=torch.float16, hide=0))
    x.key_mask[1] = False
    x.labels[1] = ops.PAD
    check_segments(x, VAR)
    check_mass(x, all_rows=True, given=False, masked=True, gated=False, reduce_heads=False)
    assert (ops.key_mass(x.query, x.key, None, 0.1, key_mask=x.key_mask)[1] == 0).all()


def test_wide_heads_take_the_reference() -> None:
    x = Inputs.of(Case(queries=4, keys=9, head_dim=320))
    check_segments(x, VAR)
    check_mass(x, all_rows=False, given=False, masked=True, gated=True, reduce_heads=False)


SIZES = st.builds(
    Case,
    batch=st.integers(1, 2),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    queries=st.integers(1, 20),
    keys=st.integers(20, 140),
    head_dim=st.sampled_from([16, 64, 80, 96]),
    dtype=st.sampled_from(DTYPES),
    causal=st.booleans(),
    hide=st.sampled_from([0.0, 0.3, 1.0]),
    spread=st.sampled_from([1.0, 6.0]),
    seed=st.integers(0, 10**6),
)
FEW = settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@FEW
@given(case=SIZES, given_lse=st.booleans(), masked=st.booleans(), gated=st.booleans(), all_rows=st.booleans())
def test_mass_property(
    short_spans: None, case: Case, given_lse: bool, masked: bool, gated: bool, all_rows: bool
) -> None:
    check_mass(Inputs.of(case), all_rows=all_rows, given=given_lse, masked=masked, gated=gated, reduce_heads=False)


@FEW
@given(case=SIZES, name=st.sampled_from(sorted(MIXES)), per_head=st.booleans(), active=st.booleans())
def test_segments_property(short_spans: None, case: Case, name: str, per_head: bool, active: bool) -> None:
    check_segments(Inputs.of(case, per_head=per_head), MIXES[name], active)


# ------------------------------------------------------------------------------------------------- in the engine


def engine_call(queries: int = 40) -> Call:
    generator = torch.Generator().manual_seed(queries)
    q = torch.randn(2, 2, queries, 64, generator=generator)
    k, v = (torch.randn(2, 1, 40, 64, generator=generator) for _ in range(2))
    return Call(q, k, v, None, 0.125, True, None, None)


def sinks() -> tuple[Labelled, torch.Tensor]:
    """VAR with sinks among picture (slots 6 to 20) and text, and the rows behind the picture."""
    labels = torch.zeros(2, 40, dtype=torch.uint8)
    labels[:, 6:20], labels[:, 8], labels[0, 25] = 1, 2, 3
    edit = vlm_attn.method("var", sink_dims=(0,), tau=1.0, visual_mass_min=0.05, rho_nonsink=0.1)
    return Labelled.of(edit, labels), (torch.arange(40) >= 22).repeat(2, 1)  # type: ignore[arg-type]


def test_the_engine_edits_rows_with_the_segment_kernel() -> None:
    c, (item, gate) = engine_call(), sinks()
    out = rows.row_outputs(c.weights(torch.arange(40)), c.value).transpose(1, 2)
    got, count = plans.edit_rows(c, out, [(item, gate)])
    want, same = plans._edit_exact(c, out, torch.arange(22, 40), [(item, gate)])
    assert count == same > 0
    assert (want - out).abs().max() > 1e-3
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


def test_the_engine_decodes_with_the_segment_kernel() -> None:
    c, (item, _) = engine_call(queries=1), sinks()
    mask = torch.ones(2, 1, 1, 40, dtype=torch.bool)
    mask[1, ..., :3] = False
    c, gate = dataclasses.replace(c, mask=mask), torch.ones(2, 1, dtype=torch.bool)
    got, count = plans.edit_decode(c, [(item, gate)])
    weights = item.apply(c.weights(torch.zeros(1, dtype=torch.long)), gate[:, None, :, None])
    assert int(count()) == 4
    torch.testing.assert_close(got, rows.row_outputs(weights, c.value).transpose(1, 2), atol=1e-5, rtol=0)


def test_the_engine_adds_up_columns_and_edits_all_rows_with_kernels() -> None:
    c, heads = engine_call(), torch.tensor([1])
    valid = torch.ones(2, 40, dtype=torch.bool)
    means, lse = columns.column_means(c, valid, heads)
    dense = c.weights(torch.arange(40), heads)
    seen = torch.arange(40, 0, -1)
    torch.testing.assert_close(means, dense.sum(2) / seen, atol=1e-5, rtol=0)
    labels = torch.zeros(2, 2, 40, dtype=torch.uint8)
    labels[:, 1, [3, 5]] = 1
    edit = vlm_attn.method("act", heads="all")
    item = Labelled.of(edit, labels, torch.tensor([False, True]))  # type: ignore[arg-type]
    weights = c.weights(torch.arange(40))
    out = rows.row_outputs(weights, c.value).transpose(1, 2)
    got, count = columns.edit_labelled(c, out, item, heads, lse, valid)
    want = rows.row_outputs(item.apply(weights, valid[:, None, :, None]), c.value).transpose(1, 2)
    assert count == 2 * 37
    assert torch.equal(got[:, :, 0], out[:, :, 0])
    assert torch.equal(got[:, :3], out[:, :3])
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
