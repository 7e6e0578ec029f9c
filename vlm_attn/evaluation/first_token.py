"""Yes/no answers from the scores of the first generated token: one forward pass per question, checked against text.

The token ids of yes and no are looked up in the loaded tokenizer and in the real context. Lists copied from another
model are how this goes wrong: reading one of the four "yes" ids costs F1 points on one model, all of F1 on another.
The scores are those that generation samples from, after every logits processor, so a contrastive method's plausibility
mask counts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import StoppingCriteria

from vlm_attn.evaluation.parsers import NO, UNKNOWN, YES, parse_answer

__all__ = ["AnswerTokens", "FirstTokenError", "answer_tokens", "first_token_answers"]

TOLERATED = 0.01
"""Share of checked questions whose first token may be neither yes nor no, and on which the modes may disagree."""


class FirstTokenError(ValueError):
    """This model does not answer with yes or no in its first token: generate text and read that."""


@dataclass(frozen=True)
class AnswerTokens:
    """Ids of the single tokens that spell yes and no."""

    yes: tuple[int, ...]
    no: tuple[int, ...]

    def read(self, scores: torch.Tensor) -> str:
        """ "yes" iff the best yes token scores higher than the best no token; "unknown" if both are masked out.

        ``scores``: final scores of the first generated position, shape (vocabulary,).
        """
        yes, no = (scores[list(ids)].max().item() for ids in (self.yes, self.no))
        if yes == no == float("-inf"):
            return UNKNOWN
        return YES if yes > no else NO

    def holds(self, token: int) -> bool:
        return token in self.yes or token in self.no


def answer_tokens(tokenizer: Any, context: str = "") -> AnswerTokens:
    """The single tokens of yes, Yes, YES and no, No, NO: alone, after a blank, and right after ``context``.

    Raises:
        FirstTokenError: one of the two answers has no single token.
    """

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    prefix = encode(context)

    def ids(word: str) -> tuple[int, ...]:
        found = []
        for form in (word, word.capitalize(), word.upper()):
            after = encode(context + form)
            inside = after[len(prefix) :] if after[: len(prefix)] == prefix else []
            found += [tokens[0] for tokens in (encode(form), encode(f" {form}"), inside) if len(tokens) == 1]
        return tuple(dict.fromkeys(found))

    tokens = AnswerTokens(ids(YES), ids(NO))
    if not tokens.yes or not tokens.no or set(tokens.yes) & set(tokens.no):
        raise FirstTokenError(
            f"This tokenizer has no single tokens that tell yes {tokens.yes} from no {tokens.no}: generate text."
        )
    return tokens


class _FirstScores(StoppingCriteria):
    """Keeps the scores that the first token was taken from; stops nothing."""

    first: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        if self.first is None:
            self.first = scores[0][0].detach().float().cpu()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def first_token_answers(
    vlm: Any, samples: Iterable[tuple[Any, str]], *, parser: str = "pope", checked: int = 100, max_new_tokens: int = 16
) -> list[str]:
    """ "yes", "no" or "unknown" for each (image, question), from one forward pass each.

    The first ``checked`` questions are also answered in text and read with ``parser``.

    Raises:
        FirstTokenError: among them, more than 1 % of the first tokens are neither yes nor no, or the two modes
            disagree on more than 1 %.
    """
    out: list[str] = []
    outside = differ = n = 0
    tokens: AnswerTokens | None = None
    tokenizer = getattr(vlm.processor, "tokenizer", vlm.processor)
    for image, question in samples:
        tokens = tokens or answer_tokens(tokenizer, vlm.prompt(question))
        keeper = _FirstScores()
        vlm.ask(image, question, max_new_tokens=1, do_sample=False, return_dict_in_generate=True, output_scores=True,
                stopping_criteria=[keeper])  # fmt: skip
        if keeper.first is None:
            raise FirstTokenError("Generation gave no scores; the first token cannot be read.")
        out.append(tokens.read(keeper.first))
        if n < checked:
            n += 1
            text = vlm.ask(image, question, max_new_tokens=max_new_tokens, do_sample=False).text
            outside += not tokens.holds(int(keeper.first.argmax()))
            differ += parse_answer(text, parser) != out[-1]
            if n == checked:
                _guard(n, outside, differ)
    _guard(n, outside, differ)
    return out


def _guard(n: int, outside: int, differ: int) -> None:
    if max(outside, differ) > TOLERATED * n:
        raise FirstTokenError(
            f"Of {n} questions answered both ways, {outside} began with another token than yes or no, and {differ} "
            "were read differently from the text: the fast mode would be wrong for this model. Generate text instead."
        )
