"""GIFT: boost what the gaze shifted to while the question was read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from vlm_attn.profiles import Profile
from vlm_attn.stages import EditView, ModelInfo, RowEdit, check_layer, method_dataclass

from ._gaze import Gaze, Laid
from ._layers import Layer, check_layers
from ._rows import evidence_factor, raised, ranked, scattered


@method_dataclass
class GIFT(RowEdit):
    """Gaze-shift guided fusion: visual keys weighted by saliency, query keys by the gain in visual mass.

    Saliency, once per prompt, at layer ``saliency_layer``: ``Delta_ij = max(A_ij - A_{i-1,j}, 0)`` for content words i
    of the question, visual j; the top ``head_fraction`` of heads by total Delta; the mean over heads and words,
    clamped to mean +- ``clamp_sigma`` std, min-max to [0, 1] gives S (constant: 0; no content word: the whole
    question).

    Edit, last row of every forward, layers ``enhance_layers``: the top heads by visual mass get
    ``A_j exp(alpha S_j)`` on visual keys; with r the visual mass of these heads after / before (one scalar per layer),
    the top heads by question mass get ``A_j beta r`` on question keys; rows are renormalised.

    The map comes from the very prefill when it lies below the edited layers, otherwise the prompt runs to that layer
    once more beforehand (query rows exclude the last prompt row, so both give the same map).

    Attributes:
        alpha: strength on visual keys (0 = none); None reads the profile, or takes 5.
        beta: factor on question keys, times r (1 as in the code); None leaves the question alone.
        saliency_layer: layer of the map; None reads the checkpoint's profile (``vlm-attn calibrate``).
        enhance_layers: edited layers; None as above.
        head_fraction: share of heads in each of the three choices.
        clamp_sigma: clamp of the map in standard deviations (unbiased).
        content_only: only content words count (needs the processor).
        suffix_tokens: turn markers after the question; None reads them from the chat template (needs the processor).

    Source: ICML 2026, arXiv 2510.22067 and its released code.
    Deviations: content words are those outside the closed English word classes, in place of a tagger [ours]; the
    question comes from the chat template, not from constants; no separate generation for the map.
    """

    name = "gift"
    summary = "boost visual keys by the gaze shift of the question, and question keys with them"
    paper = "arXiv:2510.22067"
    needs = ("gift (layers)",)

    alpha: Annotated[float, Field(ge=0)] | None = None
    beta: Annotated[float, Field(ge=0)] | None = 1.0
    saliency_layer: Layer | None = None
    enhance_layers: Sequence[Layer] | None = None
    head_fraction: Annotated[float, Field(gt=0, le=1)] = 0.5
    clamp_sigma: Annotated[float, Field(gt=0)] = 3.0
    content_only: bool = True
    suffix_tokens: Annotated[int, Field(ge=1)] | None = None

    @classmethod
    def neutral(cls) -> GIFT:
        layers = {"saliency_layer": 0, "enhance_layers": (0, 1), "content_only": False, "suffix_tokens": 1}
        return cls(alpha=0.0, **layers)  # type: ignore[arg-type]

    @property
    def source(self) -> int | None:
        return self.saliency_layer

    @property
    def wants_words(self) -> bool:
        return self.content_only or self.suffix_tokens is None

    def resolve(self, model: ModelInfo, profile: Profile) -> GIFT:
        source, layers, alpha = self.saliency_layer, self.enhance_layers, self.alpha
        if source is None or layers is None:
            record = profile.need("gift", self.name)
            source = int(record["saliency_layer"]) if source is None else source
            layers = record["enhance_layers"] if layers is None else layers
            alpha = record.get("alpha") if alpha is None else alpha
        check_layer(self.name, "saliency_layer", source, model)
        layers = check_layers(self.name, layers, model)
        return self.with_values(
            saliency_layer=source, enhance_layers=layers, alpha=5.0 if alpha is None else float(alpha)
        )

    def edit_layers(self, model: ModelInfo) -> frozenset[int]:
        return frozenset(self.enhance_layers or ())

    def _question(self, view: EditView) -> tuple[Tensor, Tensor]:
        """bool ``[B, N]`` question and content tokens of the prompt."""
        tokens = view.prompt
        if view.words is not None and self.suffix_tokens is None:
            question = view.words.question
        else:
            behind = tokens.qry.flip(1).cumsum(1).flip(1)  # 1 at the last token
            question = tokens.qry & (behind > (self.suffix_tokens or 1))
        if not self.content_only or view.words is None:
            return question, question
        content = view.words.content & question
        return question, torch.where(content.any(1, keepdim=True), content, question)

    def read_rows(self, view: EditView) -> Tensor:
        content = self._question(view)[1].gather(1, view.tokens.index)
        return content | torch.cat([content[:, 1:], torch.zeros_like(content[:, :1])], dim=1)

    def read(self, view: EditView, weights: Tensor, rows: Tensor) -> Gaze:
        content, vis = self._question(view)[1].gather(1, view.tokens.index), view.tokens.vis
        out = torch.zeros(vis.shape, device=vis.device)
        for row in range(len(vis)):
            words, slots = content[row].nonzero()[:, 0], vis[row].nonzero()[:, 0]
            if not words.numel() or not slots.numel():
                continue
            block = weights[row][:, :, slots]
            now, before = torch.searchsorted(rows, words), torch.searchsorted(rows, words - 1)
            shift = (block[:, now] - block[:, before]).clamp(min=0)
            chosen = ranked(shift.sum((1, 2)), self.head_fraction)
            out[row, slots] = evidence_factor(shift[chosen.bool()].mean((0, 1)), self.clamp_sigma)
        return Gaze(scattered(out, view))

    def _lay(self, view: EditView, saliency: Tensor) -> Laid:
        index, vis = view.tokens.index, view.tokens.vis.float()
        asked = self._question(view)[0].float().gather(1, index)
        gain = ((self.alpha or 0.0) * saliency.gather(1, index) * vis).expm1()
        columns = torch.stack([vis, vis * (1 + gain), asked], dim=-1)
        return Laid(view.tokens, columns, torch.stack([gain, asked], dim=1))

    def edit(self, weights: Tensor, view: EditView, memory: Gaze | None) -> Tensor:
        if memory is None or (not self.alpha and self.beta in (None, 1)):
            return weights
        laid, keys = memory.laid, weights.shape[-1]
        if laid is None or laid.tokens is not view.tokens:  # layers with the same prompt keys share it
            laid = memory.laid = self._lay(view, memory.map)
        laid.reach(keys)
        masses = torch.bmm(weights, laid.columns[:, :keys])
        chosen = ranked(masses[..., ::2].transpose(1, 2), self.head_fraction)
        if self.beta is None:
            chosen[:, 1] = 0
        else:
            before, after, _ = torch.bmm(chosen[:, :1], masses)[:, 0].split(1, dim=1)
            minus_one = before.new_full((), -1.0)
            chosen[:, 1].mul_(torch.addcdiv(minus_one, after, before.clamp(min=1e-12), value=self.beta))
        return raised(weights, chosen, laid.gains[:, :, :keys])
