"""Help for the circuit that finds a named object in the picture: starting weights and auxiliary losses.

Answering "Is there a dog?" needs the word to be compared with every patch. Left to itself that comparison comes last
in training. Three things bring it early: the first layers' queries and keys start as one similarity, projected patches
are pulled towards the embeddings of the words that describe them, and for a while the attention of the asked word,
and of answer tokens about to name something, is told where to look.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerBase

from vlm_attn.scenes.objectives import NO_KIND, PictureBatch
from vlm_attn.scenes.packing import FOCUS_LAYERS, PackedOutput, TurnGroup
from vlm_attn.scenes.world import COLOUR_NAMES, COLUMNS, CONTEXTS, GRID, KINDS, ROWS

ALIGNMENT_SCALE = 12.0
"""Inverse temperature of the cosine between a projected patch and word embeddings."""
GUIDED_HEADS = 4
"""The first heads of a guided layer are guided, the others stay free."""


def word_ids(tokenizer: PreTrainedTokenizerBase, words: tuple[str, ...]) -> Tensor:
    """Token ids of single-token words, int64 [n]."""
    return torch.tensor(tokenizer.convert_tokens_to_ids([f"▁{word}" for word in words]))


@torch.no_grad()
def prepare_lookup(
    model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, gain: float = 1.7
) -> None:
    """Set starting weights: near-orthogonal embeddings of unit norm and similarity attention in the first layers."""
    table = model.get_input_embeddings().weight
    width = table.shape[1]
    table.normal_(0, width**-0.5)
    named = word_ids(tokenizer, (*KINDS, *COLOUR_NAMES, *CONTEXTS, *ROWS, *dict.fromkeys(COLUMNS)))
    table[named] = nn.init.orthogonal_(torch.empty(len(named), width))
    for index in FOCUS_LAYERS:
        attention = model.model.language_model.layers[index].self_attn
        rows = nn.init.orthogonal_(torch.empty_like(attention.k_proj.weight))
        attention.k_proj.weight.copy_(rows * gain)
        per_group = attention.q_proj.weight.shape[0] // rows.shape[0]
        shared = rows.unflatten(0, (-1, attention.head_dim)).repeat_interleave(per_group, 0).flatten(0, 1)
        attention.q_proj.weight.copy_(shared * gain)
        values = nn.init.orthogonal_(torch.empty_like(attention.v_proj.weight))
        attention.v_proj.weight.copy_(values)
        back = values.unflatten(0, (-1, attention.head_dim)).repeat_interleave(per_group, 0).flatten(0, 1)
        attention.o_proj.weight.copy_(back.T * 0.1)


class LookupTeacher(nn.Module):
    """Auxiliary losses of the decoder; its only weights are probes that are thrown away."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.probe = nn.Linear(width, 1)
        self.words = {
            "kind": word_ids(tokenizer, (*KINDS, *CONTEXTS)),
            "colour": word_ids(tokenizer, COLOUR_NAMES),
            "row": word_ids(tokenizer, ROWS),
            "column": word_ids(tokenizer, COLUMNS),
        }

    def alignment(self, features: Tensor, table: Tensor, batch: PictureBatch) -> tuple[Tensor, float]:
        """Pull projected patches [B, 100, D] towards their words' embeddings; background towards its context's.

        Returns:
            the loss, and the share of object patches whose nearest kind is right.
        """
        patches = functional.normalize(features, dim=-1)
        on_object = batch.kind != NO_KIND
        targets = torch.where(on_object, batch.kind, len(KINDS) + batch.context[:, None])
        logits = ALIGNMENT_SCALE * patches @ functional.normalize(table[self.words["kind"]], dim=-1).T
        losses = functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        loss = (losses * torch.where(on_object, 1.0, 0.25)).mean() * 2
        seen = patches[on_object]
        labels = (batch.colour, batch.cell.div(GRID, rounding_mode="floor"), batch.cell % GRID)
        for name, label in zip(("colour", "row", "column"), labels, strict=True):
            words = functional.normalize(table[self.words[name]], dim=-1)
            loss = loss + 0.25 * functional.cross_entropy(ALIGNMENT_SCALE * seen @ words.T, label[on_object])
        right = (logits[on_object].argmax(-1) == targets[on_object]).float().mean()
        return loss, float(right)

    def guidance(
        self, output: PackedOutput, groups: list[TurnGroup], batch: PictureBatch, start: int
    ) -> tuple[Tensor, Tensor]:
        """Losses of the guided heads' attention on the picture.

        Args:
            start: place of the first image token in the prefix.

        Returns:
            for asked words (on the object's patches if visible, off the picture if not), and for answer tokens
            about a visible object (on its patches).
        """
        patches = batch.kind.shape[1]
        asked: list[Tensor] = []
        telling: list[Tensor] = []
        for g, group in enumerate(groups):
            for layer, seen in output.looks.items():
                points, kinds = (group.focus, group.kinds) if layer in FOCUS_LAYERS else (group.telling, group.told)
                target = (batch.kind[points[:, 0]] == kinds[:, None]).float()
                picture = seen[g][:, :GUIDED_HEADS, start : start + patches]
                share = torch.einsum("nhp,np->nh", picture, target)
                usable = target.sum(-1) > 0
                if layer in FOCUS_LAYERS:
                    share = torch.where(group.visible[:, None], share, 1 - picture.sum(-1))
                    usable = usable | ~group.visible
                if usable.any():
                    (asked if layer in FOCUS_LAYERS else telling).append(-(share[usable] + 1e-3).log().mean())
        return torch.stack(asked).mean(), torch.stack(telling).mean()

    def found(self, output: PackedOutput, groups: list[TurnGroup]) -> tuple[Tensor, float]:
        """Loss of reading "visible or not" from the asked word's state behind the tapped layers, and its accuracy."""
        states = torch.cat([m for m, g in zip(output.middle, groups, strict=True) if len(g.focus)])
        visible = torch.cat([g.visible for g in groups if len(g.focus)])
        logits = self.probe(self.norm(states))[:, 0]
        loss = functional.binary_cross_entropy_with_logits(logits, visible.float())
        return loss, float(((logits > 0) == visible).float().mean())
