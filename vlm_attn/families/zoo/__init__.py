"""Tiny random-weight models of every family, built from their real config classes."""

from __future__ import annotations

from .base import Sample, Specimen
from .llava import Llava

SPECIMENS: dict[str, Specimen] = {s.name: s for s in (Llava(),)}

__all__ = ["SPECIMENS", "Sample", "Specimen"]
