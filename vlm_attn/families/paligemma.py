"""PaliGemma: one square grid in front of the text, the whole prompt bidirectional."""

from __future__ import annotations

from torch import Tensor

from .llava import Llava


class PaliGemma(Llava):
    """``PaliGemmaForConditionalGeneration``: the parent model builds the prefix mask, so text enters through it."""

    joined = "every picture of a prompt sees the others already"

    def read_text(self, ids: Tensor, mask: Tensor) -> None:
        """The prompt without its picture, bidirectional as the model reads it; positions count from 1."""
        positions = mask.cumsum(1).clamp(min=1)
        self.base(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            token_type_ids=mask * 0,
            use_cache=False,
        )
