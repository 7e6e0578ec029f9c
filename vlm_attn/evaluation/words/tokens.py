"""The tokens that published CHAIR and AMBER figures are counted on.

Sentences are split first because the Treebank tokenizer detaches a period only at the end of its input; the sentence
rule stands in for NLTK's Punkt model, which needs a download (same CHAIR figures to 0.1 on published files).
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

__all__ = ["treebank_tokens"]

_SENTENCE_END = re.compile(r"""(?:(?<=[.!?])|(?<=[.!?]["')\]]))\s+""")
# Most sentences of a caption are words, commas and an end mark, where the tokenizer's forty substitutions come down to
# a split at blanks. Possessive, so that a hostile text costs one pass.
_PLAIN = re.compile(r"(?:[A-Za-z0-9]++(?:-[A-Za-z0-9]++)*+,?\s++)*+[A-Za-z0-9]++(?:-[A-Za-z0-9]++)*+[.!?]?")
_SPLIT_WORD = re.compile(r"(?i)cannot|gimme|gonna|gotta|lemme|wanna")


@lru_cache(maxsize=1)
def _tokenizer() -> Any:
    from nltk.tokenize.destructive import NLTKWordTokenizer  # type: ignore[import-untyped]

    return NLTKWordTokenizer()


def treebank_tokens(text: str) -> list[str]:
    """Tokens of NLTK's word tokenizer, sentence by sentence; letters keep their case."""
    return [token for sentence in _SENTENCE_END.split(text.strip()) for token in _sentence_tokens(sentence)]


def _sentence_tokens(sentence: str) -> list[str]:
    if not _PLAIN.fullmatch(sentence) or _SPLIT_WORD.search(sentence):
        return list(_tokenizer().tokenize(sentence))
    end = sentence[-1] if sentence[-1] in ".!?" else ""
    words = sentence.removesuffix(end).replace(",", " ,").split()
    return [*words, end] if end else words
