"""The errors users meet. Each message says what was given, what was expected and what to do."""

from __future__ import annotations


class UnsupportedError(ValueError):
    """A combination of method, family, backend or generation mode that is refused by name."""


class MissingProfileError(ValueError):
    """A method needs per-checkpoint data that no profile holds; the message names the calibration command."""


class AttachError(ValueError):
    """The model cannot carry a session: not a vision-language model, a missing part, or already attached."""
