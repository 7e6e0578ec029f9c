"""Triton kernels of vlm-attn: device implementations of the operators in :mod:`vlm_attn.ops`.

The core finds this package through the entry-point group ``vlm_attn.kernels`` when the first CUDA tensor arrives.
"""

from __future__ import annotations

from vlm_attn.ops import register_kernels

from .mass import key_mass
from .segments import segment_attention

__all__ = ["key_mass", "register", "segment_attention"]


def register(device: str) -> None:
    """Makes the kernels the implementation of the operators on a device type.

    Besides ``"cuda"``, ``"cpu"`` works where ``TRITON_INTERPRET=1`` was set before triton was imported.
    """
    register_kernels(device, key_mass=key_mass, segment_attention=segment_attention)
