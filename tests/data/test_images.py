import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from tests.data.raw_folders import encoded, noise
from wtflow.data.images import FORMATS, ImageLimits, decode, preprocess
from wtflow.errors import ImageError, WTFlowError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # Pillow warns of what it then reads

LIMITS = ImageLimits()
TURNED = Image.Exif()
TURNED[0x0112] = 6
PICTURE = noise(1, width=40, height=30)
SAMPLES = {
    "png": encoded(PICTURE),
    "png palette": encoded(PICTURE.quantize(16), transparency=b"\x00\x80"),
    "png animated": encoded(PICTURE, save_all=True, append_images=[noise(2, 40, 30)]),
    "png 16 bit": encoded(Image.fromarray(np.asarray(PICTURE)[..., 0].astype(np.uint16) * 251)),
    "jpeg": encoded(PICTURE, "JPEG", exif=TURNED),
    "jpeg progressive": encoded(PICTURE, "JPEG", progressive=True),
    "jpeg cmyk": encoded(PICTURE.convert("CMYK"), "JPEG"),
    "bmp": encoded(PICTURE, "BMP"),
    "bmp palette": encoded(PICTURE.quantize(16), "BMP"),
    "tiff": encoded(PICTURE, "TIFF"),
    "tiff lzw": encoded(PICTURE, "TIFF", compression="tiff_lzw"),
    "tiff jpeg": encoded(PICTURE, "TIFF", compression="jpeg"),
    "tiff deflate, turned": encoded(PICTURE, "TIFF", compression="tiff_adobe_deflate", exif=TURNED),
    "tiff fax": encoded(PICTURE.convert("1"), "TIFF", compression="group4"),
    "webp": encoded(PICTURE, "WEBP", exif=TURNED),
    "webp lossless": encoded(PICTURE, "WEBP", lossless=True),
    "webp animated": encoded(PICTURE, "WEBP", save_all=True, append_images=[noise(2, 40, 30)]),
}
REASONS = {"empty", "not_an_image", "truncated", "too_many_bytes", "too_many_pixels", "too_small"}


def png_header(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims to be large."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = b"IDAT" + zlib.compress(bytes(64))
    chunks = [
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in (header, pixels)
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def tiff_grey(bits: int, rows: bytes, width: int, height: int, black: int = 1) -> bytes:
    """An uncompressed little-endian grey TIFF, tag by tag; `black` 0: white is zero."""
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, black), (273, 8), (277, 1), (278, height)]
    tags.append((279, len(rows)))
    entries = b"".join(struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value) for tag, value in tags)
    return b"II*\x00" + struct.pack("<I", 8 + len(rows)) + rows + struct.pack("<H", len(tags)) + entries + bytes(4)


def reason(data: bytes, limits: ImageLimits = LIMITS) -> str:
    with pytest.raises(ImageError) as caught:
        decode(data, limits)
    return caught.value.reason


def outcome(data: bytes) -> Image.Image | ImageError:
    try:
        return decode(data, LIMITS)
    except ImageError as error:
        return error


@pytest.mark.parametrize("name", SAMPLES)
def test_every_format_has_its_size(name: str) -> None:
    image = decode(SAMPLES[name], LIMITS)
    turned = "turned" in name or name in ("jpeg", "webp")
    assert (image.mode, image.size) == ("L" if name == "png 16 bit" else "RGB", (30, 40) if turned else (40, 30))


@pytest.mark.parametrize("size", [(40, 30), (64, 48), (17, 90)])
def test_grey_is_kept_grey_and_gives_the_bits_of_its_rgb_picture(size: tuple[int, int]) -> None:
    grey = noise(3, 70, 50).convert("L")
    found = decode(encoded(grey), LIMITS)
    assert found.mode == "L"
    assert np.array_equal(preprocess(found, size), preprocess(grey.convert("RGB"), size))


@pytest.mark.parametrize("name", ["png", "png animated", "bmp", "tiff", "tiff lzw", "webp lossless"])
def test_lossless_formats_keep_every_pixel_of_the_first_frame(name: str) -> None:
    assert np.array_equal(np.asarray(decode(SAMPLES[name], LIMITS)), np.asarray(PICTURE))


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(file_format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if file_format == "WEBP" else {}
    data = encoded(PICTURE, file_format, exif=exif, **options)
    tagged = PICTURE.copy()
    tagged.getexif()[0x0112] = orientation
    assert np.array_equal(np.asarray(decode(data, LIMITS)), np.asarray(ImageOps.exif_transpose(tagged)))


def test_orientation_6_turns_the_left_top_corner_to_the_right() -> None:
    picture = Image.new("RGB", (40, 30))
    picture.putpixel((0, 0), (255, 0, 0))
    assert decode(encoded(picture, exif=TURNED), LIMITS).getpixel((29, 0)) == (255, 0, 0)


def test_garbage_exif_does_not_cost_the_photograph() -> None:
    data = encoded(PICTURE, "JPEG", exif=b"Exif\x00\x00 no header here")
    assert decode(data, LIMITS).size == (40, 30)


@pytest.mark.parametrize("dtype", ["<u2", ">u2"])
@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_grey_of_16_bits_is_divided_by_257(dtype: str, file_format: str) -> None:
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16)
    image = Image.fromarray((levels * 257).astype(dtype))
    assert np.array_equal(np.asarray(decode(encoded(image, file_format), LIMITS)), levels)


def test_16_bits_round_to_the_nearest_level() -> None:
    levels = np.tile(np.array([0, 128, 129, 257 + 128, 65535 - 128, 65535 - 129, 65535, 9], dtype=np.uint16), (16, 2))
    found = np.asarray(decode(encoded(Image.fromarray(levels)), LIMITS))[0, :8]
    assert found.tolist() == np.rint(levels[0, :8] / 257).astype(int).tolist()


def test_16_bits_in_a_32_bit_file_are_divided_alike() -> None:
    image = Image.fromarray(np.full((16, 16), 200 * 257, dtype=np.int32))
    assert decode(encoded(image, "TIFF"), LIMITS).getpixel((3, 3)) == 200


def test_grey_of_12_bits_reaches_white() -> None:
    row = bytes([0xFF, 0xFF, 0xFF] * 4 + [0, 0, 0] * 4)  # 8 white pixels, 8 black ones
    found = np.asarray(decode(tiff_grey(12, row * 16, 16, 16), LIMITS))
    assert found[5].tolist() == [255] * 8 + [0] * 8


@pytest.mark.parametrize("bits", [8, 16])
def test_where_white_is_zero_black_is_the_highest_level(bits: int) -> None:
    rows = (b"\x00" * (bits // 8) * 8 + b"\xff" * (bits // 8) * 8) * 16
    found = np.asarray(decode(tiff_grey(bits, rows, 16, 16, black=0), LIMITS))
    assert found[5].tolist() == [255] * 8 + [0] * 8


def test_a_jpeg_that_draws_its_pixels_hundreds_of_times_is_refused() -> None:
    """A last scan of one component repeated: a small file that takes a pass over all pixels for each."""
    usual = encoded(noise(1, 64, 64), "JPEG", progressive=True)
    assert decode(usual, LIMITS).size == (64, 64)
    last, end = usual.rindex(b"\xff\xda"), usual.rindex(b"\xff\xd9")
    assert reason(usual[:end] + usual[last:end] * 600 + usual[end:]) == "too_many_pixels"


@pytest.mark.parametrize("value", [70_000, -1])
def test_pixels_without_a_fixed_white_are_refused(value: int) -> None:
    whole = encoded(Image.fromarray(np.full((16, 16), value, dtype=np.int32)), "TIFF")
    floating = encoded(Image.fromarray(np.full((16, 16), value, dtype=np.float32)), "TIFF")
    assert reason(whole) == reason(floating) == "not_an_image"


def test_transparency_is_dropped_not_blended() -> None:
    image = Image.new("RGBA", (16, 16), (10, 20, 30, 0))
    assert decode(encoded(image), LIMITS).getpixel((0, 0)) == (10, 20, 30)


def test_no_warning_is_raised_on_the_way() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for data in SAMPLES.values():
            decode(data, LIMITS)


def test_reasons() -> None:
    assert reason(b"") == "empty"
    assert reason(b"GIF89a" + bytes(100)) == reason(encoded(PICTURE, "GIF")) == "not_an_image"
    assert reason(b"RIFF\x00\x00\x00\x00WAVEfmt ") == "not_an_image"
    assert reason(encoded(noise(0, 15, 16))) == "too_small"
    assert decode(encoded(noise(0, 16, 16)), LIMITS).size == (16, 16)
    assert reason(SAMPLES["png"], ImageLimits(max_bytes=len(SAMPLES["png"]) - 1)) == "too_many_bytes"
    assert reason(SAMPLES["png"], ImageLimits(max_pixels=1199)) == "too_many_pixels"
    assert decode(SAMPLES["png"], ImageLimits(max_bytes=len(SAMPLES["png"]), max_pixels=1200)).size == (
        40,
        30,
    )


@pytest.mark.parametrize("name", [name for name in SAMPLES if "animated" not in name])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.9])
def test_a_cut_file_is_truncated(name: str, share: float) -> None:
    data = SAMPLES[name]
    kept = data[: max(12, int(len(data) * share))]
    assert reason(kept) == ("not_an_image" if name.startswith("bmp") and share < 0.1 else "truncated")


@pytest.mark.parametrize("side", [60_000, 12_000, 8_000])  # refused by Pillow, warned of by Pillow, passed by Pillow
def test_a_decompression_bomb_is_refused_by_its_header(side: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        assert reason(png_header(side, side)) == "too_many_pixels"
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        assert reason(png_header(side, side)) == "too_many_pixels"


def test_a_webp_bomb_is_refused_by_its_header() -> None:
    data = bytearray(SAMPLES["webp lossless"])
    start = data.index(b"\x2f", data.index(b"VP8L") + 8) + 1
    sides, rest = 16_382 | 16_382 << 14, struct.unpack_from("<I", data, start)[0] >> 28
    struct.pack_into("<I", data, start, sides | rest << 28)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        assert reason(bytes(data)) == "too_many_pixels"


def test_limits_cannot_promise_more_than_pillow_reads() -> None:
    with pytest.raises(WTFlowError, match="max_pixels"):
        ImageLimits.parse({"max_pixels": 200_000_000}, where="limits")


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=400), st.sampled_from([b"", *(data[:12] for data in SAMPLES.values())]))
def test_random_bytes_raise_only_image_errors(data: bytes, start: bytes) -> None:
    assert reason(start + data) in REASONS


@settings(deadline=None, max_examples=400)
@given(st.data())
def test_damaged_files_give_a_picture_or_an_image_error(data: st.DataObject) -> None:
    damaged = bytearray(SAMPLES[data.draw(st.sampled_from(sorted(SAMPLES)))])
    places = st.integers(0, len(damaged) - 1) | st.integers(0, min(200, len(damaged) - 1))
    for place, bit in data.draw(st.lists(st.tuples(places, st.integers(0, 7)), max_size=5)):
        damaged[place] ^= 1 << bit
    kept = bytes(damaged[: data.draw(st.just(len(damaged)) | st.integers(0, len(damaged)))])
    image = outcome(kept)
    if isinstance(image, ImageError):
        assert image.reason in REASONS
    else:
        assert np.asarray(image).shape == (image.height, image.width, *{"RGB": (3,), "L": ()}[image.mode])


@settings(deadline=None, max_examples=100)
@given(
    st.sampled_from(FORMATS),
    st.sampled_from(["L", "RGB", "P", "RGBA"]),
    st.integers(16, 80),
    st.integers(16, 80),
)
def test_sound_files_decode_to_their_size(file_format: str, mode: str, width: int, height: int) -> None:
    mode = "RGB" if file_format == "JPEG" and mode != "L" else mode
    image = decode(encoded(noise(3, width, height).convert(mode), file_format), LIMITS)
    assert (image.mode, image.size) == ("L" if mode == "L" and file_format != "WEBP" else "RGB", (width, height))


def test_threads_decode_as_one_does() -> None:
    work = list(SAMPLES.values()) * 20
    alone = [decode(data, LIMITS).tobytes() for data in work]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda data: decode(data, LIMITS).tobytes(), work))
    assert together == alone


def test_preprocess_gives_height_then_width() -> None:
    pixels = preprocess(noise(4, 50, 20), (32, 24))
    assert pixels.shape == (32, 24, 3)
    assert pixels.dtype == np.uint8
    assert pixels.flags.writeable


def test_preprocess_leaves_the_right_size_alone() -> None:
    assert np.array_equal(preprocess(PICTURE, (30, 40)), np.asarray(PICTURE))


def test_preprocess_averages_what_it_shrinks() -> None:
    board = np.indices((256, 256)).sum(axis=0) % 2 * 255
    small = preprocess(Image.fromarray(board.astype(np.uint8)).convert("RGB"), (16, 16))
    assert np.abs(small.astype(int) - 127).max() <= 2


def test_preprocess_needs_rgb_or_grey() -> None:
    with pytest.raises(WTFlowError, match="decode"):
        preprocess(Image.new("LA", (20, 20)), (16, 16))
