"""Error texts for names that are not known: what was given, what is close, what exists."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = ["unknown_name"]


def unknown_name(what: str, given: object, known: Iterable[str]) -> str:
    """A sentence naming the closest known value and listing the others."""
    names = sorted(known)
    close = get_close_matches(str(given), names, n=1, cutoff=0.5)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    shown = ", ".join(names[:40]) + (", ..." if len(names) > 40 else "")
    return f"Unknown {what} {given!r}.{hint} Known: {shown}"
