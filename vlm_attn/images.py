"""Pictures from users: opened locally, bounded in size, fully decoded or refused."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from PIL import Image

MAX_PIXELS = 64_000_000

ImageLike = Image.Image | np.ndarray | Path | str


def load_image(image: ImageLike) -> Image.Image:
    """An RGB picture from a PIL image, a uint8 array ``[H, W(, 3)]`` or a local file.

    Raises:
        ValueError: not a picture, truncated, or more than ``MAX_PIXELS`` pixels; or a URL.
        TypeError: another kind of object.
    """
    if isinstance(image, Image.Image):
        check_size(image.size)
        return _decode(image, "the given image")
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (3, 4)):
            raise ValueError(f"an image array is uint8 [H, W] or [H, W, 3], not {image.dtype} {image.shape}")
        check_size((image.shape[1], image.shape[0]))
        return Image.fromarray(image).convert("RGB")
    if isinstance(image, str | Path):
        if "://" in str(image):
            raise ValueError("images are not fetched from addresses; download the picture and give its local path")
        path = Path(image)
        if not path.is_file():
            raise ValueError(f"image file {path} does not exist")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            try:
                with Image.open(path) as file:
                    check_size(file.size)
                    return _decode(file, str(path))
            except Image.DecompressionBombError as error:
                raise ValueError(f"{path} is too large: at most {MAX_PIXELS:,} pixels") from error
            except OSError as error:
                raise ValueError(f"{path} is not a readable picture ({error})") from error
    raise TypeError(f"an image is a PIL image, a uint8 array or a local path, not {type(image).__name__}")


def check_size(size: tuple[int, int]) -> None:
    """Raises ValueError for empty pictures and for more than ``MAX_PIXELS`` pixels."""
    width, height = size
    if width < 1 or height < 1:
        raise ValueError(f"the picture is empty ({width} x {height} pixels)")
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"the picture has {width} x {height} pixels, more than {MAX_PIXELS:,}: scale it down before asking"
        )


def _decode(image: Image.Image, name: str) -> Image.Image:
    try:
        return image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{name} is truncated or damaged ({error})") from error
