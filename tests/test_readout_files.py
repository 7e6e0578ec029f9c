"""Records as files, pictures and through the command line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import vlm_attn
from tests import models
from vlm_attn import cli, readouts
from vlm_attn.readouts import WHAT, Record
from vlm_attn.readouts.plots import panels
from vlm_attn.readouts.record import _TENSORS
from vlm_attn.wrap import VLM

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def record() -> Record:
    with VLM(models.build_llava(4), models.tiny_processor(), "vaf") as vlm:
        return vlm.read(models.picture(), "w10 w11 w12", WHAT, max_new_tokens=4)


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            cli.main(["read", *arguments])
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    return call


def synthetic(layers: int, heads: int) -> Record:
    """A record of a model that nobody has here."""
    shares = torch.rand(3, layers, heads, 6)
    shares /= shares.sum(-1, keepdim=True)
    question = shares.mean(0)
    question[0, 0] = float("nan")
    return Record(
        what=("shares", "vas", "heads"), layers=tuple(range(layers)), tokens=(5, 6, 7),
        counts=torch.full((layers, 5), 9), shares=shares, concentration=torch.rand(3, layers, heads),
        question=question, question_vas=question[..., 2] / question[..., 0], kinds=torch.zeros(45).long(),
        places=torch.full((45, 3), -1),
    )  # fmt: skip


@pytest.mark.parametrize("name", ["out", "out.json", "out.safetensors"])
def test_a_record_comes_back_from_its_files(record: Record, tmp_path: Path, name: str) -> None:
    written = record.save(tmp_path / "new folder" / name)
    assert written.name == "out.json"
    assert sorted(p.name for p in written.parent.iterdir()) == ["out.json", "out.safetensors"]
    again = Record.load(written)
    for name in _TENSORS:
        torch.testing.assert_close(getattr(again, name), getattr(record, name), rtol=0, atol=0, equal_nan=True)
    assert (again.what, again.layers, again.tokens) == (record.what, record.layers, record.tokens)
    assert again.summary() == record.summary()
    assert again.about["methods"][0]["name"] == "vaf"


def test_what_is_no_record_is_refused(record: Record, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Record.load(tmp_path / "nothing")
    written = record.save(tmp_path / "a")
    head = json.loads(written.read_text())
    written.write_text(json.dumps({**head, "format": 99}))
    with pytest.raises(ValueError, match="newer vlm-attn"):
        Record.load(written)
    written.write_text("{}")
    with pytest.raises(ValueError, match="no record"):
        Record.load(written)


def test_the_summary_is_plain_data(record: Record) -> None:
    summary = json.loads(json.dumps(record.summary(), allow_nan=False))
    assert set(summary) == {"rows", *WHAT}
    total = [sum(layer) for layer in zip(*summary["shares"].values(), strict=True)]
    assert total == pytest.approx([1.0] * 4, abs=1e-3)
    best = summary["heads"][0]
    assert best["score"] == pytest.approx(float(record.visual_heads()["score"].max()), rel=1e-3)
    assert best["mass"] == pytest.approx(float(record.shares[0, best["layer"], best["head"], 2]), rel=1e-3)
    assert len(summary["t_vhd"]) == len(record.tokens)


@pytest.mark.parametrize(("layers", "heads"), [(32, 32), (1, 1)])
def test_heat_maps_show_every_layer_and_head(layers: int, heads: int, tmp_path: Path) -> None:
    made = synthetic(layers, heads)
    assert [tuple(p.values.shape) for p in panels(made)] == [(layers, heads)] * 3
    target = readouts.plot(made, tmp_path / "deep" / "maps.png", "a title")
    assert target.read_bytes().startswith(PNG)
    image = Image.open(target).convert("RGB")
    assert min(image.size) >= 600
    assert len(image.getcolors(1 << 24)) > min(layers * heads, 250)


def test_every_readout_has_a_place_in_the_picture(record: Record, tmp_path: Path) -> None:
    assert readouts.plot(record, tmp_path / "a.png").read_bytes().startswith(PNG)
    assert len(panels(record)) == 4


def test_heat_maps_of_a_change(record: Record, tmp_path: Path) -> None:
    with VLM(models.build_llava(4), models.tiny_processor()) as vlm:
        base = vlm.read(models.picture(), "w10 w11 w12", WHAT, max_new_tokens=4)
    shown = panels(record)[0].minus(panels(base)[0])
    torch.testing.assert_close(
        shown.values, 100 * (record.share("image", "generated") - base.share("image", "generated"))
    )
    assert shown.signed
    assert "change" in shown.unit
    assert readouts.plot(record, tmp_path / "a.png", baseline=base).read_bytes().startswith(PNG)
    with pytest.raises(ValueError, match="same prompt the same way"):
        readouts.plot(record, tmp_path / "b.png", baseline=synthetic(4, 8))


def test_command_line_writes_what_the_library_reads(say: Any, tmp_path: Path) -> None:
    plot, out = tmp_path / "maps.png", tmp_path / "record"
    arguments = ("scene:3", "Describe the image.", "--max-new-tokens", "3", "--method", "fastv", "--set", "keep=20")
    code, text, _ = say(*arguments, "--json", "--what", "shares", "--what", "vas", "--plot", str(plot), "-o", str(out))
    found = json.loads(text)
    assert code == 0
    assert plot.read_bytes().startswith(PNG)
    with vlm_attn.wrap("scenes", vlm_attn.method("fastv", keep=20)) as vlm:
        record = vlm.read(cli.open_picture("scene:3"), "Describe the image.", ["shares", "vas"], max_new_tokens=3)
    assert found["shares"] == record.summary()["shares"]
    assert found["vas"] == record.summary()["vas"]
    assert found["methods"][0]["name"] == "fastv"
    assert Record.load(out).tokens == record.tokens
    assert Record.load(out).counts[:, 2].tolist() == [100, 100, 20, 20, 20, 20]


def test_command_line_says_it_in_words(say: Any) -> None:
    code, text, _ = say("scene:3", "Describe the image.", "--max-new-tokens", "3")
    assert code == 0
    for words in ("image  % per layer", "visual attention score", "MDI, without first token", "sinks:"):
        assert words in text


def test_command_line_refuses_in_one_line(say: Any) -> None:
    code, text, error = say("scene:3", "Describe.", "--what", "vass", "--json")
    assert code == 2
    assert "no such readout: 'vass'" in json.loads(text)["error"]
    assert "Traceback" not in error
    code, text, _ = say("scene:3", "Describe.", "--baseline", "--json")
    assert code == 2
    assert "--method" in json.loads(text)["error"]


def test_command_line_shows_the_model_without_the_method(say: Any, tmp_path: Path) -> None:
    plot = tmp_path / "change.png"
    arguments = ("scene:3", "Describe the image.", "--max-new-tokens", "2", "--what", "shares", "--method", "vaf")
    found = json.loads(say(*arguments, "--baseline", "--plot", str(plot), "--json")[1])
    plain = json.loads(say(*arguments[:-2], "--json")[1])
    assert found["baseline"]["shares"] == plain["shares"] != found["shares"]
    assert plot.read_bytes().startswith(PNG)


def test_the_example_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = Path(__file__).parent.parent / "docs" / "readouts.md"
    code = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M)[0]
    monkeypatch.chdir(tmp_path)
    room = {"picture": cli.open_picture("scene:3")}
    exec(compile(code, "docs/readouts.md", "exec", dont_inherit=True), room)
    assert Record.load(tmp_path / "vaf").what == ("shares", "vas", "sinks")
