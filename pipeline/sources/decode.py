"""One encoded image: its size from the header, its pixels as RGB. One decode for all teachers.

The first bytes decide the format, never the name. Rules that decide pixels:

- EXIF orientation is applied (in a PNG, that of an eXIf chunk before the pixels, where the
  specification wants it). ICC profiles are ignored: every teacher was trained on uncorrected values.
- Transparent pixels are laid over white, as on a page: the colours behind them are arbitrary.
- 16-bit gray is divided by 257, so that 65535 becomes 255. Pillow itself reduces 16-bit RGB (high byte).
- CMYK of a JPEG is inverted as its Adobe marker says; a JPEG without the marker is not inverted.
- An animation gives its first frame; an animated PNG, the image that other viewers show.
- Metadata never makes an image unreadable, however long or damaged it is (`metadata.py`).

Pillow's plugins are opened directly: `Image.open` would warn about large images before we can refuse
them, and its EXIF parser warns about damaged tags through process-wide state that threads cannot guard.
"""

import contextlib
import struct
from collections.abc import Callable
from io import BytesIO

import numpy as np
from PIL import Image, ImageChops
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from teachercache.pipeline.errors import ImageDecodeError
from teachercache.pipeline.sources.metadata import (
    jpeg_without_metadata,
    png_without_metadata,
    tiff_without_metadata,
)

MAX_PIXELS = 178_956_970  # Pillow's own limit: 512 MiB of RGB
MAX_FILE_BYTES = 8 * MAX_PIXELS  # uncompressed 16-bit RGBA of that many pixels
HEAD_BYTES = 16_384

_ORIENTATION_TAG = 0x0112
_LONG = 4
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class _JpegFile(JpegImageFile):
    """A JPEG whose EXIF only `exif_orientation` reads (Pillow wants the resolution, which is not used)."""

    def getexif(self) -> Image.Exif:
        return Image.Exif()


_READERS: dict[bytes, type[ImageFile]] = {
    b"\xff\xd8\xff": _JpegFile,
    b"\x89PNG\r\n\x1a\n": PngImageFile,
    b"RIFF": WebPImageFile,
    b"GIF8": GifImageFile,
    b"BM": BmpImageFile,
    b"II*\0": TiffImageFile,
    b"MM\0*": TiffImageFile,
}
_WITHOUT_METADATA: dict[type[ImageFile], Callable[[bytes], bytes]] = {
    _JpegFile: jpeg_without_metadata,
    PngImageFile: png_without_metadata,
    TiffImageFile: tiff_without_metadata,
}
_PROBED_BY_HEAD = (_JpegFile, PngImageFile, GifImageFile, BmpImageFile)  # others may store sizes after pixels


def probe_size(head: bytes, nbytes: int, read_all: Callable[[], bytes]) -> tuple[int, int]:
    """(width, height) that `decode_image` would give, from the header alone.

    `head` is the first `HEAD_BYTES` of `nbytes`; `read_all` is called when they are not enough.
    Raises `ImageDecodeError`.
    """
    if nbytes > MAX_FILE_BYTES:
        raise ImageDecodeError(f"a file of {nbytes:,} bytes is larger than {MAX_FILE_BYTES:,}")
    if len(head) < nbytes:
        reader = _reader(head)
        if reader in _PROBED_BY_HEAD:
            with contextlib.suppress(ImageDecodeError):
                return _upright_size(_open(head))
        head = read_all()
    return _upright_size(_open(head))


def decode_image(data: bytes) -> Image.Image:
    """The pixels of an encoded image, mode RGB, upright, without metadata.

    Raises `ImageDecodeError` with a reason, and never returns part of an image.
    """
    image = _open(data)
    orientation = _orientation(image)
    try:
        image.load()
        rgb = _to_rgb(image)
    except ImageDecodeError:
        raise
    except Exception as error:  # Pillow's decoders raise almost any type for damaged data
        raise ImageDecodeError(f"the pixels cannot be decoded: {_describe(error)}") from error
    if orientation in _TRANSPOSE:
        rgb = rgb.transpose(_TRANSPOSE[orientation])
    rgb.info = {}  # nobody shall apply the orientation a second time
    return rgb


def exif_orientation(exif: bytes) -> int:
    """Orientation 1…8 of an EXIF block; 1 (upright) where the tag is absent or the block is damaged."""
    tiff = exif.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return 1
    try:
        (directory,) = struct.unpack_from(order + "I", tiff, 4)
        (count,) = struct.unpack_from(order + "H", tiff, directory)
        for entry in range(directory + 2, directory + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(order + "HH", tiff, entry)
            if tag == _ORIENTATION_TAG:
                (value,) = struct.unpack_from(order + ("I" if kind == _LONG else "H"), tiff, entry + 8)
                return value if value in _TRANSPOSE else 1
    except struct.error:
        return 1
    return 1


def _reader(data: bytes) -> type[ImageFile]:
    if not data:
        raise ImageDecodeError("the file has zero bytes")
    for magic, reader in _READERS.items():
        if data.startswith(magic):
            return reader
    raise ImageDecodeError(f"not an image: it starts with {data[:16]!r}")


def _open(data: bytes) -> ImageFile:
    reader = _reader(data)
    strip = _WITHOUT_METADATA.get(reader, bytes)
    try:
        image = reader(BytesIO(strip(data)))
    except Exception as error:  # as in decode_image
        raise ImageDecodeError(f"the header cannot be read: {_describe(error)}") from error
    if reader is _JpegFile and not image.tile:
        raise ImageDecodeError("the header cannot be read: no pixels follow it")
    if image.width * image.height > MAX_PIXELS:
        raise ImageDecodeError(
            f"{image.width}×{image.height} pixels are more than {MAX_PIXELS:,}, as in a decompression bomb"
        )
    return image


def _orientation(image: ImageFile) -> int:
    # Pillow turns a TIFF itself and puts no "exif" in its info.
    return exif_orientation(image.info.get("exif", b""))


def _upright_size(image: ImageFile) -> tuple[int, int]:
    return (image.height, image.width) if _orientation(image) >= 5 else image.size


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(_gray8(np.asarray(image))).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), rgba).convert("RGB")
    if image.mode == "CMYK" and image.format == "JPEG" and "adobe" not in image.info:
        image = ImageChops.invert(image)  # Pillow inverts every CMYK JPEG, as if it were Adobe's
    return image.convert("RGB")


def _gray8(values: np.ndarray) -> np.ndarray:
    """16-bit integers, or floats in 0…1 or 0…255 (whichever holds them), as uint8."""
    low, high = values.min(), values.max()
    full = 65535.0 if values.dtype.kind != "f" else 1.0 if high <= 1 else 255.0
    if not 0 <= low <= high <= full:  # also false for NaN
        raise ImageDecodeError(f"gray values {low:g}…{high:g} have no agreed range")
    return np.round(values * (255 / full)).astype(np.uint8)


def _describe(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
