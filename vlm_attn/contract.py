"""What every method is: a frozen dataclass with a name, checked against the model it meets."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar, dataclass_transform

import pydantic

if TYPE_CHECKING:
    from .profiles import Profile

T = TypeVar("T")

STAGES = ("refine", "prune", "edit", "decode", "read")


@dataclass_transform(kw_only_default=True, frozen_default=True)
def method_dataclass(cls: type[T]) -> type[T]:
    """Frozen keyword-only dataclass whose fields are type- and range-checked (pydantic, strict)."""
    config = pydantic.ConfigDict(strict=True, allow_inf_nan=False, extra="forbid")
    return pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=config)(cls)  # type: ignore[return-value]


@dataclass(frozen=True)
class ModelInfo:
    """Shape of the language model a session is attached to, as methods may see it.

    ``joined`` says why there is nothing between the pictures of a prompt to open; empty where pictures are apart.
    """

    checkpoint: str
    family: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    joined: str = ""

    @property
    def signature(self) -> dict[str, Any]:
        """What must agree between a profile and a model."""
        keys = ("family", "layers", "heads", "kv_heads", "head_dim", "hidden")
        return {k: getattr(self, k) for k in keys}


class Method:
    """Base of all methods: a name, where it comes from, and how it is checked against a model."""

    name: ClassVar[str]
    stage: ClassVar[str]
    summary: ClassVar[str]
    paper: ClassVar[str] = ""
    needs: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def neutral(cls) -> Self:
        """An instance at the strength that must change nothing, usable on any supported model."""
        return cls()

    def resolve(self, model: ModelInfo, profile: Profile) -> Self:
        """The method with model-dependent values filled in.

        Raises:
            ValueError: a parameter does not fit the model.
            MissingProfileError: per-checkpoint data is missing.
        """
        return self

    def to_dict(self) -> dict[str, Any]:
        """Name and parameters, enough to build the method again."""
        return {"name": self.name, **dataclasses.asdict(self)}  # type: ignore[call-overload]

    def with_values(self, **values: Any) -> Self:
        """A copy with some fields replaced."""
        return dataclasses.replace(self, **values)  # type: ignore[type-var]


def check_layer(method: str, field: str, layer: int, model: ModelInfo, lowest: int = 0) -> None:
    """Raises ValueError unless ``lowest <= layer < model.layers``."""
    if not lowest <= layer < model.layers:
        raise ValueError(
            f"{method}: {field}={layer} is not a layer of this model; choose {lowest}..{model.layers - 1} "
            f"(the model has {model.layers} decoder layers, counted from 0)"
        )


def field_names(cls: type[Method]) -> tuple[str, ...]:
    """Parameter names of a method class."""
    return tuple(f.name for f in dataclasses.fields(cls))  # type: ignore[arg-type]
