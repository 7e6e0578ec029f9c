"""CDPruner: a determinantal point process over visual tokens, conditioned on what the question asks."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from vlm_attn import clip_text
from vlm_attn.kit.calibrators import minmax, tilt
from vlm_attn.kit.scores import clip_relevance, unit
from vlm_attn.kit.selectors import dpp
from vlm_attn.selection import Keep, Per, select
from vlm_attn.stages import ModelInfo, PruneView, Site, method_dataclass

from ._one_site import OneSite


@method_dataclass
class CDPruner(OneSite):
    """Keeps visual tokens that are diverse, and relevant to the question where relevance is asked for.

    Formula: ``K = diag(r) S diag(r)``, S = cosines of the projected features; greedy MAP of the determinantal point
    process takes ``argmax d_i^2`` and updates ``d^2`` until the budget of the image is reached. ``r`` is the
    min-max scaled relevance of the image, tilted by ``exp(theta / (2 (1 - theta)) r)`` if ``theta`` is given.

    Acts at the language model's input (``layer=0``), prefill only; text is never dropped.

    Attributes:
        layer: decoder layer before which tokens leave, 0-based; 0 as published.
        keep: tokens kept per image: a count, or a share in (0, 1].
        per: ``"image"``, or ``"view"``: the budget is split over tiles or frames by their size [ours].
        relevance: ``"clip"``, as published: the mean over the question's chunks of **minus** the cosine between the
            patch, brought into CLIP's joint space, and the chunk (patches of CLIP rank inversely); ``"none"``: r = 1,
            diversity alone; ``"embedding"``: mean cosine between a visual token and the text after the picture, both
            as they enter the language model [ours: stands in for the text tower].
        clip: for ``relevance="clip"``: a folder saved by open_clip, or ``ARCHITECTURE/TAG`` of its table; the CLIP
            that the model's vision tower was taken from (``ViT-L-14-336/openai`` for LLaVA-1.5).
        theta: weight of relevance in [0, 1); None uses r as it is.
        positions: ``"renumber"`` closes the gaps, as released; ``"keep"`` leaves the original positions (the only
            choice on M-RoPE models).

    Source: arXiv 2506.10967.
    Deviations: the text tower, which LLaVA checkpoints do not contain, must be named, so that the default is
    diversity alone; it needs the extra ``clip`` and a processor; chunks hold 75 tokens between start and end token
    [unverified]. Relevance is scaled per image, not over the batch; a token whose gain has fallen to rounding noise
    gains exactly 0; ties go to the earlier token.
    """

    name = "cdpruner"
    summary = "keep diverse visual tokens by a determinantal point process, relevance optional"
    paper = "arXiv:2506.10967"

    layer: Annotated[int, Field(ge=0)] = 0
    keep: Keep = 0.1112
    per: Per = "image"
    relevance: Literal["none", "embedding", "clip"] = "none"
    clip: str | None = None
    theta: Annotated[float, Field(ge=0, lt=1)] | None = None
    positions: Literal["renumber", "keep"] = "renumber"

    def resolve(self, model: ModelInfo, profile: object) -> CDPruner:
        if (self.relevance == "clip") != (self.clip is not None):
            raise ValueError(
                f"cdpruner: relevance='clip' and clip=... belong together, got {self.relevance}, {self.clip}"
            )
        if self.clip is not None:
            if self.layer:
                raise ValueError(
                    f"cdpruner: relevance='clip' acts at the language model's input, not layer={self.layer}"
                )
            clip_text.load(self.clip)
        return super().resolve(model, profile)

    @property
    def encoder_layer(self) -> int | None:  # type: ignore[override]
        return -2 if self.relevance == "clip" else None

    @property
    def wants_question(self) -> bool:
        return self.relevance == "clip"

    def sites(self) -> tuple[Site, ...]:
        return (Site(self.layer, hidden=True),)

    def keep_mask(self, view: PruneView) -> Tensor:
        def choose(row: int, slots: Tensor, k: int) -> Tensor:
            z, text = view.features[row, slots], view.features[row, view.tokens.qry[row]]
            r = torch.ones(slots.numel(), device=z.device)
            if self.relevance == "embedding" and text.numel():
                r = minmax((unit(z) @ unit(text).T).mean(-1), eps=1e-6)
            if self.clip is not None:
                tower, image = clip_text.load(self.clip), int(view.tokens.img_id[row, slots[0]])
                patches = tower.image(view.vision.picture(row, image).features)[view.tokens.order[row, slots]]
                asked = tower.text(view.questions[row]).to(patches.device)
                r = minmax(clip_relevance(patches, asked), eps=1e-6)
            return dpp(z, r if self.theta is None else tilt(r, self.theta), k)

        return select(view.tokens, self.keep, choose, per=self.per)
