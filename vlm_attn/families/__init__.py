"""One adapter per model family; :func:`resolve` finds the adapter of a loaded model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..errors import AttachError
from .base import Family
from .llava import Llava

_FAMILIES: tuple[type[Family], ...] = (Llava,)


@dataclass(frozen=True)
class FamilyRow:
    """One line of the family table."""

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


def families() -> list[FamilyRow]:
    """The supported families."""
    return [FamilyRow(f.name, f.model_types, f.executed, dict(f.refused)) for f in _FAMILIES]


def resolve(model: nn.Module) -> Family:
    """The validated adapter of a model.

    Raises:
        AttachError: not a transformers vision-language model, an unsupported family, or a missing part.
    """
    if not isinstance(model, PreTrainedModel):
        raise AttachError(
            f"{type(model).__name__} is not a transformers model: load it with "
            "AutoModelForImageTextToText.from_pretrained(...)"
        )
    kind = getattr(model.config, "model_type", "")
    for family in _FAMILIES:
        if kind in family.model_types:
            if model.get_output_embeddings() is None:
                raise AttachError(
                    f"{type(model).__name__} has no language head: load the ...ForConditionalGeneration class"
                )
            return family(model)
    known = ", ".join(t for f in _FAMILIES for t in f.model_types)
    if getattr(model.config, "vision_config", None) is None:
        raise AttachError(f"{type(model).__name__} ({kind}) is not a vision-language model; supported: {known}")
    raise AttachError(f"model family '{kind}' has no adapter yet; supported: {known}")


__all__ = ["Family", "FamilyRow", "families", "resolve"]
