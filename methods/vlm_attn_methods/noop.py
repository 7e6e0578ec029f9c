"""The control that changes nothing."""

from __future__ import annotations

from vlm_attn.stages import Noop as NoopBase
from vlm_attn.stages import method_dataclass


@method_dataclass
class Noop(NoopBase):
    """Attaches the whole machinery and edits nothing: its results must equal the baseline's, its time nearly so."""

    name = "noop"
    summary = "control: the machinery attached, nothing edited"
