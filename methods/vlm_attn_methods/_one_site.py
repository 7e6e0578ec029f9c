"""Shared by pruning methods that cut once, before one decoder layer, with no reading of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from vlm_attn.stages import ModelInfo, Prune, Site, check_layer


class OneSite(Prune):
    """Site, range check and neutral strength of methods with the fields ``layer`` and ``keep``."""

    if TYPE_CHECKING:
        layer: int

    @classmethod
    def neutral(cls) -> Self:
        params: dict[str, Any] = {"layer": 1, "keep": 1.0}
        return cls(**params)

    def resolve(self, model: ModelInfo, profile: object) -> Self:
        check_layer(self.name, "layer", self.layer, model)
        return self

    def sites(self) -> tuple[Site, ...]:
        return (Site(self.layer),)
