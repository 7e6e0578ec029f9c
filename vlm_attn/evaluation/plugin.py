"""Entry point of the group ``lmms_eval.models``: makes ``--model vlm_attn`` known to lmms-eval.

Imports nothing but lmms-eval's manifest class; the model class is imported when a run asks for it.
"""

from __future__ import annotations

from typing import Any

__all__ = ["MODEL_ID", "manifest"]

MODEL_ID = "vlm_attn"


def manifest() -> Any:
    """lmms-eval's description of our chat class (a ``ModelManifest``)."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id=MODEL_ID, chat_class_path="vlm_attn.evaluation.lmms.VlmAttnChat")
