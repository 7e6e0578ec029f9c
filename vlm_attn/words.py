"""Roles of prompt tokens that need the tokenizer: the user's question and its content words."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from .errors import UnsupportedError
from .stages_edit import Words
from .tokens import TokenMap

# Closed word classes of English: whatever else is a word carries content (nouns, names, verbs, adjectives, adverbs,
# numbers). Auxiliaries are no verbs here, as in the universal part-of-speech tags.
_CLOSED = """
    a an the this that these those some any each every either neither both all no another such
    i me my mine myself we us our ours ourselves you your yours yourself yourselves he him his himself she her hers
    herself it its itself they them their theirs themselves who whom whose which what whatever whoever whichever
    something anything nothing everything someone anyone everyone somebody anybody everybody nobody none there
    be am is are was were been being do does did have has had having can could may might must shall should will would
    ought don't doesn't didn't isn't aren't wasn't weren't can't couldn't won't wouldn't shouldn't haven't hasn't
    hadn't ain't let's i'm you're he's she's it's we're they're i've you've we've they've i'd you'd i'll you'll
    about above across after against along among around as at before behind below beneath beside besides between
    beyond by despite down during except for from in inside into like near of off on onto out outside over past per
    since than through throughout till to toward towards under until up upon via with within without
    and but or nor so yet if unless because although though while whereas whether
    please yes oh ok okay hello hi hey not
"""
FUNCTION_WORDS = frozenset(_CLOSED.split())
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")


def roles(processor: Any, ids: Tensor, tokens: TokenMap, names: str) -> Words:
    """Question and content tokens of ``ids [B, N]``.

    Question: text after the last visual token, without leading special tokens and white space, and without the turn
    markers that the chat template puts before the answer (only the last token where the prompt does not end with
    them). Content: question tokens that overlap a word outside the closed word classes.

    Raises:
        UnsupportedError: no tokenizer is known.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    if tokenizer is None or not hasattr(tokenizer, "decode"):
        raise UnsupportedError(
            f"{names} reads the words of the question and needs the processor: attach(model, method, processor=...), "
            "or vlm_attn.wrap"
        )
    ending = answer_opening(processor, tokenizer)
    question, content = torch.zeros_like(tokens.qry), torch.zeros_like(tokens.qry)
    special = set(getattr(tokenizer, "all_special_ids", ()))
    for row in range(tokens.batch):
        slots = tokens.qry[row].nonzero()[:, 0]
        text = [int(i) for i in ids[row, slots]]
        matches = bool(ending) and text[-len(ending) :] == ending
        text = text[: -len(ending)] if matches else text[:-1]
        start = 0
        while start < len(text) and (text[start] in special or not tokenizer.decode([text[start]]).strip()):
            start += 1
        slots = slots[start : len(text)]
        question[row, slots] = True
        content[row, slots[_content(tokenizer, text[start:])]] = True
    return Words(question, content)


def questions(processor: Any, ids: Tensor, tokens: TokenMap, names: str) -> tuple[str, ...]:
    """The user's question in each row of ``ids [B, N]``, as text.

    Raises:
        UnsupportedError: no tokenizer is known.
    """
    asked = roles(processor, ids, tokens, names).question
    tokenizer = getattr(processor, "tokenizer", processor)
    return tuple(tokenizer.decode(row[mask], skip_special_tokens=True).strip() for row, mask in zip(ids, asked))


def answer_opening(processor: Any, tokenizer: Any) -> list[int]:
    """Token ids that the chat template puts between a user's turn and the answer; empty without a template."""
    if not getattr(processor, "chat_template", None):
        return []
    turn = [{"role": "user", "content": [{"type": "text", "text": "x"}]}]
    ended, opened = (
        tokenizer(processor.apply_chat_template(turn, add_generation_prompt=flag), add_special_tokens=False).input_ids
        for flag in (False, True)
    )
    return list(opened[len(ended) :])


def _content(tokenizer: Any, ids: list[int]) -> Tensor:
    """bool ``[n]``: tokens that overlap a content word, by the characters they add to the decoded text."""
    ends = [len(tokenizer.decode(ids[: i + 1])) for i in range(len(ids))]
    text = tokenizer.decode(ids)
    spans = [m.span() for m in _WORD.finditer(text) if m.group().lower().replace("’", "'") not in FUNCTION_WORDS]
    starts = [0, *ends[:-1]]
    flags = [any(a < end and start < b for a, b in spans) for start, end in zip(starts, ends, strict=True)]
    return torch.tensor(flags, dtype=torch.bool)
