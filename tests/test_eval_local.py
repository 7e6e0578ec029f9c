"""Published benchmarks from local folders: documents, pictures, scores, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("lmms_eval")

from tests.eval_fakes import FakeBackend
from tests.local_data import coco, write_data, write_picture
from tests.score_files import DATA, needs
from vlm_attn.evaluation import local_docs
from vlm_attn.evaluation.config import ConfigError, build_config
from vlm_attn.evaluation.local_docs import Pictures, documents
from vlm_attn.evaluation.runner import RunResult, run
from vlm_attn.evaluation.scorers import score_file
from vlm_attn.evaluation.store import read_json_lines

SPLITS = ("random", "popular", "adversarial")
TASKS = [
    *(f"local_pope_coco_{split}" for split in SPLITS),
    "local_chair",
    "local_mme",
    "local_amber_g",
    "local_amber_d",
]


class Teller(FakeBackend):
    """Says yes to cats and describes a cat and two dogs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, str]] = []
        plain = self.vlm.ask

        def ask(image: Any, text: str, **settings: Any) -> Any:
            self.seen.append((image, text))
            answer = plain(image, text, **settings)
            answer.text = ("Yes." if "cat" in text else "No") if text.startswith("Is") else "A cat, a kitten, a dog"
            return answer

        self.vlm.ask = ask  # type: ignore[method-assign]


def settings(root: Path, **changes: Any) -> dict[str, Any]:
    return {"methods": ["noop"], "benchmarks": TASKS, "data": str(root / "data"), "images": str(root / "images"),
            "resamples": 100, "warmup": 0, "quiet": True, "output": str(root / "run"), **changes}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("local")
    write_data(root)
    return root


@pytest.fixture(scope="module")
def finished(root: Path) -> RunResult:
    return run(build_config(settings(root)), Teller())


def test_figures(finished: RunResult) -> None:
    scores = finished.results["scores"]["noop"]
    metrics = {task: scores[task]["metrics"] for task in TASKS}
    assert [scores[task]["n"] for task in TASKS] == [4, 4, 4, 2, 4, 1, 1]
    assert all(metrics[f"local_pope_coco_{split}"]["accuracy"] == 1 for split in SPLITS)
    assert metrics["local_mme"] == {"score": 400, "acc": 1, "acc_plus": 1}
    chair = metrics["local_chair"]  # three mentions, one of them (the dog) not there
    assert (chair["chair_s"], chair["recall"]) == (1, 1)
    assert chair["chair_i"] == pytest.approx(1 / 3)
    amber = metrics["local_amber_g"]
    assert (amber["cover"], amber["hal"], amber["cog"]) == (1, 1, 1)
    assert metrics["local_amber_d"]["recall"] == 1
    assert finished.results["paired"]["noop"]["local_amber_d"]["mcnemar"]["p"] == 1


def test_the_harness_aggregates_the_same(finished: RunResult) -> None:
    for task in TASKS:
        harness, ours = finished.results["results"]["noop"][task], finished.results["scores"]["noop"][task]["metrics"]
        assert {name: harness[f"{name},none"] for name in ours} == pytest.approx(ours)


def test_questions_and_their_pictures(root: Path) -> None:
    backend = Teller()
    named = [{"name": "local_pope_coco_random", "prompt": "vcd"}, "local_mme", "local_amber_d"]
    run(build_config(settings(root, benchmarks=named, output=str(root / "asked"), methods=[])), backend)
    asked = [text for _, text in backend.seen]
    assert asked[0] == "Is there a cat in the image? Please answer this question with one word."  # no "imange"
    assert asked[4] == "Is there a cat in this image?\nAnswer the question using a single word or phrase."
    assert asked[-1] == "Is there a dog in this image?"
    pictures = [np.asarray(image).tobytes() for image, _ in backend.seen]
    assert pictures[0] == pictures[1] != pictures[2] == pictures[3]
    assert pictures[4] == pictures[5] != pictures[6]  # one file name in two categories of MME


def test_the_report_shows_local_pictures(finished: RunResult) -> None:
    page = (finished.folder / "report.html").read_text()
    assert "AMBER" in page and "POPE COCO adversarial" in page
    rows = list(read_json_lines(finished.folder / "samples.jsonl"))
    assert not any(str(finished.folder.parent) in json.dumps(row) for row in rows)  # no paths of this machine


def test_missing_pictures_stop_the_run(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("run"))
    (tmp_path / "images" / "val2014" / coco(73)).unlink()
    backend = Teller()
    with pytest.raises(FileNotFoundError, match="1 pictures are not below.*000000000073"):
        run(build_config(settings(tmp_path)), backend)
    assert not backend.seen
    run(build_config(settings(tmp_path, limit=2, benchmarks=TASKS[:1])), backend)
    write_picture(tmp_path / "images" / "again" / coco(42), 9)
    with pytest.raises(ValueError, match="more than once"):
        Pictures(tmp_path / "images").find(coco(42))


def test_names_from_files_never_become_paths(root: Path) -> None:
    pictures = Pictures(root / "images" / "MME")
    assert pictures.find("../val2014/" + coco(73)) is None
    assert pictures.find("/etc/passwd") is None
    assert Pictures(root / "images" / "val2014").find("73") is not None  # by number
    with pytest.raises(FileNotFoundError, match="picture folder"):
        Pictures(root / "nowhere").find("1.jpg")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"benchmarks": ["local_pope_coco_adversaria"]}, "Did you mean 'local_pope_coco_adversarial'"),
        ({"benchmarks": [{"name": "scenes_mme", "data": "x"}]}, "only benchmarks from local folders"),
        ({"benchmarks": [{"name": "local_mme", "prompt": "lava"}]}, "Did you mean 'llava'"),
    ],
)
def test_bad_configs(root: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_config(settings(root, **changes))


def test_missing_files_are_named(root: Path, tmp_path: Path) -> None:
    for changes, message in (
        ({"data": str(tmp_path)}, "coco_pope_random.jsonl"),
        ({"data": str(tmp_path / "x")}, "does not exist"),
        ({"benchmarks": [{"name": "local_chair", "ids": "opera5000"}]}, "Did you mean 'opera500'"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            run(build_config(settings(root, **changes)), Teller())


def test_a_task_file_for_the_command_line_of_lmms_eval(root: Path, tmp_path: Path) -> None:
    from lmms_eval.tasks import TaskManager

    folders = f"{{data: {root / 'data'}, images: {root / 'images'}}}"
    (tmp_path / "mine.yaml").write_text(
        "task: my_pope\nclass: !function vlm_attn.evaluation.local_tasks.LocalTask\n"
        f"dataset_name: local_pope_coco_popular\ndataset_kwargs: {folders}\n"
    )
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    task = manager.load_task_or_group(["my_pope"], "chat")["my_pope"]
    assert len(task.test_docs()) == 4
    assert task.doc_to_visual(task.test_docs()[0])[0].size == (56, 40)


# ---- the published files ----------------------------------------------------------------------------------------


@needs("pope")
@pytest.mark.parametrize("name", [name for name in local_docs.names() if "_pope_" in name])
def test_published_pope_files(name: str) -> None:
    found = documents(name, str(DATA))
    assert len(found) == (2910 if name.endswith("2910") else 3000)
    assert sum(doc["label"] == "yes" for doc in found) == 1500
    assert not any("imange" in doc["question"] for doc in found)


@needs("chair")
@needs("mme")
@needs("amber")
@needs("hallusionbench")
@needs("mmhal_bench")
def test_published_files_of_the_other_benchmarks() -> None:
    counts = {name: len(documents(name, str(DATA))) for name in local_docs.names() if "_pope_" not in name}
    assert counts == {
        "local_chair": 500,
        "local_mme": 240,
        "local_amber_g": 1004,
        "local_amber_d": 14216,
        "local_hallusion_bench": 1129,
        "local_mmhal_bench": 96,
    }


@needs("pope")
@needs("chair")
def test_a_run_on_published_questions_scores_like_its_answer_file(tmp_path: Path) -> None:
    """Generated pictures under the published names; the sample file is scored again as if it came from elsewhere."""
    wanted = {doc["image"] for name in ("local_pope_coco_popular", "local_chair") for doc in
              documents(name, str(DATA))[:12]}  # fmt: skip
    for number, image in enumerate(sorted(wanted)):
        write_picture(tmp_path / "images" / image, number)
    tasks = ["local_pope_coco_popular", "local_chair"]
    result = run(build_config(settings(tmp_path, data=str(DATA), benchmarks=tasks, limit=12, methods=[])), Teller())
    rows = list(read_json_lines(result.folder / "samples.jsonl"))
    for benchmark, task, options in (
        ("pope", tasks[0], {"partial": True, "source": "coco", "split": "popular"}),
        ("chair", tasks[1], {}),
    ):
        answers = tmp_path / f"{benchmark}.jsonl"
        answers.write_text("".join(json.dumps(row) + "\n" for row in rows if row["task"] == task))
        report = score_file(benchmark, answers, DATA, **options)
        ours = result.results["scores"]["baseline"][task]["metrics"]
        assert report.n == 12
        for name, value in ours.items():
            assert report.metrics[name] == pytest.approx(value), (benchmark, name)
