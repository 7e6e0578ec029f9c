"""FlowCut: prune by the flow of information, in every second layer of the vision encoder."""

from __future__ import annotations

from vlm_attn.kit.budgets import budget, entropy_drop
from vlm_attn.kit.scores import running, value_flow
from vlm_attn.kit.selectors import topk
from vlm_attn.selection import Keep
from vlm_attn.stages import EncoderStep, Shrunk, method_dataclass

from ._encoder import InEncoder


@method_dataclass
class FlowCut(InEncoder):
    """Drops the patches that little information flows from, more of them the sharper the class token looks.

    Formula: ``s_i = (alpha_i / sum alpha + beta_i / sum beta) |v_i|_1`` with alpha the head-mean attention of the
    class token, beta the head mean of ``softmax_j(v_CLS . v_j)`` per head without a scale, v_i the head-mean value;
    ``c = 0.5 c + 0.5 s`` over the layers, the first s as it is. With rpl layers to go, at even rpl and n > T patches:
    drop ``round((n - T) / sqrt(rpl) (1 - (H / ln n)^2))`` of the lowest c, H the entropy of alpha renormalised; at
    rpl = 0 all but T.

    Acts behind the encoder layers 0 .. F - 1, F being the layer whose output are the features (rpl = F - 1 - layer);
    the layers behind and the language model run on what is left. Text is never dropped.

    Attributes:
        keep: T, tokens left per image: a count, or a share in (0, 1].
        positions: ``"renumber"`` closes the gaps, as released; ``"keep"`` leaves the original positions.

    Source: arXiv 2505.19536 (NeurIPS 2025), released code.
    Deviations: H is each picture's own, not the maximum over the batch, so that a picture does not depend on its
    neighbours; the class token shapes the encoder but has no place in the prompt; encoders without a class token use
    the mean attention received, and the mean value in place of the class token's [unverified]; ties go to the earlier
    token. The second cut in the language model, released for tiled pictures, is left out, as are tiled pictures.
    """

    name = "flowcut"
    summary = "prune by information flow inside the vision encoder"
    paper = "arXiv:2505.19536"
    shrinks = "output"

    keep: Keep = 0.2223

    def shrink(self, step: EncoderStep) -> Shrunk | None:
        picture, remaining = step.picture, step.layers - 2 - step.layer
        if remaining < 0:
            return None
        attention, value = picture.attention, picture.value
        patches = value[:, int(picture.class_token) :]
        summary = value[:, 0] if picture.class_token else value.float().mean(1)
        score = running(step.memory.get("flow"), value_flow(attention, summary, patches))
        n = score.numel()
        drop = entropy_drop(attention.mean(0), n, budget(self.keep, step.total), remaining)
        kept = topk(score, n - drop)
        step.memory["flow"] = score[kept]
        return Shrunk(kept) if drop else None
