"""The benchmarks that ship with the package (any other lmms-eval task may be named in a config as well)."""

from __future__ import annotations

from dataclasses import asdict, dataclass

__all__ = ["BenchmarkRow", "benchmarks"]


@dataclass(frozen=True)
class BenchmarkRow:
    """One line of the benchmark catalogue; ``n`` counts questions (or captions)."""

    name: str
    kind: str
    n: int
    summary: str

    def to_dict(self) -> dict[str, str | int]:
        return asdict(self)


def benchmarks() -> list[BenchmarkRow]:
    """Benchmarks that run offline, on pictures of the procedural world."""
    pope = "POPE on 500 pictures x 6 existence questions; absent objects "
    return [
        BenchmarkRow("scenes_pope_random", "pope", 3000, pope + "drawn uniformly"),
        BenchmarkRow("scenes_pope_popular", "pope", 3000, pope + "from the most frequent ones"),
        BenchmarkRow("scenes_pope_adversarial", "pope", 3000, pope + "that go with a present one most often"),
        BenchmarkRow("scenes_chair", "chair", 500, "CHAIR on 500 descriptions, with recall and length"),
        BenchmarkRow("scenes_mme", "mme", 240, "MME-style yes/no pairs: existence, count, position, colour"),
    ]
