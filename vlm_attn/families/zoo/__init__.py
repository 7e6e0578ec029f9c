"""Tiny random-weight models of every family, built from their real config classes."""

from __future__ import annotations

from .base import Sample, Specimen
from .llava import SPECIMENS as LLAVA
from .mrope import SPECIMENS as MROPE
from .newcomers import SPECIMENS as NEWCOMERS
from .others import SPECIMENS as OTHERS
from .queries import SPECIMENS as QUERIES
from .tiles import SPECIMENS as TILES

SPECIMENS: dict[str, Specimen] = {
    specimen.name: specimen
    for specimen in (
        *LLAVA,
        *TILES,
        *QUERIES,
        *OTHERS,
        *MROPE,
        *NEWCOMERS,
    )
}

__all__ = ["SPECIMENS", "Sample", "Specimen"]
