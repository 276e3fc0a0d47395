"""Strip the metadata from encoded images; all bytes that decide pixels stay the same.

Metadata is ignored, so it must not make an image unreadable: Pillow refuses images with long texts, odd
profiles or wrong checksums of these, and warns about damaged tags, which raises where warnings are errors.
Its limits are process-wide; bytes that never reach it need none. A file that cannot be parsed is unchanged.
"""

import struct
import zlib

_JPEG_READ = {0xE0: b"JFIF", 0xE1: b"Exif\0\0", 0xEE: b"Adobe"}  # the colour space, and the orientation
_SHORTEST_SEGMENT = 11  # with a JFIF or Adobe version
_COMMENT, _SCAN = 0xFE, 0xDA
_ANCILLARY = 0x20  # the bit of a chunk's first letter: no decoder needs to know it

# Tags of TIFF 6.0 and libtiff that say how pixels are stored, compressed, coloured and turned; not dates,
# texts, resolutions, profiles, GeoTIFF and the directories of EXIF and GPS.
_TIFF_READ = {256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 292, 293, 317, 320, 322, 323, 324}
_TIFF_READ |= {325, 332, 334, 338, 339, 347, *range(512, 522), 529, 530, 531, 532}

_TIFF_ORIENTATIONS = {(274, 3, 1), (274, 4, 1)}  # tag, type (SHORT or LONG) and count


def jpeg_without_metadata(data: bytes) -> bytes:
    """Drop segments before the first scan, except those that a decoder uses and EXIF."""
    kept, kept_to, start = [], 0, 2
    while start < len(data) - 3:
        marker = data[start + 1]
        if data[start] != 0xFF or marker in (0, 0xFF):  # junk, or padding
            end, is_read = data.find(b"\xff", start + 1), False
        elif marker == _SCAN or 0xD0 <= marker <= 0xD9:
            break
        else:
            end = start + 2 + (data[start + 2] << 8 | data[start + 3])
            is_read = not (0xE0 <= marker <= 0xEF or marker == _COMMENT) or (
                marker in _JPEG_READ
                and end - start >= _SHORTEST_SEGMENT
                and data.startswith(_JPEG_READ[marker], start + 4)
            )
        if end < 0:
            break
        if not is_read:
            kept.append(data[kept_to:start])
            kept_to = end
        start = end
    return b"".join([*kept, data[kept_to:]]) if kept else data


def png_without_metadata(data: bytes) -> bytes:
    """Keep the critical chunks, the transparency, and a sound eXIf before the pixels; no animation."""
    view, kept, start, at_pixels = memoryview(data), [memoryview(data)[:8]], 8, False
    while start < len(data):
        nbytes, kind = int.from_bytes(data[start : start + 4], "big"), data[start + 4 : start + 8]
        chunk = view[start : start + 12 + nbytes]
        at_pixels = at_pixels or kind == b"IDAT"
        critical = not kind or not kind[0] & _ANCILLARY
        if critical or kind == b"tRNS" or (kind == b"eXIf" and not at_pixels and _is_sound(chunk)):
            kept.append(chunk)
        start += len(chunk)
        if kind == b"IEND":
            break
    return b"".join(kept)


def _is_sound(chunk: memoryview) -> bool:
    return zlib.crc32(chunk[4:-4]).to_bytes(4, "big") == chunk[-4:]


def tiff_without_metadata(data: bytes) -> bytes:
    """Keep only the first directory, in its place, with the tags that decide pixels."""
    order = "<" if data.startswith(b"II") else ">"
    try:
        (start,) = struct.unpack_from(order + "I", data, 4)
        (count,) = struct.unpack_from(order + "H", data, start)
        tags = [struct.unpack_from(order + "HHI", data, start + 2 + 12 * i) for i in range(count)]
        struct.unpack_from("I", data, start + 2 + 12 * count)
    except struct.error:
        return data
    first = start + 2
    kept = [
        data[first + 12 * i : first + 12 * i + 12]
        for i, tag in enumerate(tags)
        if tag[0] in _TIFF_READ or tag in _TIFF_ORIENTATIONS
    ]
    directory = struct.pack(order + "H", len(kept)) + b"".join(kept)
    return data[:start] + directory.ljust(2 + 12 * count + 4, b"\0") + data[first + 12 * count + 4 :]
