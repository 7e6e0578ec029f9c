"""One adapter per model family; :func:`resolve` finds the adapter of a loaded model.

A family that fits a general adapter is one line in the table below; one that does not has a file of its own.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from importlib import resources
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..errors import AttachError
from .anyres import LlavaNext, LlavaOneVision
from .base import Family, Media, SquareGrid
from .blip import Blip
from .deepseek import DeepseekVL, Janus
from .ernie_vl import ErnieVL
from .gemma import Gemma3
from .glm4v import Glm4v
from .lfm2 import Lfm2VL
from .lighton import LightOnOcr
from .llava import Llava, VideoLlava
from .minicpmv import MiniCPMV
from .mllama import Mllama
from .molmo2 import Molmo2
from .ovis2 import Ovis2
from .paligemma import PaliGemma
from .pixtral import Mistral3
from .qwen_vl import DeepStack, FlatPositions, LinearLayers, MergedGrid
from .tiled import AyaVision, Cohere2Vision, Idefics2, Idefics3, PerceptionLM, Tiled
from .unsupported import UNSUPPORTED
from .video_llama3 import VideoLlama3

# transformers' model_type -> adapter.
ADAPTERS: dict[str, type[Family]] = {
    "llava": Llava,
    "vipllava": Llava,
    "video_llava": VideoLlava,
    "fast_vlm": SquareGrid,
    "llava_next": LlavaNext,
    "llava_next_video": LlavaNext,
    "llava_onevision": LlavaOneVision,
    "internvl": Tiled,
    "got_ocr2": Tiled,
    "cohere2_vision": Cohere2Vision,
    "aya_vision": AyaVision,
    "idefics3": Idefics3,
    "smolvlm": Idefics3,
    "idefics2": Idefics2,
    "perception_lm": PerceptionLM,
    "lighton_ocr": LightOnOcr,
    "hyperclovax_vision_v2": MergedGrid,
    "paligemma": PaliGemma,
    "gemma3": Gemma3,
    "mistral3": Mistral3,
    "instructblip": Blip,
    "blip-2": Blip,
    "aria": Family,
    "ovis2": Ovis2,
    "deepseek_vl": DeepseekVL,
    "deepseek_vl_hybrid": DeepseekVL,
    "janus": Janus,
    "lfm2_vl": Lfm2VL,
    "molmo2": Molmo2,
    "mllama": Mllama,
    "qwen2_vl": MergedGrid,
    "qwen2_5_vl": MergedGrid,
    "qwen3_vl": DeepStack,
    "qwen3_vl_moe": DeepStack,
    "qwen3_5": LinearLayers,
    "qwen2_5_omni_thinker": MergedGrid,
    "qwen3_omni_moe_thinker": DeepStack,
    "paddleocr_vl": MergedGrid,
    "exaone4_5": FlatPositions,
    "glm4v": Glm4v,
    "glm46v": Glm4v,
    "glm4v_moe": Glm4v,
    "glm_ocr": Glm4v,
    "ernie4_5_vl_moe": ErnieVL,
    "video_llama_3": VideoLlama3,
    "minicpmv4_6": MiniCPMV,
}


@dataclass(frozen=True)
class FamilyRow:
    """One line of the family table; ``executed`` is what the last run of the support matrix recorded."""

    name: str
    model_types: tuple[str, ...]
    executed: bool
    refused: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """The row as plain data (for ``--json``)."""
        return {
            "name": self.name,
            "model_types": list(self.model_types),
            "executed": self.executed,
            "refused": dict(self.refused),
        }


@functools.cache
def executed() -> frozenset[str]:
    """Families that the shipped record of the support matrix (``python -m vlm_attn.families.matrix``) ran."""
    record = resources.files(__package__).joinpath("support.json")
    if not record.is_file():
        return frozenset()
    return frozenset(json.loads(record.read_text(encoding="utf-8"))["families"])


def families() -> list[FamilyRow]:
    """The supported families."""
    return [FamilyRow(name, (name,), name in executed(), dict(kind.refused)) for name, kind in ADAPTERS.items()]


def resolve(model: nn.Module) -> Family:
    """The validated adapter of a model.

    Raises:
        AttachError: not a transformers vision-language model, an unsupported family, or a missing part.
    """
    if any(getattr(module, "_compiled_call_impl", None) is not None for module in model.modules()) or hasattr(
        model, "_orig_mod"
    ):
        raise AttachError(
            "this model is compiled, and what is attached now would be ignored: attach to the plain model first, "
            "then compile it"
        )
    if not isinstance(model, PreTrainedModel):
        raise AttachError(
            f"{type(model).__name__} is not a transformers model: load it with "
            "AutoModelForImageTextToText.from_pretrained(...)"
        )
    kind = getattr(model.config, "model_type", "")
    if kind in ADAPTERS:
        if model.get_output_embeddings() is None:
            raise AttachError(
                f"{type(model).__name__} has no language head: load the ...ForConditionalGeneration class"
            )
        return ADAPTERS[kind](model)
    if kind in UNSUPPORTED:
        raise AttachError(f"model family '{kind}' cannot be served: {UNSUPPORTED[kind]}")
    known = ", ".join(ADAPTERS)
    if getattr(model.config, "vision_config", None) is None:
        raise AttachError(f"{type(model).__name__} ({kind}) is not a vision-language model; supported: {known}")
    raise AttachError(f"model family '{kind}' has no adapter yet; supported: {known}")


__all__ = ["ADAPTERS", "UNSUPPORTED", "Family", "FamilyRow", "Media", "families", "resolve"]
