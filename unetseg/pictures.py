"""Pictures from files that may be damaged, hostile, or not pictures at all: decoded only when they are sound."""

import warnings
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageOps

from .files import read_bytes

PHOTOS = ["PNG", "JPEG", "BMP", "TIFF", "WEBP"]  # of all that Pillow reads, some start other programs
FLAGS = {"RGB": cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION, "L": cv2.IMREAD_UNCHANGED}
MAX_PIXELS = 8192 * 4096  # what declares more is refused before it is decoded


class BadFile(ValueError):
    """A file that cannot be used; the message names it, what was expected and what was found."""


def read_png(path: Path, mode: str) -> tuple[np.ndarray, dict[str, str]]:
    """Decode an 8-bit PNG: mode "RGB" gives (H, W, 3), mode "L" (H, W), both uint8; and its texts.

    Pillow checks the header and every chunk's checksum, OpenCV decodes (it alone would pass over a truncated file).
    Raises BadFile when the file is damaged or of another mode, OSError when it cannot be read.
    """
    try:
        encoded = read_bytes(path)
        found, (width, height), texts = _inspect(encoded)
        decoded = cv2.imdecode(np.frombuffer(encoded, np.uint8), FLAGS[mode]) if found == mode else None
    except (ValueError, cv2.error) as error:
        raise BadFile(f"{path}: expected a whole PNG file, found {_reason(error, path)}") from None
    if found != mode:
        kind = {"RGB": "an 8-bit RGB image", "L": "8-bit single-channel ids"}[mode]
        raise BadFile(f"{path}: expected {kind} (mode {mode}), found mode {found}")
    if decoded is None or decoded.shape != ((height, width, 3) if mode == "RGB" else (height, width)):
        raise BadFile(f"{path}: expected a whole PNG file, found damaged image data")
    return decoded, texts


def read_photo(path: Path) -> np.ndarray:
    """An 8-bit picture of one of the PHOTOS formats, turned upright, as RGB (H, W, 3) uint8; alpha is dropped.

    Raises BadFile when it is damaged, too large or has more than 8 bits, OSError when it cannot be read.
    """
    try:
        with _open(read_bytes(path), PHOTOS) as picture:
            if picture.mode.startswith(("I", "F")):
                raise ValueError(f"one of more than 8 bits (mode {picture.mode})")
            ImageOps.exif_transpose(picture, in_place=True)
            return np.array(picture if picture.mode == "RGB" else picture.convert("RGB"))
    except Exception as error:  # Pillow names no common base for what damaged files raise
        raise BadFile(f"{path}: expected a readable image, found {_reason(error, path)}") from None


def overlay(image: np.ndarray, painted: np.ndarray, alpha: float = 0.55) -> np.ndarray:
    """Lay class colours over an image; both (H, W, 3) uint8."""
    return cv2.addWeighted(image, 1 - alpha, painted, alpha, 0)


def _open(encoded: bytes, formats: list[str]) -> Image.Image:
    """The picture, not yet decoded: what it declares has cost no memory. Raises ValueError for too many pixels."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            picture = Image.open(BytesIO(encoded), formats=formats)
        except Image.DecompressionBombError:
            picture = None
    if picture is None or picture.width * picture.height > MAX_PIXELS:
        raise ValueError(f"a declared size of more than {MAX_PIXELS} pixels")
    return picture


def _inspect(encoded: bytes) -> tuple[str, tuple[int, int], dict[str, str]]:
    """Mode, (width, height) and texts of a PNG whose chunks are sound. Raises ValueError for any other file."""
    try:
        with _open(encoded, ["PNG"]) as header:
            found = header.mode if encoded[24] == 8 else f"{encoded[24]}-bit {header.mode}"
            found += " with transparency" if "transparency" in header.info else ""
            texts = {key: value for key, value in header.info.items() if isinstance(value, str)}
            header.verify()
            return found, header.size, texts
    except Exception as error:  # Pillow names no common base for what damaged files raise
        raise ValueError(f"{len(encoded)} bytes ({_reason(error)})") from None


def _reason(error: Exception, path: Path | str = "") -> str:
    if "cannot identify" in str(error):
        return "no picture, or a truncated one"
    return str(error).removeprefix(f"{path}: ") or type(error).__name__
