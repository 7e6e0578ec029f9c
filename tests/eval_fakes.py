"""A stand-in for a wrapped VLM: answers by rule from the picture's bytes and the question, fast and repeatably.

It is used where the machinery around a model is tested (resuming, tables, reports); the tests with the real
checkpoint are in the same files.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import torch


@dataclass
class FakeAnswer:
    text: str
    tokens: list[int]
    stats: dict[str, Any] = field(default_factory=dict)


class FakeVlm:
    """Right in most cases; the method's `harm` makes it wrong more often, `random` adds seeded noise."""

    def __init__(self, delay: float = 0.0) -> None:
        self.model = torch.nn.Linear(4, 4, bias=False)
        torch.nn.init.constant_(self.model.weight, 0.5)
        self.spec: dict[str, Any] | None = None
        self.delay = delay
        self.calls = 0
        self.calibrated: dict[str, Any] = {}

    @property
    def methods(self) -> tuple[()]:
        return ()

    @property
    def method(self) -> list[Any]:
        return [] if self.spec is None else [self.spec | self.calibrated]

    def set_method(self, spec: Any) -> None:
        if spec and spec["name"] == "broken_setup":
            raise ValueError("no calibration for this checkpoint; run `vlm-attn calibrate`")
        self.spec = spec

    def ask(self, image: Any, text: str, **settings: Any) -> FakeAnswer:
        self.calls += 1
        time.sleep(self.delay)
        if self.spec and self.spec["name"] == "broken":
            raise RuntimeError("this method always fails")
        digest = sha256((b"" if image is None else image.tobytes()) + text.encode()).digest()
        harm = (self.spec or {}).get("harm", 0)
        noise = float(torch.rand(()))
        if text.startswith("Is there"):
            answer = "yes" if digest[0] < 128 + harm or noise < 0.02 else "no"
        else:
            answer = f"A tree and {1 + digest[1] % 3} dogs. A cup and a boat."
        kept = 100 - harm
        times = {"encode_s": 0.001, "prefill_s": 0.002, "decode_s_per_token": 0.0005, "total_s": 0.004}
        stats = {"times": times, "visual_tokens": 100, "kept_tokens": {"mean": kept}, "edited_heads": 0}
        return FakeAnswer(answer, list(range(len(answer.split()))), stats)

    def close(self) -> None: ...


class FakeBackend:
    """In place of `runner.VlmBackend`."""

    def __init__(self, delay: float = 0.0) -> None:
        self.vlm = FakeVlm(delay)

    def describe(self, spec: Any) -> Any:
        return spec

    def load(self, config: Any) -> FakeVlm:
        return self.vlm
