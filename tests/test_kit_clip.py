"""CDPruner's relevance by a CLIP text tower: a stand-in, and a tiny CLIP of open_clip where it is installed."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vlm_attn
from tests import models
from tests.reference import kit as loops
from tests.reference import kit_select as literal
from vlm_attn import clip_text
from vlm_attn.errors import UnsupportedError

WIDTH, JOINT, LENGTH = 32, 12, 9


class Tokenizer:
    """A character is a token."""

    context_length, sot_token_id, eot_token_id = LENGTH, 1, 2

    def encode(self, text: str) -> list[int]:
        """Ids from 3 on."""
        return [3 + ord(letter) % 50 for letter in text]


class Clip(nn.Module):
    """Text: mean of word vectors. Vision: a norm and a projection."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.words = nn.Embedding(64, JOINT)
        self.visual = nn.Module()
        self.visual.ln_post = nn.LayerNorm(WIDTH)
        self.visual.proj = nn.Parameter(torch.randn(WIDTH, JOINT))

    def encode_text(self, ids: Tensor) -> Tensor:
        """`[C, LENGTH]` -> `[C, JOINT]`."""
        assert ids.shape[1] == LENGTH
        return self.words(ids).sum(1)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Clip:
    clip = Clip().eval().requires_grad_(False)
    module: Any = types.ModuleType("open_clip")
    module.list_pretrained = lambda: [("ViT-tiny", "nobody")]
    module.create_model = lambda source, pretrained, require_pretrained: clip
    module.get_tokenizer = lambda source: Tokenizer()
    monkeypatch.setitem(sys.modules, "open_clip", module)
    clip_text.load.cache_clear()
    yield clip
    clip_text.load.cache_clear()


def test_kept_sets_are_the_references(stand_in: Clip) -> None:
    """Chunks, minus cosine, scaling per picture, determinants: on 50 pictures, two a prompt."""
    model, processor = models.llava(4), models.tiny_processor()
    method = vlm_attn.method("cdpruner", relevance="clip", clip="ViT-tiny/nobody", keep=5)
    tower, differs = model.base_model.vision_tower, 0
    with vlm_attn.attach(model, method, processor) as session:
        for seed in range(25):
            prompt = models.sample(3, 6, images=2, seed=seed)
            with torch.no_grad():
                model(**prompt.inputs())
                (question,) = session.last.notes["questions"]
                features = tower(prompt.pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
                z = model.base_model.multi_modal_projector(features)
            ids = Tokenizer().encode(question)
            chunks = [ids[i : i + LENGTH - 2] for i in range(0, len(ids), LENGTH - 2)]
            assert len(chunks) > 1
            text = [stand_in.words(torch.tensor([1, *c, 2] + [0] * (LENGTH - 2 - len(c)))).sum(0) for c in chunks]
            kept = session.last.kept_visual(1)[0].tolist()
            expected = []
            for image in range(2):
                x = stand_in.visual.ln_post(features[image]) @ stand_in.visual.proj
                relevance = [-loops.mean([loops.cosine(i, t.tolist()) for t in text]) for i in x.tolist()]
                chosen = literal.dpp(z[image], loops.minmax(relevance, 1e-6), 5)
                differs += chosen != literal.dpp(z[image], [1.0] * 16, 5)
                expected += [16 * image + i for i in chosen]
            assert kept == expected
    assert differs > 25


def test_the_tower_is_named_and_checked(stand_in: Clip, tmp_path: Path) -> None:
    model, processor = models.llava(4), models.tiny_processor()

    def attach(message: str, error: type[Exception] = ValueError, **params: Any) -> None:
        with pytest.raises(error, match=message):
            vlm_attn.attach(model, vlm_attn.method("cdpruner", **params), processor)

    attach("belong together", relevance="clip")
    attach("belong together", clip="ViT-tiny/nobody")
    attach("language model's input", relevance="clip", clip="ViT-tiny/nobody", layer=2)
    attach("neither a folder nor a published CLIP", relevance="clip", clip="https://example.org/clip")
    attach("holds no open_clip_config.json", relevance="clip", clip=str(tmp_path))
    (tmp_path / "open_clip_model.safetensors").write_bytes(b"")
    for config, message in (({}, "no open_clip configuration"), ({"hf_model_name": "x"}, "from a hub")):
        (tmp_path / "open_clip_config.json").write_text(
            json.dumps({"model_cfg": {"text_cfg": config} if config else 0})
        )
        attach(message, relevance="clip", clip=str(tmp_path))


def test_another_vision_tower_is_named(stand_in: Clip) -> None:
    stand_in.visual.proj = nn.Parameter(torch.randn(WIDTH + 1, JOINT))
    method = vlm_attn.method("cdpruner", relevance="clip", clip="ViT-tiny/nobody")
    with (
        vlm_attn.attach(models.llava(4), method, models.tiny_processor()),
        pytest.raises(UnsupportedError, match="width 32, the vision side of 'ViT-tiny/nobody' 33"),
        torch.no_grad(),
    ):
        models.llava(4)(**models.single().inputs())


def test_missing_package_and_missing_weights_say_so(stand_in: Clip, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(source: str, pretrained: str, require_pretrained: bool) -> None:
        raise OSError("no network")

    monkeypatch.setattr(sys.modules["open_clip"], "create_model", fails)
    method = vlm_attn.method("cdpruner", relevance="clip", clip="ViT-tiny/nobody")
    with pytest.raises(UnsupportedError, match="could not be loaded .OSError: no network.: download them first"):
        vlm_attn.attach(models.llava(4), method, models.tiny_processor())
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(UnsupportedError, match="vlm-attn\\[clip\\]"):
        vlm_attn.attach(models.llava(4), method, models.tiny_processor())


def test_open_clip_itself(tmp_path: Path) -> None:
    """A tiny CLIP in open_clip's own format: text and patches meet in its joint space."""
    open_clip = pytest.importorskip("open_clip")
    from safetensors.torch import save_file

    vision = {"image_size": 56, "layers": 1, "width": WIDTH, "patch_size": 14, "head_width": 8}
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    config = {"embed_dim": JOINT, "vision_cfg": vision, "text_cfg": text}
    clip = open_clip.model.CLIP(**config)
    save_file(clip.state_dict(), str(tmp_path / "open_clip_model.safetensors"))
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    tower = clip_text.load(str(tmp_path))
    words = "is there a dog to the left of the cat " * 20
    assert tower.text(words).shape == (-(-len(tower.tokenizer.encode(words)) // 75), JOINT)
    one = tower.text("a dog")
    assert torch.allclose(one, clip.encode_text(open_clip.get_tokenizer("ViT-B-32")(["a dog"])), atol=1e-5)
    patches = torch.randn(5, WIDTH)
    assert torch.allclose(tower.image(patches), clip.visual.ln_post(patches) @ clip.visual.proj, atol=1e-6)
