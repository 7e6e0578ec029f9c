"""Speed of the Triton kernels against the torch reference, SDPA alone, FlexAttention and the roofline.

    python benchmarks/kernels.py                  # key mass and segment attention, needs a CUDA device
    python benchmarks/kernels.py --part gather    # what torch indexing costs in pruning; runs on the CPU too
    python benchmarks/kernels.py --part builds    # registers, spills, shared memory per tile shape; needs no GPU
    python benchmarks/kernels.py --json > kernels.json

The roofline is that of the device at hand: bandwidth of a large copy and rate of a large bf16 matrix product are
measured first. A bound is the larger of (bytes that must move once) / bandwidth and FLOPs / rate; exponentials are not
counted. Times are medians over repetitions with a cold L2 cache.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vlm_attn import ops

VAR = ops.Mix(donors=(1, 3), receivers=(2,), keep=0.6, gate=(2, 3), gate_min=0.2, share_min=0.5)


@dataclass(frozen=True)
class Shape:
    """One attention call, batch 1, bf16."""

    name: str
    heads: int
    kv_heads: int
    keys: int
    head_dim: int


SHAPES = [
    Shape("LLaVA-1.5-7B", 32, 32, 640, 128),
    Shape("LLaVA-1.5-7B", 32, 32, 2944, 128),
    Shape("Qwen2.5-VL-7B", 28, 4, 2944, 128),
    Shape("Gemma-3-4B", 8, 4, 1300, 256),
]


@dataclass
class Row:
    """One line: times in microseconds; None where the comparison does not apply."""

    operator: str
    shape: str
    rows: int
    kernel: float
    reference: float
    sdpa: float
    flex: float | str
    bound: float
    bound_by: str

    @property
    def of_bound(self) -> float:
        """Share of the roofline that the kernel reaches."""
        return self.bound / self.kernel


def median(run: Callable[[], object]) -> float:
    """Microseconds on the GPU."""
    from triton.testing import do_bench

    return 1000 * float(do_bench(run, return_mode="median"))


@functools.cache
def peaks() -> tuple[float, float]:
    """Measured bytes per second of a copy and FLOPs per second of a bf16 matrix product."""
    block = torch.empty(1 << 29, dtype=torch.bfloat16, device="cuda")
    bandwidth = 2 * block.numel() * block.element_size() / median(lambda: block.clone()) * 1e6
    a = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    return bandwidth, 2 * 8192**3 / median(lambda: a @ a) * 1e6


def bound(size: int, flops: float) -> tuple[float, str]:
    """Least time in microseconds, and by what."""
    bandwidth, rate = peaks()
    by_bytes, by_flops = size / bandwidth * 1e6, flops / rate * 1e6
    return max(by_bytes, by_flops), "bytes" if by_bytes >= by_flops else "FLOPs"


def inputs(shape: Shape, rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query of the last ``rows`` positions, key, value, and labels of a prompt: 35 text, picture, text."""
    torch.manual_seed(0)

    def normal(heads: int, length: int) -> Tensor:
        return torch.randn(1, length, heads, shape.head_dim, dtype=torch.bfloat16, device="cuda").transpose(1, 2)

    labels = torch.zeros(1, shape.keys, dtype=torch.uint8, device="cuda")
    labels[:, 35:-29] = ops.VISUAL
    labels[:, 100:-29:211] = ops.VISUAL_SINK
    labels[:, 0] = ops.TEXT_SINK
    return normal(shape.heads, rows), normal(shape.kv_heads, shape.keys), normal(shape.kv_heads, shape.keys), labels


def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Callable[[], object]:
    """Fused attention alone. A few last rows run without a mask: they see nearly every key."""
    causal = query.shape[2] == key.shape[2]
    return lambda: F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True)


def flex(query: Tensor, key: Tensor, value: Tensor) -> float | str:
    """Compiled FlexAttention with causal block mask, returning the LSE; or why it did not run."""
    from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

    offset = key.shape[2] - query.shape[2]
    try:
        mask = create_block_mask(
            lambda b, h, i, j: j <= i + offset, None, None, query.shape[2], key.shape[2], device="cuda"
        )
        compiled = torch.compile(flex_attention, dynamic=False)
        run = functools.partial(compiled, query, key, value, block_mask=mask, enable_gqa=True)
        return median(lambda: run(return_aux=AuxRequest(lse=True)))
    except Exception as error:  # a comparison that fails must not cost the other figures
        return f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"


def pairs(rows: int, keys: int) -> int:
    """(row, key) pairs that a causal mask leaves of the last ``rows`` rows."""
    return rows * keys - rows * (rows - 1) // 2


def key_mass_rows() -> Iterator[Row]:
    """Last row, 64 rows and all rows; LSE computed and LSE given."""
    for shape in SHAPES:
        for count in (1, 64, shape.keys):
            query, key, value, _ = inputs(shape, count)
            lse = ops.segment_attention(query, key, value, key.new_zeros((1, 0), dtype=torch.uint8), 0.09).lse
            for name, known in (("key_mass", None), ("key_mass, LSE given", lse)):
                once = pairs(count, shape.keys) * shape.heads * 2 * shape.head_dim
                moved = key.numel() * 2 + query.numel() * 2 + shape.heads * shape.keys * 4
                least, by = bound(moved, once * (1 if known is not None else 2))
                yield Row(
                    name,
                    f"{shape.name} N={shape.keys}",
                    count,
                    median(lambda q=query, k=key, s=known: ops.key_mass(q, k, None, 0.09, s)),
                    median(
                        lambda q=query, k=key, s=known: ops.key_mass_reference(
                            q, k, None, 0.09, s, None, None, True, False
                        )
                    ),
                    median(sdpa(query, key, value)),
                    flex(query, key, value),
                    least,
                    by,
                )


def segment_rows() -> Iterator[Row]:
    """Decoding, text rows after the picture, all rows; VAR's mix in the epilogue."""
    for shape in SHAPES:
        for count in (1, 64, shape.keys):
            query, key, value, labels = inputs(shape, count)
            flops = pairs(count, shape.keys) * shape.heads * 4 * shape.head_dim
            least, by = bound(2 * (2 * key.numel() + 2 * query.numel()) + labels.numel(), flops)
            mix = (*VAR.masks(), VAR.keep, VAR.gate_min, VAR.share_min)
            yield Row(
                "segment_attention",
                f"{shape.name} N={shape.keys}",
                count,
                median(lambda q=query, k=key, v=value, s=labels: ops.segment_attention(q, k, v, s, 0.09, VAR)),
                median(
                    lambda q=query, k=key, v=value, s=labels, m=mix: ops.segment_attention_reference(
                        q, k, v, s, 0.09, None, True, *m
                    )
                ),
                median(sdpa(query, key, value)),
                flex(query, key, value),
                least,
                by,
            )


def gather_rows() -> Iterator[dict[str, Any]]:
    """Torch indexing of what a pruning site compacts, against the matrix products of one decoder layer."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.set_num_threads(1)
    for hidden, heads, length, keep, rounds in ((1024, 16, 640, 128, 15), (1024, 16, 2368, 256, 7)):
        d, inner = hidden // heads, hidden * 11 // 4
        state = torch.randn(1, length, hidden, dtype=dtype, device=device)
        tables = [torch.randn(1, length, d, dtype=dtype, device=device) for _ in range(2)]
        cache = [torch.randn(1, heads, length, d, dtype=dtype, device=device) for _ in range(4)]
        index = torch.randperm(length, device=device)[:keep].sort().values[None]
        weights = [torch.randn(hidden, n, dtype=dtype, device=device) for n in (hidden,) * 4 + (inner,) * 3]

        def compact(index: Tensor = index, state: Tensor = state, tables: list[Tensor] = tables) -> None:
            for tensor in (state, *tables):
                tensor.gather(1, index[..., None].expand(-1, -1, tensor.shape[-1]))

        def compact_cache(index: Tensor = index, cache: list[Tensor] = cache) -> None:
            for tensor in cache:
                tensor.gather(2, index[:, None, :, None].expand(1, tensor.shape[1], -1, tensor.shape[-1]))

        def layer(state: Tensor = state, weights: list[Tensor] = weights) -> None:
            for weight in weights:
                state @ weight

        times: dict[str, list[float]] = {"hidden and rotary": [], "KV of two layers": [], "one layer": []}
        for _ in range(rounds):
            for name, run in zip(times, (compact, compact_cache, layer), strict=True):
                start = time.perf_counter()
                run()
                if device == "cuda":
                    torch.cuda.synchronize()
                times[name].append(1e6 * (time.perf_counter() - start))
        yield {
            "hidden": hidden,
            "tokens": length,
            "kept": keep,
            "device": device,
            **{name: statistics.median(values) for name, values in times.items()},
        }


def build_rows() -> Iterator[dict[str, Any]]:
    """Every tile shape the tuner would try at head dimension 128, as compiled for Ampere and Hopper."""
    from vlm_attn_kernels import offline

    for name in offline.KERNELS:
        for capability in (80, 90):
            for one in offline.builds(name, capability, 128):
                yield {"kernel": name, "sm": capability, **asdict(one)}


PARTS: dict[str, Callable[[], Iterator[Any]]] = {
    "mass": key_mass_rows,
    "segments": segment_rows,
    "gather": gather_rows,
    "builds": build_rows,
}


def as_dict(row: Row | dict[str, Any]) -> dict[str, Any]:
    return row if isinstance(row, dict) else {**asdict(row), "of_bound": row.of_bound}


def line(row: dict[str, Any]) -> str:
    return "  ".join(
        f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, action="append", help="what to measure; repeat for several")
    parser.add_argument("--json", action="store_true", help="print one JSON document at the end")
    options = parser.parse_args()
    parts = options.part or ["mass", "segments"]
    if not torch.cuda.is_available() and set(parts) & {"mass", "segments"}:
        print(
            "no CUDA device: kernel times need one, nothing was measured (--part gather and --part builds run here)",
            file=sys.stderr,
        )
        return 1
    document: dict[str, Any] = {"torch": torch.__version__, "rows": {}}
    if torch.cuda.is_available():
        bandwidth, rate = peaks()
        document |= {"device": torch.cuda.get_device_name(), "bytes_per_s": bandwidth, "flops_per_s": rate}
        print(f"{document['device']}: {bandwidth / 1e12:.2f} TB/s, {rate / 1e12:.0f} TFLOP/s", file=sys.stderr)
    with torch.no_grad():
        for part in parts:
            rows = document["rows"][part] = []
            for row in map(as_dict, PARTS[part]()):
                rows.append(row)
                print(line(row), file=sys.stderr if options.json else sys.stdout, flush=True)
    if options.json:
        print(json.dumps(document, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
