"""The text tower of CLIP, for methods that compare the question with patches in CLIP's joint space (extra ``clip``).

Nothing is loaded that was not named: a folder saved by open_clip with safetensors weights, or ``ARCHITECTURE/TAG`` out
of open_clip's own table of published weights.
"""

from __future__ import annotations

import functools
import importlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import UnsupportedError

CONFIG, WEIGHTS = "open_clip_config.json", ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors")


class ClipText:
    """Question and patches in CLIP's joint space.

    Args:
        model: an open_clip ``CLIP`` whose vision side belongs to the tower that made the patches.
        tokenizer: open_clip's tokenizer of it.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str):
        visual = getattr(model, "visual", None)
        norm, projection = getattr(visual, "ln_post", None), getattr(visual, "proj", None)
        if norm is None or projection is None or not hasattr(tokenizer, "encode"):
            raise UnsupportedError(f"'{name}' has no CLIP vision transformer with a text tower: choose a ViT of CLIP")
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.norm, self.projection = norm, projection

    @torch.no_grad()
    def text(self, question: str) -> Tensor:
        """The question's chunks ``[C, d]``: as many tokens as fit between start and end token each, at least one."""
        ids = self.tokenizer.encode(question)
        length = int(self.tokenizer.context_length)
        start, end = self.tokenizer.sot_token_id, self.tokenizer.eot_token_id
        chunks = [ids[i : i + length - 2] for i in range(0, max(len(ids), 1), length - 2)]
        rows = [torch.tensor([start, *chunk, end]) for chunk in chunks]
        padded = torch.stack([F.pad(row, (0, length - len(row))) for row in rows])
        return self.model.encode_text(padded.to(self.projection.device)).float()

    @torch.no_grad()
    def image(self, patches: Tensor) -> Tensor:
        """Patches ``[N, d_v]`` of the vision tower's last but one layer as ``[N, d]``, fp32.

        Raises:
            UnsupportedError: the patches are of another width, so the vision tower is another one.
        """
        width = self.projection.shape[0]
        if patches.shape[-1] != width:
            raise UnsupportedError(
                f"the patches have width {patches.shape[-1]}, the vision side of '{self.name}' {width}: name the CLIP "
                "that the model's vision tower was taken from"
            )
        x = patches.to(self.projection.device, torch.float32)
        out: Tensor = self.norm(x) @ self.projection
        return out.to(patches.device)


@functools.lru_cache(maxsize=2)
def load(name: str) -> ClipText:
    """A CLIP by folder or by open_clip's name (the last two are kept).

    Raises:
        UnsupportedError: open_clip is not installed, the weights are not at hand, or it is no CLIP.
        ValueError: neither a folder with open_clip's files nor a name of its table.
    """
    try:
        open_clip = importlib.import_module("open_clip")
    except ImportError as error:
        raise UnsupportedError("the CLIP text tower needs open_clip: pip install 'vlm-attn[clip]'") from error
    source, tag = _source(name, open_clip.list_pretrained())
    try:
        model = open_clip.create_model(source, pretrained=tag, require_pretrained=True).eval().requires_grad_(False)
        tokenizer = open_clip.get_tokenizer(source)
    except Exception as error:  # whatever the hub, the disk or the config throws: the cure is the same
        raise UnsupportedError(
            f"the weights of CLIP '{name}' could not be loaded ({type(error).__name__}: {error}): download them "
            f"first, or name a folder with {CONFIG} and {WEIGHTS[0]}"
        ) from error
    return ClipText(model, tokenizer, name)


def _source(name: str, published: list[tuple[str, str]]) -> tuple[str, str | None]:
    """What open_clip is asked for: a checked folder, or a pair of its own table."""
    folder = Path(name)
    if folder.is_dir():
        if not (folder / CONFIG).is_file() or not any((folder / file).is_file() for file in WEIGHTS):
            raise ValueError(
                f"{folder} holds no {CONFIG} with {' or '.join(WEIGHTS)} beside it: save a CLIP there first"
            )
        _check_config(folder / CONFIG)
        return f"local-dir:{folder.resolve()}", None
    architecture, _, tag = name.rpartition("/")
    if (architecture, tag) not in {(str(a), str(t)) for a, t in published}:
        raise ValueError(
            f"'{name}' is neither a folder nor a published CLIP: give ARCHITECTURE/TAG, such as ViT-L-14-336/openai "
            "(open_clip.list_pretrained() lists them)"
        )
    return architecture, tag


def _check_config(file: Path) -> None:
    """Refuses a folder whose text tower is not in it but somewhere on a hub."""
    try:
        text = json.loads(file.read_text(encoding="utf-8"))["model_cfg"]["text_cfg"]
        foreign = sorted(key for key in text if key.startswith("hf_"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is no open_clip configuration ({type(error).__name__}: {error})") from error
    if foreign:
        raise ValueError(f"{file} takes its text tower from a hub ({', '.join(foreign)}): give a plain CLIP")
