"""The response cache: hits change nothing, and everything that changes an answer makes a miss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

pytest.importorskip("lmms_eval")

from lmms_eval.protocol import ChatMessages

from tests.eval_fakes import FakeBackend, FakeVlm
from tests.test_eval_runner import compare, config
from vlm_attn.evaluation import cache as module
from vlm_attn.evaluation.answers import Produced
from vlm_attn.evaluation.cache import ResponseCache
from vlm_attn.evaluation.runner import run


def test_a_second_run_asks_nothing_and_equals_the_first(tmp_path: Path) -> None:
    folder = str(tmp_path / "cache")
    small: dict[str, Any] = {"limit": 4, "methods": ["noop"]}
    first = run(config(tmp_path / "plain", **small), FakeBackend())
    filling, again = FakeBackend(), FakeBackend()
    run(config(tmp_path / "filling", cache=folder, **small), filling)
    second = run(config(tmp_path / "again", cache=folder, **small), again)
    assert filling.vlm.calls == 2 * 3 * (4 + 1)
    assert again.vlm.calls == 0
    for path in ("filling", "again"):
        assert (tmp_path / path / "samples.jsonl").read_bytes() == (first.folder / "samples.jsonl").read_bytes()
    assert second.results["scores"] == first.results["scores"]
    assert second.results["latency"]["baseline"]["scenes_chair"] == {"n": 0, "warmup": 1}
    compare(tmp_path / "again", tmp_path / "filling", ("output",))


def chat(text: str = "Is there a cat?", colour: str = "red", size: int = 8, image: Any = None) -> ChatMessages:
    picture = {"type": "image", "url": image or Image.new("RGB", (size, size), colour)}
    return ChatMessages(messages=[{"role": "user", "content": [picture, {"type": "text", "text": text}]}])


def key(vlm: FakeVlm | None = None, chats: list[ChatMessages] | None = None, **changes: Any) -> str:
    request = {"settings": {"max_new_tokens": 4}, "seed": 1, **changes}
    return ResponseCache("x").keys(vlm or FakeVlm(), chats or [chat()], **request)[0]


def changed(**attributes: Any) -> FakeVlm:
    vlm = FakeVlm()
    for name, value in attributes.items():
        setattr(vlm, name, value)
    return vlm


def with_middle_weight() -> FakeVlm:
    vlm = FakeVlm()
    vlm.model = torch.nn.Linear(100, 100, bias=False)
    torch.nn.init.constant_(vlm.model.weight, 0.5)
    return vlm


def test_equal_requests_have_one_key() -> None:
    assert key() == key()


def test_whatever_changes_an_answer_changes_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    first = with_middle_weight()
    other = with_middle_weight()
    with torch.no_grad():
        other.model.weight[50, 50] += 0.25  # neither end of the tensor
    keys = {
        "plain": key(),
        "text": key(chats=[chat("Is there a dog?")]),
        "picture": key(chats=[chat(colour="blue")]),
        "size": key(chats=[chat(size=9)]),
        "companion": key(chats=[chat(), chat("Is there a dog?")]),
        "settings": key(settings={"max_new_tokens": 5}),
        "seed": key(seed=2),
        "method": key(changed(spec={"name": "fastv", "layer": 2})),
        "parameter": key(changed(spec={"name": "fastv", "layer": 3})),
        "calibrated": key(changed(spec={"name": "fastv", "layer": 3}, calibrated={"sigma": 2.0})),
        "weights": key(first),
        "one weight": key(other),
        "dtype": key(changed(model=FakeVlm().model.half())),
        "template": key(changed(processor=type("P", (), {"chat_template": "{{ x }}"})())),
    }
    for name, value in (("_version", lambda package: "0"), ("describe", lambda vlm: dict.fromkeys(
            ("versions", "machine", "device", "dtype", "attention", "threads"), "flex_attention"))):  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setattr(module.environment, name, value)
            keys[name] = key()
    monkeypatch.setattr(module, "_own_code", lambda: "edited")
    keys["code"] = key()
    assert len(set(keys.values())) == len(keys), keys
    two = ResponseCache("x").keys(FakeVlm(), [chat(), chat()], {"max_new_tokens": 4}, 1)
    assert two[0] != two[1]


def test_pictures_of_one_pattern_in_other_colours_have_other_keys() -> None:
    def painted(colour: tuple[int, int, int]) -> Any:
        image = Image.new("P", (4, 4))
        image.putpalette(colour)
        return chat(image=image)

    assert key(chats=[painted((255, 0, 0))]) != key(chats=[painted((0, 0, 255))])


def test_damaged_entries_are_answered_again(tmp_path: Path) -> None:
    cache = ResponseCache(tmp_path)
    name = key()
    cache.put(name, Produced("yes\n\u2028", 3, {"visual_tokens": 4, "times": {"total_s": 1.0}}))
    assert cache.get(name) == Produced("yes\n\u2028", 3, {"visual_tokens": 4})
    path = next(tmp_path.rglob("*.json"))
    good = json.loads(path.read_text())
    for text in ("", "{", "[]", "null", json.dumps({**good, "key": "0"}), json.dumps({**good, "text": 1}),
                 json.dumps({**good, "n_tokens": True})):  # fmt: skip
        path.write_text(text)
        assert cache.get(name) is None
    path.write_bytes(b"\xff\xfe")
    assert cache.get(name) is None
    assert cache.get("ab" * 32) is None


def test_a_folder_that_cannot_be_written_ends_caching_only(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    cache = ResponseCache(tmp_path / "file")
    cache.put("ab" * 32, Produced("yes", 1))
    run(config(tmp_path / "run", cache=str(tmp_path / "file"), limit=2, methods=[]), FakeBackend())
    assert (tmp_path / "run" / "results.json").is_file()
