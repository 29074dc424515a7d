"""Reading image files that may be damaged, too large, or no images at all; the only door to OpenCV."""

import contextlib
import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from .files import UserError, read_bytes

try:
    import cv2
except ImportError as error:
    advice = "install its headless build: pip uninstall -y opencv-python && pip install opencv-python-headless"
    raise UserError(f"OpenCV cannot be imported here ({error}); on a machine without a display {advice}") from None

PHOTOS = ["PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF", "AVIF"]  # Pillow reads more; some of those start other programs
with contextlib.suppress(ImportError):
    import pillow_heif  # where it is installed

    pillow_heif.register_heif_opener()
    PHOTOS.append("HEIF")
FLAGS = {"RGB": cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION, "L": cv2.IMREAD_UNCHANGED}
MAX_PIXELS = 2 * Image.MAX_IMAGE_PIXELS  # 179 million; a file that declares more is refused before it is decoded
HEIC = (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftypmsf1", b"ftyphevc")


class BadFile(UserError):
    """A file that cannot be used; the message names it, and says what was expected and what was found."""


def read_png(path: Path, mode: str, encoded: bytes | None = None) -> np.ndarray:
    """Decode an 8-bit PNG: mode "RGB" gives (H, W, 3), mode "L" (H, W), both uint8.

    encoded  the file's content, where it was read before
    Pillow checks the header and every chunk; OpenCV decodes (on its own it accepts truncated files).
    Raises BadFile when the file is damaged or has another mode.
    """
    encoded = read_bytes(path) if encoded is None else encoded
    kind = {"RGB": "an 8-bit RGB image", "L": "8-bit single-channel ids"}[mode]
    try:
        with _open(encoded, ["PNG"]) as header:
            found = header.mode if encoded[24] == 8 else f"{encoded[24]}-bit {header.mode}"
            found += " with transparency" if "transparency" in header.info else ""
            header.verify()
            shape = (header.height, header.width, 3) if mode == "RGB" else (header.height, header.width)
        image = cv2.imdecode(np.frombuffer(encoded, np.uint8), FLAGS[mode]) if found == mode else None
    except Exception as error:  # Pillow has no common base class for the errors of damaged files
        raise BadFile(f"{path}: expected a complete PNG file, found {len(encoded)} bytes: {_reason(error)}") from None
    if found != mode:
        raise BadFile(f"{path}: expected {kind} (mode {mode}), found mode {found}")
    if image is None or image.shape != shape:
        raise BadFile(f"{path}: expected a complete PNG file, found damaged image data")
    return image


def read_pixels(path: Path, encoded: bytes, indexed: bool = False) -> np.ndarray:
    """What a PNG or JPEG file holds, where that is certain: (H, W) or RGB (H, W, 3), uint8. An opaque alpha is dropped.

    indexed  whether a palette's indices are meant, or its colours
    Raises BadFile when the file is damaged, transparent, or has values above 255.
    """
    png, depth, kind = encoded[:4] == b"\x89PNG", *encoded[24:26].ljust(2, b"\0")
    if png and depth == 8 and kind in (0, 2):
        return read_png(path, "RGB" if kind else "L", encoded)
    try:
        with _open(encoded, ["PNG", "JPEG"]) as picture:
            ImageOps.exif_transpose(picture, in_place=True)
            found = f"{depth}-bit {picture.mode}" if png and depth != 8 else picture.mode
            pixels = np.array(picture if indexed or picture.mode != "P" else picture.convert("RGBA"))
    except Exception as error:  # Pillow has no common base class for the errors of damaged files
        raise BadFile(f"{path}: expected a complete PNG or JPEG file, found {_reason(error)}") from None
    pixels = pixels[..., :3] if pixels.ndim == 3 and pixels.shape[2] == 4 and pixels[..., 3].min() == 255 else pixels
    certain = found in ("L", "RGB", "RGBA", "1-bit 1", "16-bit I;16") or found.endswith("P")
    if not certain or pixels.shape[2:] not in ((), (3,)) or pixels.max(initial=0) > 255:
        expected = "an opaque 8-bit RGB image, ids or a palette"
        raise BadFile(f"{path}: expected {expected}, found mode {found}, up to {pixels.max()}")
    return np.ascontiguousarray(pixels, np.uint8)


def read_photo(path: Path) -> np.ndarray:
    """An image in one of the PHOTOS formats, turned upright, as RGB (H, W, 3) uint8 without alpha.

    Raises BadFile when it is damaged, too large, an animation, or grey with more than 8 bits.
    """
    try:
        encoded = read_bytes(path)
        if encoded[4:12] in HEIC and "HEIF" not in PHOTOS:
            raise ValueError("HEIC, which needs `pip install pillow-heif`, or conversion to JPEG")
        with _open(encoded, PHOTOS) as picture:
            if picture.mode.startswith(("I", "F")):
                raise ValueError(f"an image with more than 8 bits (mode {picture.mode})")
            if getattr(picture, "is_animated", False) and picture.format != "MPO":  # of phones: with a second view
                raise ValueError(f"{picture.n_frames} pictures in one {picture.format} file; convert it to a video")
            ImageOps.exif_transpose(picture, in_place=True)
            return np.array(picture if picture.mode == "RGB" else picture.convert("RGB"))
    except Exception as error:  # as above
        raise BadFile(f"{path}: expected a readable image, found {_reason(error, path)}") from None


def shrink(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize (H, W, 3) uint8 to `size` (width, height): by area averaging, or linearly where a side must grow."""
    shrinks = image.shape[1] >= size[0] and image.shape[0] >= size[1]
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def overlay(image: np.ndarray, painted: np.ndarray, alpha: float = 0.55) -> np.ndarray:
    """Lay class colours over an image; both (H, W, 3) uint8."""
    return cv2.addWeighted(image, 1 - alpha, painted, alpha, 0)


def _open(encoded: bytes, formats: list[str]) -> Image.Image:
    """The image, not yet decoded. Raises ValueError when it declares too many pixels."""
    with warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning):
        try:
            return Image.open(BytesIO(encoded), formats=formats)
        except Image.DecompressionBombError:
            raise ValueError(f"a declared size of more than {MAX_PIXELS} pixels") from None


def _reason(error: Exception, path: Path | str = "") -> str:
    if "cannot identify" in str(error):
        return "no image, or a truncated one"
    return str(error).removeprefix(f"{path}: ") or type(error).__name__
