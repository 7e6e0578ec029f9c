"""ILVAD: draft a few tokens, collect what the layers turn to, and generate again with that evidence raised."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from vlm_attn.stages import Draft, EditView, ModelInfo, RowEdit, method_dataclass

from ._evidence import Evidence
from ._layers import Layer, layer_range
from ._rows import evidence_factor, raised, ranked


@method_dataclass
class ILVAD(RowEdit):
    """Inter-layer visual attention discrepancy: tokens that later layers turn to are evidence, and are looked at more.

    Draft of ``draft`` greedy tokens, unedited. Per layer l: a_l, the visual attention of the newest row averaged over
    the top ``head_fraction`` of heads by visual mass and over draft steps 1..draft-1; ``bin_l = a_l > tau mean(a_l)``;
    ``S = sum_l max(bin_{l+1} - bin_l, 0)``, kept where the layer mean of a exceeds its mean over tokens; clamped at 3
    standard deviations, min-max to [0, 1].

    Edit, last row of every forward, layers ``first_layer..end_layer - 1``: the top heads by evidence ratio
    ``sum S A / sum A`` over visual keys get ``A_j exp(alpha S_j)``; the top heads by mass on text behind the image get
    ``A_j (text w_j + beta)`` there; rows are renormalised. w_j: attention that text token j itself paid to the
    evidence, head-mean, summed over layers, min-max over text behind the image. Prompt tokens take theirs from the
    draft's prefill, generated tokens from when they were the newest row [unverified reading].

    Attributes:
        alpha: strength on visual evidence (0 = none).
        beta: floor of the text factor: 1 for yes/no questions, 0.3 for captions.
        text: factor of w (0 with beta 1: text is left alone) [ours].
        draft: T, tokens of the draft.
        tau: binarising threshold in means.
        first_layer: first edited layer (5 for captions).
        end_layer: end of the edited layers, exclusive; None = all but the last (26 of 32 for captions).
        head_fraction: share of heads in each choice.
        prompt_row: edit the last prompt row too, so that the first token is affected [unverified].

    Acts inside ``generate`` only, without beams. Source: ICML 2026, arXiv 2605.20965 and its released code.
    """

    name = "ilvad"
    summary = "raise attention to evidence that layers turned to in a short draft"
    paper = "arXiv:2605.20965"

    alpha: Annotated[float, Field(ge=0)] = 5.0
    beta: Annotated[float, Field(ge=0)] = 1.0
    text: Annotated[float, Field(ge=0)] = 1.0
    draft: Annotated[int, Field(ge=2)] = 10
    tau: Annotated[float, Field(gt=0)] = 5.0
    first_layer: Layer = 0
    end_layer: Layer | None = None
    head_fraction: Annotated[float, Field(gt=0, le=1)] = 0.5
    prompt_row: bool = True

    @classmethod
    def neutral(cls) -> ILVAD:
        return cls(alpha=0.0, text=0.0)

    @property
    def draft_tokens(self) -> int:
        return 0 if self.alpha == 0 and self.text == 0 and self.beta == 1 else self.draft

    def resolve(self, model: ModelInfo, profile: object) -> ILVAD:
        end = max(model.layers - 1, 1) if self.end_layer is None else self.end_layer
        first, end = layer_range(self.name, self.first_layer, end, model)
        return self.with_values(first_layer=first, end_layer=end)

    def edit_layers(self, model: ModelInfo) -> frozenset[int]:
        return frozenset(range(self.first_layer, self.end_layer or model.layers))

    def glance(self, weights: Tensor, vis: Tensor) -> Tensor:
        visual = weights * vis[:, None]
        looking = ranked(visual.sum(-1), self.head_fraction)[..., None]
        return (visual * looking).sum(1) / looking.sum(1)

    def read_draft(self, view: EditView, draft: Draft) -> Evidence:
        vis, layers = view.prompt.vis, sorted(draft.steps)
        counted = draft.counted[..., None].float()
        steps = counted.sum(0).clamp(min=1)
        means = torch.stack([(draft.steps[n] * counted).sum(0) / steps for n in layers])
        evidence = torch.zeros(vis.shape, device=vis.device)
        for row in range(len(vis)):
            a = means[:, row, vis[row]]
            if not a.numel():
                continue
            binary = (a > self.tau * a.mean(-1, keepdim=True)).float()
            rises = (binary[1:] - binary[:-1]).clamp(min=0).sum(0)
            attended = a.mean(0)
            evidence[row, vis[row]] = evidence_factor(rises * (attended > attended.mean()), 3.0)
        prompt = torch.zeros(vis.shape, device=vis.device)
        prompt[:, draft.index] = sum((rows @ evidence[..., None])[..., 0] for rows in draft.rows.values())
        return Evidence(evidence, prompt * view.prompt.qry, self.alpha, self.beta, self.text)

    def edit(self, weights: Tensor, view: EditView, memory: Evidence | None) -> Tensor:
        if memory is None or self.draft_tokens == 0:
            return weights
        step = memory.at(view, *weights.shape[1:])
        if step.generated == 0 and not self.prompt_row:
            return weights
        masses = step.masses(weights)
        proof, _, visual = masses.unbind(1)
        if step.generated:
            memory.look(view.layer, step, proof)
        proof.div_(visual)  # each head's share of evidence: what it is ranked by
        return raised(weights, ranked(masses[:, :2], self.head_fraction, step.laid.zeros), step.gains(self.text))
