"""Profiles: the per-checkpoint data that some methods need (sink dimensions, positional trend, ...).

A profile is one JSON file. ``wrap`` and ``attach`` look for it, in this order, in the checkpoint's own folder
(``vlm_attn_profile.json``) and in the user's profile folder (``VLM_ATTN_PROFILES`` or
``~/.cache/vlm_attn/profiles``), named after the checkpoint. ``vlm-attn calibrate`` writes it. Behind both stand the
values that authors published for a checkpoint of exactly this name.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

from .errors import MissingProfileError

BUNDLED = {"scenes": Path(__file__).parent / "scenes" / "checkpoint"}
"""Checkpoints that ship with the package, by the name users give them."""
PUBLISHED = Path(__file__).with_name("published.json")
FILE_NAME = "vlm_attn_profile.json"
FORMAT = 1


def user_folder() -> Path:
    """Folder of the profiles that this user calibrated."""
    return Path(os.environ.get("VLM_ATTN_PROFILES") or Path.home() / ".cache" / "vlm_attn" / "profiles")


def user_file(checkpoint: str) -> Path:
    """Profile file of one checkpoint in the user's folder; separators in the name cannot leave the folder."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "--", checkpoint.strip("/")).lstrip(".") or "unnamed"
    return user_folder() / f"{name}.json"


def public_name(checkpoint: str) -> str:
    """The name a user would give: of a bundled checkpoint its short name, otherwise what was loaded."""
    return next((name for name, folder in BUNDLED.items() if str(folder) == checkpoint), checkpoint)


class Profile:
    """Per-checkpoint data, a mapping from an entry name (``"sinks"``, ``"trend:last_row@1"``) to its record."""

    def __init__(self, checkpoint: str, signature: dict[str, Any], entries: dict[str, Any] | None = None):
        self.checkpoint = checkpoint
        self.signature = signature
        self.entries: dict[str, Any] = dict(entries or {})

    def need(self, entry: str, method: str) -> dict[str, Any]:
        """The record of ``entry``.

        Raises:
            MissingProfileError: the entry was never calibrated for this checkpoint.
        """
        if entry not in self.entries:
            name = self.checkpoint or "CHECKPOINT"
            raise MissingProfileError(
                f"{method} needs '{entry}' for checkpoint '{name}' and no profile holds it: run "
                f"`vlm-attn calibrate {name} --for {method}`, or give the values as parameters of {method}"
            )
        record = self.entries[entry]
        if not isinstance(record, dict):
            raise ValueError(f"profile entry '{entry}' of '{self.checkpoint}' is not a mapping: calibrate again")
        return record

    def save(self, path: Path) -> None:
        """Writes the profile atomically."""
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(
            {
                "format": FORMAT,
                "checkpoint": self.checkpoint,
                "signature": self.signature,
                "entries": self.entries,
            },
            indent=2,
            sort_keys=True,
        )
        handle, tmp = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text + "\n")
            os.replace(tmp, path)
        except BaseException:
            Path(tmp).unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path: Path, signature: dict[str, Any]) -> Profile:
        """Reads a profile and refuses one that was calibrated on a model of another shape.

        Raises:
            ValueError: unreadable file, newer format, or another model's data.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"profile {path} cannot be read ({error}): calibrate again") from error
        if not isinstance(data, dict) or not isinstance(data.get("entries"), dict):
            raise ValueError(f"profile {path} is not a vlm-attn profile: calibrate again")
        if data.get("format", 0) > FORMAT:
            raise ValueError(f"profile {path} was written by a newer vlm-attn: upgrade, or calibrate again")
        if data.get("signature") != signature:
            raise ValueError(
                f"profile {path} belongs to a model with {data.get('signature')}, this one has {signature}: "
                "calibrate again"
            )
        return cls(str(data.get("checkpoint", "")), signature, data["entries"])


def published(checkpoint: str) -> dict[str, Any]:
    """What authors published for this very checkpoint (``published.json``); empty for any other."""
    found = json.loads(PUBLISHED.read_text(encoding="utf-8")).get(checkpoint, {})
    return dict(found) if isinstance(found, dict) else {}


def find(checkpoint: str, signature: dict[str, Any]) -> Profile:
    """The profile of a checkpoint; an empty one when none was calibrated (methods that need data then raise)."""
    folder = Path(checkpoint) if checkpoint else None
    candidates = [folder / FILE_NAME] if folder is not None and folder.is_dir() else []
    if checkpoint:
        candidates.insert(0, user_file(checkpoint))
    entries: dict[str, Any] = published(checkpoint)
    for path in reversed(candidates):
        if path.is_file():
            entries.update(Profile.load(path, signature).entries)
    return Profile(public_name(checkpoint), signature, entries)
