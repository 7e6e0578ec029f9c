"""What evaluation costs beside the model: scoring times, and the share of a run that is not spent in the model.

    OMP_NUM_THREADS=1 python benchmarks/evaluation.py scoring --data FOLDER
    OMP_NUM_THREADS=1 python benchmarks/evaluation.py overhead --limit 30

``scoring`` makes 100,000 POPE answers and 5,000 captions up and scores them through `score_file`, files read included
(CHAIR needs the published word and object files in FOLDER/chair). ``overhead`` runs two methods on the scenes
benchmarks, small and large, and splits the CPU time of each into the time inside ``VLM.ask`` and the rest; the
difference of the two runs is what a further sample costs. Loading the model and importing libraries are given apart.
One JSON document on standard output.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable
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


def overhead(limit: int, folder: Path) -> dict[str, Any]:
    """Share of a run's CPU time that is not the model's."""
    _, imports = timed(lambda: __import__("vlm_attn.evaluation.lmms") and __import__("lmms_eval.evaluator"))
    from vlm_attn.evaluation.config import build_config
    from vlm_attn.evaluation.runner import VlmBackend, run

    spent = {"wall_s": 0.0, "cpu_s": 0.0, "asked": 0.0}
    loaded: dict[str, float] = {}

    class Watched(VlmBackend):
        def load(self, config: Any) -> Any:
            vlm, times = timed(lambda: super(Watched, self).load(config))
            loaded.update(times)
            ask = vlm.ask

            def watched(*args: Any, **kwargs: Any) -> Any:
                answer, times = timed(lambda: ask(*args, **kwargs))
                for key, value in times.items():
                    spent[key] += value
                spent["asked"] += 1
                return answer

            vlm.ask = watched
            return vlm

    def once(name: str, n: int) -> dict[str, float]:
        """Samples, and CPU seconds inside the model and around it (loading apart)."""
        spent.update(dict.fromkeys(spent, 0.0))
        settings = {
            "methods": ["fastv"], "limit": n, "dtype": "float32", "device": "cpu", "threads": 1, "quiet": True,
            "benchmarks": ["scenes_pope_random", "scenes_chair", "scenes_mme"], "output": str(folder / name),
            "warmup": 0,
        }  # fmt: skip
        _, whole = timed(lambda: run(build_config(settings), Watched()))
        rest = whole["cpu_s"] - loaded["cpu_s"] - spent["cpu_s"]
        return {"samples": spent["asked"], "model_cpu_s": spent["cpu_s"], "rest_cpu_s": rest,
                "rest_share": rest / (rest + spent["cpu_s"]), "wall_s": whole["wall_s"]}  # fmt: skip

    once("warm", 2)
    small, large = once("small", limit // 5), once("large", limit)
    more = {key: large[key] - small[key] for key in ("samples", "model_cpu_s", "rest_cpu_s")}
    return {
        "imports": imports, "load": loaded, "small": small, "large": large,
        "per_sample": {"model_ms": 1000 * more["model_cpu_s"] / more["samples"],
                       "rest_ms": 1000 * more["rest_cpu_s"] / more["samples"],
                       "rest_share": more["rest_cpu_s"] / (more["rest_cpu_s"] + more["model_cpu_s"])},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["scoring", "overhead"])
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--limit", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = (scoring(given.data, Path(folder), given.rounds) if given.what == "scoring"
                  else overhead(given.limit, Path(folder)))  # fmt: skip
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
