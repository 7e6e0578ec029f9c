"""Shared settings: one thread, no network, seeded, transformers' deprecations are errors."""

from __future__ import annotations

import os

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
if os.environ.get("VLM_ATTN_HUB") != "1":
    os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import logging  # noqa: E402
from collections.abc import Iterator  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what this machine cannot run, with the reason."""
    no_gpu = pytest.mark.skip(reason="no CUDA device")
    no_hub = pytest.mark.skip(reason="set VLM_ATTN_HUB=1 to allow downloads")
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(no_gpu)
        if "hub" in item.keywords and os.environ.get("VLM_ATTN_HUB") != "1":
            item.add_marker(no_hub)


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


class _Deprecations(logging.Handler):
    """transformers announces most deprecations through its logger: collect them and fail the test."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.seen: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keeps messages which speak of deprecation."""
        text = record.getMessage()
        # Janus' own generate passes guidance_scale beside a generation_config.
        if "deprecat" in text.lower() and "guidance_scale" not in text:
            self.seen.append(text)


@pytest.fixture(autouse=True)
def _no_deprecated_calls() -> Iterator[None]:
    handler = _Deprecations()
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
    if handler.seen:
        pytest.fail("deprecated transformers call: " + handler.seen[0])


# transformers itself still passes torch a flag that torch has deprecated
FLEX = pytest.param(
    "flex_attention",
    marks=[
        pytest.mark.filterwarnings("ignore:_compile flag:DeprecationWarning"),
        pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning"),
    ],
)


@pytest.fixture(params=["sdpa", "eager", FLEX])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Attention implementation of the model under test.

    FlexAttention runs uncompiled: the same masks and score functions, without minutes in a C++ compiler.
    `test_flex.py` compiles once.
    """
    if request.param == "flex_attention":
        with torch.compiler.set_stance("force_eager"):
            yield request.param
    else:
        yield request.param
