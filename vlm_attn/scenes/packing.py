"""Training pass over one picture and many independent questions.

A sequence is a shared prefix (system prompt and picture) followed by turns that see the prefix and themselves, never
each other; positions restart after the prefix for every turn. A model can then not answer from an earlier turn, and
one picture is encoded once for all its questions. The arithmetic is that of transformers' Llama with a 4-D mask, but
the attention is computed block by block (a test holds both together).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerBase
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from vlm_attn.scenes.language import Turn
from vlm_attn.scenes.tokenizer import BOS, EOS, IMAGE, SYSTEM_PROMPT
from vlm_attn.scenes.world import COLOUR_NAMES, COLUMNS, KINDS, ROWS

IGNORED = -100
FOCUS_LAYERS = (0, 1)
"""Layers whose attention at the asked word is read."""
TELLING_LAYERS = (2, 3)
"""Layers whose attention at answer tokens about an object is read."""


@dataclass
class TurnGroup:
    """Turns of similar length, T per picture.

    Args:
        ids: int64 [B, T, L], padded on the right.
        labels: int64 [B, T, L], next-token targets aligned with `ids` (answers and </s> only, else -100).
        weights: float32 [B, T, L], weight of each target.
        focus: int64 [N, 3], picture, turn and place of the word naming an object kind.
        kinds: int64 [N], index of that kind in `KINDS`.
        visible: bool [N], whether the picture shows it.
        telling: int64 [M, 3], picture, turn and place of the tokens that predict a word about a named object.
        told: int64 [M], index of that object's kind.
    """

    ids: Tensor
    labels: Tensor
    weights: Tensor
    focus: Tensor
    kinds: Tensor
    visible: Tensor
    telling: Tensor
    told: Tensor


@dataclass
class PackedOutput:
    """Result of `packed_forward`.

    Args:
        hidden: final normalised states per group, [B, T, L, D].
        looks: attention on the prefix per tapped layer and group, of its focus words [N, heads, P] or of its telling
            tokens [M, heads, P].
        middle: states of the focus words behind the first `FOCUS_LAYERS` layers, one [N, D] per group.
    """

    hidden: list[Tensor]
    looks: dict[int, list[Tensor]]
    middle: list[Tensor]


def prefix_ids(tokenizer: PreTrainedTokenizerBase, patches: int = 100, pictures: int = 1) -> list[int]:
    """Token ids in front of the first question: system prompt and `patches` image placeholders a picture."""
    shown = "\n".join([IMAGE * patches] * pictures)
    return tokenizer(f"{BOS}{SYSTEM_PROMPT} USER: {shown}", add_special_tokens=False).input_ids


def pack_turns(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Sequence[Turn]], later: float) -> TurnGroup:
    """Tokenise T turns for each of B pictures; targets behind an answer's first token weigh `later`."""
    flat = [turn for row in turns for turn in row]
    prompts = tokenizer([f"\n{t.question} ASSISTANT:" for t in flat], add_special_tokens=False).input_ids
    answers = tokenizer([f"{t.answer}{EOS}" for t in flat], add_special_tokens=False).input_ids
    length = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True)) - 1
    shape = (len(turns), len(turns[0]), length)
    ids = torch.full(shape, tokenizer.pad_token_id)
    labels = torch.full(shape, IGNORED)
    weights = torch.full(shape, later)
    kind_ids = dict(zip(tokenizer.convert_tokens_to_ids([f"▁{k}" for k in KINDS]), range(len(KINDS)), strict=True))
    telling_words = (*COLOUR_NAMES, *ROWS, *COLUMNS, "Yes", "No")
    telling_ids = set(tokenizer.convert_tokens_to_ids([f"▁{word}" for word in telling_words]))
    focus, kinds, visible, telling, told = [], [], [], [], []
    for i, (turn, prompt, answer) in enumerate(zip(flat, prompts, answers, strict=True)):
        b, t = divmod(i, shape[1])
        tokens = prompt + answer
        ids[b, t, : len(tokens) - 1] = torch.tensor(tokens[:-1])
        labels[b, t, len(prompt) - 1 : len(tokens) - 1] = torch.tensor(answer)
        weights[b, t, len(prompt) - 1] = 1.0
        if turn.focus is not None:
            place, kind = next((j, kind_ids[token]) for j, token in enumerate(prompt) if token in kind_ids)
            focus.append((b, t, place))
            kinds.append(kind)
            visible.append(turn.visible)
        named = None
        for j in reversed(range(len(answer))):
            named = kind_ids.get(answer[j], named)
            about = named if turn.focus is None else kind_ids[prompt[place]]
            if about is not None and (answer[j] in kind_ids or answer[j] in telling_ids):
                telling.append((b, t, len(prompt) - 1 + j))
                told.append(about)
    return TurnGroup(
        ids=ids,
        labels=labels,
        weights=weights,
        focus=torch.tensor(focus, dtype=torch.long).reshape(-1, 3),
        kinds=torch.tensor(kinds, dtype=torch.long),
        visible=torch.tensor(visible, dtype=torch.bool),
        telling=torch.tensor(telling, dtype=torch.long).reshape(-1, 3),
        told=torch.tensor(told, dtype=torch.long),
    )


def packed_forward(
    model: LlavaForConditionalGeneration,
    features: Tensor,
    prefix: Tensor,
    groups: Sequence[TurnGroup],
) -> PackedOutput:
    """Run the decoder over prefixes and turns.

    Args:
        model: the LLaVA model; only its decoder is used.
        features: projected visual tokens [B, n, D] for the n placeholders of `prefix`.
        prefix: int64 [P] ids, placeholders included.
        groups: the turns.
    """
    decoder = model.model.language_model
    batch, size = features.shape[0], prefix.shape[0]
    first = decoder.embed_tokens(prefix).expand(batch, -1, -1).clone()
    first[:, prefix == model.config.image_token_id] = features
    states = [first, *(decoder.embed_tokens(g.ids).flatten(0, 1) for g in groups)]
    starts = [0, *(size for _ in groups)]
    rotary = [
        decoder.rotary_emb(x, torch.arange(s, s + x.shape[1])[None]) for x, s in zip(states, starts, strict=True)
    ]
    looks: dict[int, list[Tensor]] = {}
    middle: list[Tensor] = []
    for index, layer in enumerate(decoder.layers):
        attention = layer.self_attn
        normed = [layer.input_layernorm(x) for x in states]
        query, key, value = [], [], []
        for x, (cos, sin) in zip(normed, rotary, strict=True):
            shape = (*x.shape[:2], -1, attention.head_dim)
            q, k = apply_rotary_pos_emb(
                attention.q_proj(x).view(shape).transpose(1, 2),
                attention.k_proj(x).view(shape).transpose(1, 2),
                cos,
                sin,
            )
            query.append(q)
            key.append(k)
            value.append(attention.v_proj(x).view(shape).transpose(1, 2))
        outputs = []
        last = index == len(decoder.layers) - 1
        if not last:
            out = functional.scaled_dot_product_attention(query[0], key[0], value[0], is_causal=True, enable_gqa=True)
            outputs.append(attention.o_proj(out.transpose(1, 2).flatten(2)))
        seen: list[Tensor] = []
        for q, k, v, group in zip(query[1:], key[1:], value[1:], groups, strict=True):
            out, probabilities = _turn_attention(q, k, v, key[0], value[0], attention.scaling)
            outputs.append(attention.o_proj(out))
            if index in FOCUS_LAYERS or index in TELLING_LAYERS:
                b, t, place = (group.focus if index in FOCUS_LAYERS else group.telling).unbind(1)
                seen.append(probabilities[b, :, :, t, place, :size].flatten(1, 2))
        if seen:
            looks[index] = seen
        if last:  # nothing reads the prefix any more
            states = states[1:]
        states = [x + y for x, y in zip(states, outputs, strict=True)]
        states = [x + layer.mlp(layer.post_attention_layernorm(x)) for x in states]
        if index == max(FOCUS_LAYERS):
            for x, group in zip(states[1:], groups, strict=True):
                b, t, place = group.focus.unbind(1)
                middle.append(x.unflatten(0, (batch, -1))[b, t, place])
    hidden = [decoder.norm(x).unflatten(0, (batch, -1)) for x in states]
    return PackedOutput(hidden, looks, middle)


def _turn_attention(
    q: Tensor, k: Tensor, v: Tensor, prefix_key: Tensor, prefix_value: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """Attention of turns to their picture's prefix and to themselves.

    Args:
        q: [B*T, H, L, d]; k, v: [B*T, G, L, d]; prefix_key, prefix_value: [B, G, P, d].

    Returns:
        outputs [B*T, L, H*d] and probabilities [B, G, H/G, T, L, P+L].
    """
    batch, groups, size, width = prefix_key.shape
    turns, length = q.shape[0] // batch, q.shape[2]
    repeat = q.shape[1] // groups
    q = (q * scaling).reshape(batch, turns, groups, repeat, length, width).permute(0, 2, 3, 1, 4, 5)
    k = k.reshape(batch, turns, groups, 1, length, width).permute(0, 2, 3, 1, 4, 5)
    v = v.reshape(batch, turns, groups, 1, length, width).permute(0, 2, 3, 1, 4, 5)
    far = q.reshape(batch, groups, -1, width) @ prefix_key.transpose(2, 3)
    near = q @ k.transpose(-1, -2)
    near = near.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), float("-inf"))
    scores = torch.cat([far.view(batch, groups, repeat, turns, length, size), near], dim=-1)
    probabilities = scores.softmax(-1)
    out = (probabilities[..., :size].reshape(batch, groups, -1, size) @ prefix_value).view_as(q)
    out = out + probabilities[..., size:] @ v
    return out.permute(0, 3, 4, 1, 2, 5).reshape(batch * turns, length, -1), probabilities


def answer_loss(model: LlavaForConditionalGeneration, hidden: Tensor, group: TurnGroup) -> tuple[Tensor, Tensor]:
    """Weighted sum of the answers' token losses over a group, and which turns [B, T] are right in every token."""
    wanted = group.labels != IGNORED
    logits = model.lm_head(hidden[wanted])
    targets = group.labels[wanted]
    losses = functional.cross_entropy(logits, targets, reduction="none")
    right = torch.ones_like(wanted)
    right[wanted] = logits.argmax(-1) == targets
    return (losses * group.weights[wanted]).sum(), right.all(-1)
