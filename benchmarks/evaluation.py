"""What evaluation costs beside the model: scoring times, and the share of a run that is not spent in the model.

    OMP_NUM_THREADS=1 python benchmarks/evaluation.py scoring --data FOLDER
    OMP_NUM_THREADS=1 python benchmarks/evaluation.py overhead --config eval_configs/quickstart.yaml
    OMP_NUM_THREADS=1 python benchmarks/evaluation.py overhead --limit 30

``scoring`` makes 100,000 POPE answers and 5,000 captions up and scores them through `score_file`, files read included
(CHAIR needs the published word and object files in FOLDER/chair). ``overhead --config`` runs a config and splits its
CPU time into the time inside ``VLM.ask`` and the rest (harness, files, scores, report). Without a config it runs two
methods on the scenes benchmarks, small and large: the difference of the two runs is what a further sample costs.
Loading the model and importing libraries are given apart. One JSON document on standard output.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any


def timed(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """A result with its wall and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    return result, {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}


def scoring(data: Path, folder: Path, rounds: int) -> dict[str, Any]:
    """Seconds to score 100,000 POPE answers and 5,000 captions; the first round also reads tables that stay loaded."""
    from vlm_attn.evaluation.scorers import score_file

    draw = random.Random(0)
    replies = ("Yes", "No", "yes.", "No, there is no such thing in the image.", "Yes, there is one on the left.", "")
    with (folder / "questions.jsonl").open("w") as asked, (folder / "answers.jsonl").open("w") as said:
        for i in range(100_000):
            question = f"Is there a {draw.choice(('cat', 'dog', 'cup', 'car'))} in the image?"
            row = {"question_id": i, "image": f"COCO_val2014_{i // 6:012d}.jpg", "text": question}
            asked.write(json.dumps({**row, "label": ("yes", "no")[i % 2]}) + "\n")
            said.write(json.dumps({"question_id": i, "question": question, "text": draw.choice(replies)}) + "\n")
    truth = json.loads((data / "chair" / "gt_objects_val2014_A.json").read_text())
    words = [line.split(", ")[0] for line in (data / "chair" / "synonyms.txt").read_text().splitlines()]
    with (folder / "captions.jsonl").open("w") as file:
        for image in list(truth["objects"])[:5000]:
            parts = [f"The image shows a {draw.choice(words)} standing next to two {draw.choice(words)}s, and there "
                     f"are several people walking near the {draw.choice(words)}." for _ in range(5)]  # fmt: skip
            file.write(json.dumps({"image_id": int(image), "caption": " ".join(parts)}) + "\n")
    works = {
        "pope_100000": lambda: score_file("pope", folder / "answers.jsonl", folder,
                                          questions=str(folder / "questions.jsonl")),
        "chair_5000": lambda: score_file("chair", folder / "captions.jsonl", data),
    }  # fmt: skip
    return {name: [timed(work)[1] for _ in range(rounds)] for name, work in works.items()}


class Watch:
    """Runs configs and splits their CPU time into loading the model, answering, the report, and the rest."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}

    def _count(self, part: str, work: Callable[[], Any]) -> Any:
        result, times = timed(work)
        self.spent[part] = self.spent.get(part, 0.0) + times["cpu_s"]
        self.spent[f"{part}_calls"] = self.spent.get(f"{part}_calls", 0) + 1
        return result

    def run(self, config: Any) -> dict[str, float]:
        """Samples, and CPU seconds inside the model and around it; ``rest_share`` leaves loading out."""
        from vlm_attn.evaluation import report
        from vlm_attn.evaluation.runner import VlmBackend, run

        watch, write = self, report.write_report

        class Watched(VlmBackend):
            def load(self, config: Any) -> Any:
                vlm = watch._count("load", lambda: super(Watched, self).load(config))
                ask = vlm.ask
                vlm.ask = lambda *args, **kwargs: watch._count("model", lambda: ask(*args, **kwargs))
                return vlm

        self.spent = {}
        report.write_report = lambda *args: self._count("report", lambda: write(*args))
        try:
            _, whole = timed(lambda: run(config, Watched()))
        finally:
            report.write_report = write
        load, model = self.spent["load"], self.spent["model"]
        rest = whole["cpu_s"] - load - model
        return {
            "asked": self.spent["model_calls"], "load_cpu_s": load, "model_cpu_s": model, "rest_cpu_s": rest,
            "rest_share": rest / (rest + model), "report_cpu_s": self.spent.get("report", 0.0),
            "wall_s": whole["wall_s"],
        }  # fmt: skip


def overhead(limit: int, path: Path | None, folder: Path) -> dict[str, Any]:
    """Share of a run's CPU time that is not the model's."""
    modules = ("vlm_attn.evaluation.lmms", "vlm_attn.evaluation.report", "lmms_eval.evaluator")
    _, imports = timed(lambda: list(map(import_module, modules)))
    from vlm_attn.evaluation.config import build_config, load_config

    watch = Watch()

    def once(name: str, n: int) -> dict[str, float]:
        settings = {
            "methods": ["fastv"], "limit": n, "dtype": "float32", "device": "cpu", "threads": 1, "quiet": True,
            "benchmarks": ["scenes_pope_random", "scenes_chair", "scenes_mme"], "output": str(folder / name),
            "warmup": 0,
        }  # fmt: skip
        return watch.run(build_config(settings))

    if path is not None:
        return {
            "imports": imports,
            "run": watch.run(load_config(path, {"output": str(folder / "run"), "quiet": True})),
        }
    once("warm", 2)
    small, large = once("small", limit // 5), once("large", limit)
    more = {key: large[key] - small[key] for key in ("asked", "model_cpu_s", "rest_cpu_s")}
    return {
        "imports": imports, "small": small, "large": large,
        "per_sample": {"model_ms": 1000 * more["model_cpu_s"] / more["asked"],
                       "rest_ms": 1000 * more["rest_cpu_s"] / more["asked"],
                       "rest_share": more["rest_cpu_s"] / (more["rest_cpu_s"] + more["model_cpu_s"])},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["scoring", "overhead"])
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--limit", type=int, default=30)
    parser.add_argument("--config", type=Path, help="overhead of this evaluation config, run once")
    parser.add_argument("--output", type=Path, help="keep the run folders here")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.output or Path(temporary)
        result = (scoring(given.data, folder, given.rounds) if given.what == "scoring"
                  else overhead(given.limit, given.config, folder))  # fmt: skip
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
