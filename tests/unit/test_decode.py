import contextlib
import io
import random
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from teachercache.pipeline.errors import ImageDecodeError
from teachercache.pipeline.sources.decode import (
    HEAD_BYTES,
    MAX_FILE_BYTES,
    MAX_PIXELS,
    decode_image,
    exif_orientation,
    probe_size,
)
from tests.images import encode, exif, insert_segment, jpeg_segment, photo, png_chunk


def pixels(data: bytes) -> np.ndarray:
    image = decode_image(data)
    assert image.mode == "RGB"
    return np.asarray(image)


def probe(data: bytes) -> tuple[int, int]:
    return probe_size(data[:HEAD_BYTES], len(data), lambda: data)


def must_not_read() -> bytes:
    raise AssertionError("the head was enough")


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_plain_images_decode_as_pillow_does(format: str) -> None:
    data = encode(photo(), format)
    expected = Image.open(io.BytesIO(data)).convert("RGB")
    assert np.array_equal(pixels(data), np.asarray(expected))
    assert probe(data) == (40, 30)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(format: str, orientation: int) -> None:
    tags = Image.Exif()
    tags[0x0112] = orientation
    data = encode(photo(), format, exif=tags)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    decoded = decode_image(data)
    assert np.array_equal(np.asarray(decoded), np.asarray(expected))
    assert probe(data) == decoded.size == expected.size
    assert decoded.info == {}
    assert ImageOps.exif_transpose(decoded).size == decoded.size


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", ["H", "I"])
def test_orientation_is_read_in_every_spelling(order: str, kind: str) -> None:
    assert [exif_orientation(exif(value, order, kind)) for value in range(10)] == [1, *range(1, 9), 1]


@pytest.mark.parametrize(
    "block",
    [b"", b"Exif\0\0", exif(6)[:12], exif(6)[:20], b"Exif\0\0XX" + exif(6)[8:], exif(6)[:10] + b"\xff" * 4],
    ids=["nothing", "no header", "no directory", "half a tag", "no byte order", "offset far outside"],
)
def test_damaged_exif_leaves_the_image_upright_and_warns_nobody(block: bytes) -> None:
    upright = encode(photo(), "JPEG")
    data = insert_segment(upright, jpeg_segment(0xE1, block))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert np.array_equal(pixels(data), pixels(upright))
        assert probe(data) == (40, 30)
    assert not caught


def test_png_orientation_counts_before_the_pixels_only() -> None:
    data = encode(photo(), "PNG")
    chunk = png_chunk(b"eXIf", exif(6).removeprefix(b"Exif\0\0"))
    end_of_header, start_of_end = 33, len(data) - 12
    assert data[start_of_end + 4 :][:4] == b"IEND"
    before = data[:end_of_header] + chunk + data[end_of_header:]
    behind = data[:start_of_end] + chunk + data[start_of_end:]
    assert probe(before) == decode_image(before).size == (30, 40)
    assert probe(behind) == decode_image(behind).size == (40, 30)


def test_16_bit_gray_is_scaled_not_clipped() -> None:
    values = np.array([[0, 128, 129, 257, 40_000, 65_535]], np.uint16)
    expected = [0, 0, 1, 1, 156, 255]
    assert pixels(encode(Image.fromarray(values), "PNG"))[0, :, 0].tolist() == expected
    assert pixels(encode(Image.fromarray(values.astype(np.int32)), "TIFF"))[0, :, 2].tolist() == expected


def test_16_bit_rgb_keeps_the_whole_range() -> None:
    rows = b"".join(b"\0" + struct.pack(">3H", value, 65_535 - value, 32_896) for value in (0, 65_535))
    header = struct.pack(">IIBBBBB", 1, 2, 16, 2, 0, 0, 0)
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")
    data = b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(kind, payload) for kind, payload in chunks)
    assert pixels(data).tolist() == [[[0, 255, 128]], [[255, 0, 128]]]


def test_float_images_have_one_of_two_ranges() -> None:
    unit = np.array([[0.0, 0.5, 1.0]], np.float32)
    expected = [0, 128, 255]
    assert pixels(encode(Image.fromarray(unit), "TIFF"))[0, :, 0].tolist() == expected
    assert pixels(encode(Image.fromarray(unit * 255), "TIFF"))[0, :, 0].tolist() == expected


@pytest.mark.parametrize("worst", [np.nan, np.inf, -1.0, 256.0])
def test_float_values_out_of_range_are_refused(worst: float) -> None:
    data = encode(Image.fromarray(np.array([[0.0, worst]], np.float32)), "TIFF")
    with pytest.raises(ImageDecodeError, match="no agreed range"):
        decode_image(data)


def test_32_bit_integers_are_refused() -> None:
    with pytest.raises(ImageDecodeError, match="no agreed range"):
        decode_image(encode(Image.fromarray(np.array([[0, 70_000]], np.int32)), "TIFF"))


def test_gray_and_1_bit() -> None:
    gray = photo().convert("L")
    assert np.array_equal(pixels(encode(gray, "PNG")), np.stack([np.asarray(gray)] * 3, axis=-1))
    bits = gray.convert("1")
    assert np.array_equal(pixels(encode(bits, "PNG"))[..., 0], np.asarray(bits) * np.uint8(255))


def over_white(colour: float, alpha: float) -> float:
    return colour * alpha / 255 + 255 - alpha


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_transparency_is_laid_over_white(format: str) -> None:
    rgba = Image.new("RGBA", (3, 1))
    for x, alpha in enumerate((0, 100, 255)):
        rgba.putpixel((x, 0), (10, 200, 30, alpha))
    expected = [[over_white(c, alpha) for c in (10, 200, 30)] for alpha in (0, 100, 255)]
    found = pixels(encode(rgba, format, lossless=True, exact=True))[0]
    assert np.abs(found - np.array(expected)).max() <= 1


def test_gray_with_alpha() -> None:
    data = encode(Image.fromarray(np.array([[[40, 0], [40, 128], [40, 255]]], np.uint8), "LA"), "PNG")
    found = pixels(data)[0, :, 1]
    assert np.abs(found - [over_white(40, alpha) for alpha in (0, 128, 255)]).max() <= 1


@pytest.mark.parametrize("transparency", [b"\x00\xff", 0], ids=["alpha of each entry", "one entry"])
def test_palette_with_transparency(transparency: bytes | int) -> None:
    image = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    image.putpalette([255, 0, 0, 0, 0, 255])
    assert pixels(encode(image, "PNG"))[0].tolist() == [[255, 0, 0], [0, 0, 255]]
    found = pixels(encode(image, "PNG", transparency=transparency))[0]
    assert found.tolist() == [[255, 255, 255], [0, 0, 255]]


def test_one_transparent_colour() -> None:
    gray = Image.fromarray(np.array([[7, 8]], np.uint8))
    assert pixels(encode(gray, "PNG", transparency=7))[0, :, 0].tolist() == [255, 8]
    rgb = Image.fromarray(np.array([[[1, 2, 3], [1, 2, 4]]], np.uint8))
    found = pixels(encode(rgb, "PNG", transparency=(1, 2, 3)))[0]
    assert found.tolist() == [[255, 255, 255], [1, 2, 4]]


def test_cmyk_is_inverted_as_its_adobe_marker_says() -> None:
    cmyk = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    data = encode(cmyk, "JPEG", quality=100)
    adobe = data.index(b"\xff\xee\x00\x0eAdobe")
    without = data[:adobe] + data[adobe + 16 :]
    assert np.abs(pixels(data)[8, 8].astype(int) - [0, 255, 255]).max() <= 2
    # Without the marker the stored values are ink as they stand: 0 cyan, full magenta, yellow and black.
    assert np.abs(pixels(without)[8, 8].astype(int) - [0, 0, 0]).max() <= 2


def test_icc_profiles_are_ignored() -> None:
    plain = encode(photo(), "PNG")
    assert np.array_equal(pixels(encode(photo(), "PNG", icc_profile=b"any profile")), pixels(plain))


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP"])
def test_first_frame_of_an_animation(format: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    data = encode(frames[0], format, save_all=True, append_images=frames[1:], duration=50, lossless=True)
    assert pixels(data)[4, 4].tolist() == [255, 0, 0]


def test_1x1() -> None:
    data = encode(Image.new("RGB", (1, 1), (0, 0, 0)))
    assert pixels(data).tolist() == [[[0, 0, 0]]]
    assert probe(data) == (1, 1)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "zero bytes"),
        (b"<!DOCTYPE html><html>404</html>", "not an image: it starts with b'<!DOCTYPE html>"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "not an image"),
        (b"\xff\xd8\xff", "header cannot be read"),
        (b"\x89PNG\r\n\x1a\n", "header cannot be read"),
        (b"RIFF\0\0\0\0WEBP", "header cannot be read"),
    ],
    ids=["empty", "html", "lfs pointer", "jpeg", "png", "webp"],
)
def test_what_is_no_image_says_what_it_is(data: bytes, reason: str) -> None:
    for attempt in (decode_image, probe):
        with pytest.raises(ImageDecodeError, match=reason):
            attempt(data)


def bomb(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(kind, payload) for kind, payload in chunks)


def test_decompression_bombs_are_refused_before_pillow_looks() -> None:
    assert MAX_PIXELS > Image.MAX_IMAGE_PIXELS  # type: ignore[operator]  # where Pillow starts to warn
    for attempt in (decode_image, probe):
        with pytest.raises(ImageDecodeError, match="20000×20000 pixels are more than 178,956,970"):
            attempt(bomb(20_000, 20_000))
    assert probe(bomb(MAX_PIXELS // 10_000, 10_000)) == (MAX_PIXELS // 10_000, 10_000)
    with pytest.raises(ImageDecodeError, match="larger than"):
        probe_size(b"\xff\xd8\xff", MAX_FILE_BYTES + 1, must_not_read)


@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("PNG", {}),
        ("WEBP", {}),
        ("WEBP", {"lossless": True}),
        ("GIF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
    ],
)
def test_a_truncated_image_never_gives_partial_pixels(format: str, options: dict[str, object]) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8))
    data = encode(noise, format, **options)
    whole = pixels(data)
    refused = 0
    for cut in range(0, len(data), max(1, len(data) // 300)):
        try:
            found = pixels(data[:cut])
        except ImageDecodeError:
            refused += 1
        else:  # only what stands behind the pixels is gone
            assert np.array_equal(found, whole)
            assert cut > 0.9 * len(data)
    assert refused > 200


def test_the_head_is_enough_for_jpeg_and_png() -> None:
    for format in ("JPEG", "PNG"):
        noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 300, 3), np.uint8))
        data = encode(noise, format)
        assert len(data) > HEAD_BYTES
        assert probe_size(data[:HEAD_BYTES], len(data), must_not_read) == (300, 200)


def test_the_head_is_enough_for_gif_and_bmp() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 300, 3), np.uint8))
    for format in ("GIF", "BMP"):
        data = encode(noise, format)
        assert probe_size(data[:HEAD_BYTES], len(data), must_not_read) == (300, 200)
        for cut in range(6, 3000, 7):
            assert probe_size(data[:cut], len(data), partial(bytes, data)) == (300, 200)


@pytest.mark.parametrize("behind_the_head", [False, True])
def test_long_metadata_before_the_size_is_read_through(behind_the_head: bool) -> None:
    padding = [jpeg_segment(0xE5, bytes(60_000))] * 3
    turned = jpeg_segment(0xE1, exif(6))
    segments = [*padding, turned] if behind_the_head else [turned, *padding]
    data = insert_segment(encode(photo()), b"".join(segments))
    assert probe(data) == decode_image(data).size == (30, 40)


WORKFLOW = zlib.compress(b"{'workflow': 1}" * 150_000)  # 2.2 MB, as image generators embed
ICC = b"ICC_PROFILE\0"
PNG_METADATA = {
    "compressed text": png_chunk(b"zTXt", b"workflow\0\0" + WORKFLOW),
    "compressed international text": png_chunk(b"iTXt", b"workflow\0\1\0en\0\0" + WORKFLOW),
    "much text": png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1_000_000))) * 70,
    "text of an unknown compression": png_chunk(b"zTXt", b"a\0\7" + WORKFLOW),
    "text with a wrong checksum": png_chunk(b"tEXt", b"a\0b")[:-1] + b"!",
    "a profile of an unknown compression": png_chunk(b"iCCP", b"a\0\7b"),
    "an empty profile": png_chunk(b"iCCP", b""),
    "a large profile": png_chunk(b"iCCP", b"a\0\0" + WORKFLOW),
    "a short resolution": png_chunk(b"pHYs", b"ab"),
    "an empty rendering intent": png_chunk(b"sRGB", b""),
    "a short gamma": png_chunk(b"gAMA", b"a"),
    "short chromaticities": png_chunk(b"cHRM", b"abc"),
    "an animation of no frames": png_chunk(b"acTL", bytes(8)),
    "frames out of order": png_chunk(b"fcTL", struct.pack(">5I2H2B", 7, 40, 30, 0, 0, 1, 1, 0, 0)),
    "EXIF with a wrong checksum": png_chunk(b"eXIf", exif(6)[6:])[:-1] + b"!",
    "EXIF of nothing": png_chunk(b"eXIf", b"garbage"),
    "a chunk of a strange name": png_chunk(b"t\xffX\0", b"a"),
    "an unknown chunk": png_chunk(b"prVt", bytes(100_000)),
}
JPEG_METADATA = {
    "no profile": jpeg_segment(0xE2, ICC),
    "half of a profile": jpeg_segment(0xE2, ICC + b"\1\2half"),
    "a short JFIF": jpeg_segment(0xE0, b"JFIF\0"),
    "a short Adobe marker": jpeg_segment(0xEE, b"Adobe"),
    "damaged EXIF": jpeg_segment(0xE1, exif(6)[:12] + b"\xff" * 9),
    "10 MB of segments": jpeg_segment(0xE5, bytes(65_000)) * 160,
    "XMP": jpeg_segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + bytes(60_000)),
    "a damaged Photoshop block": jpeg_segment(0xED, b"Photoshop 3.0\x008BIM\x03\xed\xff"),
    "a comment": jpeg_segment(0xFE, b"\xff" * 60_000),
    "padding and junk": b"\xff" * 9 + jpeg_segment(0xE2, ICC) + b"junk\xff\0" + jpeg_segment(0xE2, ICC),
}


def with_chunk(png: bytes, chunk: bytes, behind: bool) -> bytes:
    place = len(png) - 12 if behind else 33
    return png[:place] + chunk + png[place:]


@pytest.mark.parametrize("behind", [False, True], ids=["before the pixels", "behind the pixels"])
@pytest.mark.parametrize("name", PNG_METADATA)
def test_metadata_never_costs_a_png(name: str, behind: bool) -> None:
    plain = encode(photo(), "PNG")
    data = with_chunk(plain, PNG_METADATA[name], behind)
    assert np.array_equal(pixels(data), pixels(plain))
    assert probe(data) == (40, 30)
    clear = Image.new("RGBA", (40, 30), (9, 9, 9, 0))
    clear.putpixel((3, 4), (9, 9, 9, 255))
    data = with_chunk(encode(clear.convert("P"), "PNG", transparency=0), PNG_METADATA[name], behind)
    assert np.array_equal(pixels(data), pixels(encode(clear.convert("P"), "PNG", transparency=0)))


@pytest.mark.parametrize("name", JPEG_METADATA)
def test_metadata_never_costs_a_jpeg(name: str) -> None:
    plain = insert_segment(encode(photo()), jpeg_segment(0xE1, exif(6)))
    behind = plain.index(b"\xff\xdb")
    for place in (2, behind):
        data = plain[:place] + JPEG_METADATA[name] + plain[place:]
        if name == "damaged EXIF" and place == 2:
            assert probe(data) == decode_image(data).size == (40, 30)
            continue
        assert np.array_equal(pixels(data), pixels(plain))
        assert probe(data) == (30, 40)


TIFF_METADATA = {
    "a text that ends outside": (270, 2, 1 << 30, 1 << 20),
    "an unknown type": (305, 77, 1, 0),
    "too many resolutions": (282, 5, 9, 8),
    "a profile that ends outside": (34675, 7, 1 << 30, 0),
    "a directory outside": (34665, 4, 1, 1 << 30),
    "a directory in itself": (34853, 4, 1, 8),
    "XMP": (700, 1, 1 << 29, 0),
    "a private tag": (65_000, 2, 1 << 31, 0),
}


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
@pytest.mark.parametrize("order", ["II", "MM"])
@pytest.mark.parametrize("name", TIFF_METADATA)
def test_metadata_never_costs_a_tiff(name: str, order: str, compression: str) -> None:
    image = Image.fromarray(
        np.arange(1200, dtype=np.uint16).reshape(30, 40).astype(f"{'<>'[order == 'MM']}u2")
    )
    plain = encode(image, "TIFF", compression=compression, tiffinfo={305: "x" * 20, 274: 6})
    data, order = bytearray(plain), "<" if plain[:2] == b"II" else ">"
    (start,) = struct.unpack_from(order + "I", data, 4)
    (count,) = struct.unpack_from(order + "H", data, start)
    places = {
        struct.unpack_from(order + "H", data, at)[0]: at
        for at in range(start + 2, start + 2 + 12 * count, 12)
    }
    struct.pack_into(order + "HHII", data, places[305], *TIFF_METADATA[name])
    assert np.array_equal(pixels(bytes(data)), pixels(plain))
    assert probe(bytes(data)) == (30, 40)


@pytest.mark.parametrize("tag", [(274, 2, 1 << 30, 1 << 20), (274, 3, 2, 6), (274, 3, 0, 6), (274, 5, 1, 8)])
def test_an_orientation_that_is_none_leaves_a_tiff_upright(tag: tuple[int, int, int, int]) -> None:
    data = bytearray(encode(photo(), "TIFF", tiffinfo={274: 6}))
    assert probe(bytes(data)) == (30, 40)
    struct.pack_into("<HHII", data, data.index(struct.pack("<HHI", 274, 3, 1)), *tag)
    assert np.array_equal(pixels(bytes(data)), pixels(encode(photo(), "TIFF")))
    assert probe(bytes(data)) == (40, 30)


@pytest.mark.parametrize("kind", ["icc_profile", "exif", "xmp"])
@pytest.mark.parametrize("content", [b"garbage", bytes(2_000_000)], ids=["short", "long"])
def test_metadata_never_costs_a_webp(kind: str, content: bytes) -> None:
    plain = encode(photo(), "WEBP", lossless=True)
    data = encode(photo(), "WEBP", lossless=True, **{kind: content})
    assert content in data
    assert np.array_equal(pixels(data), pixels(plain))
    assert probe(data) == (40, 30)


def test_metadata_never_costs_a_gif() -> None:
    plain = encode(photo(), "GIF")
    assert np.array_equal(pixels(encode(photo(), "GIF", comment=bytes(2_000_000))), pixels(plain))


def test_damage_of_what_decides_pixels_is_still_refused() -> None:
    image = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    image.putpalette([255, 0, 0, 0, 0, 255])
    data = encode(image, "PNG", transparency=0)
    for kind in (b"IHDR", b"PLTE", b"tRNS"):
        damaged = bytearray(data)
        damaged[data.index(kind) + 4] ^= 1
        with pytest.raises(ImageDecodeError):
            decode_image(bytes(damaged))


def test_errors_name_a_reason_on_one_line() -> None:
    data = encode(photo(400, 300))
    with pytest.raises(ImageDecodeError) as caught:
        decode_image(data[: len(data) // 2])
    assert caught.value.problem.startswith("the pixels cannot be decoded: image file is truncated")
    assert "\n" not in str(caught.value)


@settings(max_examples=300, deadline=None)
@given(
    format=st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"]),
    seed=st.integers(0, 2**32),
    flips=st.integers(1, 40),
)
def test_damaged_data_raises_nothing_but_our_error(format: str, seed: int, flips: int) -> None:
    rng = random.Random(seed)
    data = bytearray(encode(photo(), format, exif=exif(6)) if format != "GIF" else encode(photo(), "GIF"))
    for _ in range(flips):
        data[rng.randrange(3, len(data))] = rng.randrange(256)
    for attempt in (probe, decode_image):
        with contextlib.suppress(ImageDecodeError):
            attempt(bytes(data))


def test_threads_decode_as_one_does() -> None:
    images = [encode(photo(60 + i, 50, seed=i), ("JPEG", "PNG", "WEBP")[i % 3]) for i in range(24)]
    expected = [pixels(data) for data in images]
    with ThreadPoolExecutor(8) as pool:
        for found, wanted in zip(pool.map(pixels, images * 4), expected * 4, strict=True):
            assert np.array_equal(found, wanted)
