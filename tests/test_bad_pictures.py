"""Pictures from users: unreadable, huge, hollow or strange ones give one clear error, and the next question works."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import vlm_attn
from tests import models


@pytest.fixture
def vlm() -> Any:
    wrapped = vlm_attn.wrap(models.llava(4), "fastv", processor=models.tiny_processor())
    yield wrapped
    wrapped.close()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims to be huge and holds next to nothing."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    )


def truncated() -> bytes:
    buffer = io.BytesIO()
    models.picture(64, 64).save(buffer, "JPEG")
    return buffer.getvalue()[:-700]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (truncated(), "truncated|damaged"),
        (b"this is a text file, not a picture\n", "not a readable picture"),
        (b"", "not a readable picture"),
        (b"\x89PNG\r\n\x1a\n", "not a readable picture"),
        (png_header(15_000, 15_000), "too large|more than 64,000,000"),
        (png_header(100_000, 100_000), "too large|more than 64,000,000"),
        (png_header(30, 30), "truncated|damaged|not a readable picture"),
    ],
    ids=["truncated", "text", "empty", "stub", "bomb", "bigger bomb", "hollow"],
)
def test_bad_picture_files(vlm: Any, content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        vlm.ask(path, "w5", max_new_tokens=1)
    assert vlm.ask(models.picture(), "w5", max_new_tokens=1).tokens


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 4, 3), dtype=np.float32),
        np.zeros((4, 4, 5), dtype=np.uint8),
        np.zeros((0, 4, 3), dtype=np.uint8),
        "https://example.com/a.png",
        "no/such/file.png",
        b"bytes",
        7,
    ],
    ids=["float", "five channels", "empty", "address", "missing", "bytes", "number"],
)
def test_bad_picture_objects(vlm: Any, image: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="image|picture"):
        vlm.ask(image, "w5", max_new_tokens=1)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
def test_pictures_of_other_modes_are_read(vlm: Any, mode: str) -> None:
    assert vlm.ask(models.picture().convert(mode), "w5", max_new_tokens=2).tokens


def test_bomb_as_object_is_refused(vlm: Any) -> None:
    with pytest.raises(ValueError, match="15000 x 15000"):
        vlm.ask(Image.new("1", (15_000, 15_000)), "w5", max_new_tokens=1)


@pytest.mark.parametrize("size", [(1, 1), (1, 900), (900, 1)])
def test_thin_pictures_are_answered(vlm: Any, size: tuple[int, int]) -> None:
    assert vlm.ask(Image.new("RGB", size, "red"), "w5", max_new_tokens=1).tokens
