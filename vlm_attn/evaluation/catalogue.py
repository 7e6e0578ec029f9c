"""The benchmarks that run offline (any other lmms-eval task may be named in a config as well)."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from vlm_attn.evaluation.local_docs import PREFIX, kind_of, names

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
    """Benchmarks that run offline: on pictures of the procedural world, or from the user's own folders."""
    pope = "POPE on 500 pictures x 6 existence questions; absent objects "
    return [
        BenchmarkRow("scenes_pope_random", "pope", 3000, pope + "drawn uniformly"),
        BenchmarkRow("scenes_pope_popular", "pope", 3000, pope + "from the most frequent ones"),
        BenchmarkRow("scenes_pope_adversarial", "pope", 3000, pope + "that go with a present one most often"),
        BenchmarkRow("scenes_chair", "chair", 500, "CHAIR on 500 descriptions, with recall and length"),
        BenchmarkRow("scenes_mme", "mme", 240, "MME-style yes/no pairs: existence, count, position, colour"),
        *(BenchmarkRow(name, kind_of(name), *_local(name)) for name in names()),
    ]


def _local(name: str) -> tuple[int, str]:
    """Size and summary of a published benchmark that is read from the user's folders."""
    parts = name.removeprefix(PREFIX).split("_")
    if parts[0] == "pope":
        return (2910 if parts[-1] == "2910" else 3000), f"POPE, {parts[1]} pictures, {parts[2]}; from local folders"
    return {
        "chair": (500, "CHAIR on COCO val2014, a published list of images; from local folders"),
        "mme": (240, "MME, the categories of the question file; from local folders"),
        "amber_g": (1004, "AMBER, descriptions; from local folders"),
        "amber_d": (14216, "AMBER, yes/no questions; from local folders"),
        "hallusion_bench": (1129, "HallusionBench, 178 questions as text alone, no judge; from local folders"),
        "mmhal_bench": (96, "MMHal-Bench, answers for a judge; from local folders"),
    }["_".join(parts)]
