"""The rule singulariser of the first CHAIR code (CLiPS Pattern's), driven by its published tables.

The rules are kept with their slips, because published figures depend on them: "bus" becomes "bu", "ties" becomes "ty".
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

__all__ = ["load_singular", "singulariser"]


def singulariser(tables: Mapping[str, Any]) -> Callable[[str], str]:
    """The singular of a lower-case noun token, as a cached function.

    ``tables``: ``plural_prepositions``, ``uninflected``, ``uncountable``, ``ie`` (lists), ``irregular`` (mapping) and
    ``rules`` (pairs of pattern and replacement); the order of ``irregular`` and ``rules`` decides.
    """
    prepositions = frozenset(tables["plural_prepositions"])
    unchanged = (*tables["uninflected"], *tables["uncountable"])
    ie_forms = tuple(form + "s" for form in tables["ie"])
    irregular = dict(tables["irregular"])
    rules = [(re.compile(pattern), replacement) for pattern, replacement in tables["rules"]]

    @lru_cache(maxsize=1 << 16)
    def singular(word: str) -> str:
        parts = word.split("-")
        if len(parts) > 1 and parts[1] in prepositions:
            return "-".join((singular(parts[0]), *parts[1:]))
        if word.endswith("'"):
            return singular(word[:-1]) + "'s"
        # the reversed test of the original: the table's entry ends with the token, so that "s" stays as it is
        if any(entry.endswith(word) for entry in unchanged) or word.endswith(ie_forms):
            return word
        for plural, one in irregular.items():
            if word.endswith(plural):
                return word[: -len(plural)] + one
        for pattern, replacement in rules:
            if pattern.search(word):
                return pattern.sub(replacement, word)  # a group that did not match is replaced by nothing
        return word

    return singular


def load_singular(path: Path | None) -> Callable[[str], str]:
    """From ``singularize_rules.json``; without it from the package ``textblob``, which carries the same rules."""
    if path is not None:
        return singulariser(json.loads(path.read_text(encoding="utf-8")))
    try:
        from textblob.en.inflect import singularize  # type: ignore[import-not-found]
    except ModuleNotFoundError as error:
        raise FileNotFoundError(
            "CHAIR variant A needs singularize_rules.json in the data folder, or the package textblob "
            "(pip install textblob). Or score the other variant: variant=BB."
        ) from error
    return lru_cache(maxsize=1 << 16)(lambda word: str(singularize(word)))
