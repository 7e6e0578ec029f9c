"""Two-branch decoding: a logits processor that owns the second branch and its cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor

from .errors import UnsupportedError
from .families import Family, Media
from .stages import Contrast

if TYPE_CHECKING:
    from .session import Session

_OWN = {"past_key_values", "use_cache", "logits_to_keep", "return_dict", "output_attentions", "output_hidden_states"}


class ContrastProcessor(LogitsProcessor):
    """Runs the branch beside ``generate`` and combines the scores; one object per ``generate`` call.

    The branch sees the same prompt with altered pixels, at the same positions, with edits and pruning switched off,
    and keeps its own cache. The combination is applied after the built-in penalties and before temperature, top-k
    and top-p; tokens that are forbidden stay forbidden.
    """

    def __init__(self, session: Session, method: Contrast):
        self.session, self.method = session, method
        self.cache: Any = None
        self.encoded: dict[str, Any] = {}
        self.mask: Tensor | None = None
        self.positions: Tensor | None = None
        self.length = 0
        self.called = False

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """fp32 scores ``[B, V]`` after the contrast."""
        self.called = True
        if self.session.request is None or not self.session.last.tokens.vis.any():
            return scores
        with self.session.suspended():
            branch = self._prefill(input_ids) if self.cache is None else self._step(input_ids)
        self.length = input_ids.shape[1]
        out = self.method.combine(scores.float(), branch.to(scores.device).float())
        out = out.masked_fill(scores == float("-inf"), float("-inf"))
        # A sample without a picture has nothing to be contrasted with.
        return torch.where(self.session.last.tokens.vis.any(1, keepdim=True).to(out.device), out, scores.float())

    def _prefill(self, input_ids: Tensor) -> Tensor:
        session, request = self.session, self.session.last
        family = session.family
        if self.method.text_branch:
            return self._prefill_text(input_ids)
        kwargs = {k: v for k, v in family.prompt_arguments(request.prompt_kwargs).items() if k not in _OWN}
        for kind, media in request.media.items():
            if not media.arguments:
                raise UnsupportedError(
                    f"{self.method.name} alters the picture, so it needs pixel_values, not precomputed image features"
                )
            altered = {name: media.arguments[name].clone() for name in family.pixel_arguments(media)}
            for pixels in altered.values():
                for picture in family.pictures(media, pixels):
                    picture.copy_(self.method.alter_pixels(picture))
            self._give(kind, media, altered, kwargs)
        if kwargs.get("position_ids") is None or kwargs["input_ids"].shape != input_ids.shape:
            raise UnsupportedError(f"{self.method.name} contrasts inside generate(); call model.generate or vlm.ask")
        self.mask, self.positions = kwargs.get("attention_mask"), kwargs["position_ids"]
        self.cache = DynamicCache(config=session.family.text_config)
        return self._forward(kwargs)

    def _give(self, kind: str, media: Media, altered: dict[str, Tensor], kwargs: dict[str, Any]) -> None:
        """Puts the altered pictures among the arguments of the branch: encoded where the model takes that."""
        family = self.session.family
        if family.takes_features:
            self.encoded[kind] = self._repeated(kind, media, family.encode(media, altered))
            for name in media.arguments:
                kwargs.pop(name, None)
            kwargs["mm_encoder_outputs"] = self.encoded
            return
        strange = [
            name for name, pixels in altered.items() if getattr(kwargs.get(name), "shape", None) != pixels.shape
        ]
        if strange:
            raise UnsupportedError(
                f"{self.method.name} on {family.name} needs transformers 5.18 or newer, whose models take features"
            )
        kwargs.update(altered)

    def _prefill_text(self, input_ids: Tensor) -> Tensor:
        """The prompt without its pictures, positions compact."""
        family, given = self.session.family, self.session.last.prompt_kwargs
        if type(family).read_text is not Family.read_text:
            raise UnsupportedError(f"{self.method.name}: a text-only branch is not supported on {family.name}")
        if given.get("input_ids") is None or given["input_ids"].shape != input_ids.shape:
            raise UnsupportedError(f"{self.method.name} contrasts inside generate(); call model.generate or vlm.ask")
        ids, mask = family.text_only(input_ids, self.session.last.tokens.valid.long())
        self.mask, self.positions = mask, (mask.cumsum(1) - 1).clamp(min=0)
        self.cache = DynamicCache(config=family.text_config)
        return self._forward({"input_ids": ids, "attention_mask": mask, "position_ids": self.positions})

    def _repeated(self, kind: str, media: Media, features: Any) -> Any:
        """The branch's features, repeated as ``generate`` repeated the rows."""
        tokens = self.session.last.tokens
        video = kind == "video"
        rows = [sum(len(lay) for lay in row if lay.video == video) for row in tokens.layouts]
        times = max(sum(rows) // max(sum(media.lengths), 1), 1)
        return self.session.family.repeat_features(features, rows[::times], times)

    def _step(self, input_ids: Tensor) -> Tensor:
        if input_ids.shape[1] != self.length + 1 or self.positions is None:
            raise UnsupportedError(
                f"{self.method.name} needs one new token per step: assisted decoding is not supported"
            )
        if self.mask is not None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(self.mask.shape[0], 1)], dim=1)
        self.positions = self.positions[..., -1:] + 1
        return self._forward(
            {"input_ids": input_ids[:, -1:], "attention_mask": self.mask, "position_ids": self.positions}
        )

    def _forward(self, kwargs: dict[str, Any]) -> Tensor:
        arguments = self.session.family.branch_arguments(kwargs, self.encoded)
        out = self.session.model(
            **arguments, past_key_values=self.cache, use_cache=True, logits_to_keep=1, return_dict=True
        )
        return out.logits[:, -1]
