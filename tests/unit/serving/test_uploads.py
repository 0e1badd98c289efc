"""What strangers send: whole images come through as a viewer shows them, anything else is refused with a reason."""

import base64
import io
import struct
import zlib

import pytest
from PIL import Image

from locvlm.errors import DataError
from locvlm.serving.limits import Limits, TooLarge
from locvlm.serving.uploads import decode, from_base64

LIMITS = Limits(image_bytes=100_000, pixels=250_000, side=2000, aspect=10)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(width: int = 40, height: int = 30) -> Image.Image:
    return Image.effect_noise((width, height), 90).convert("RGB")


def png_of(width: int, height: int) -> bytes:
    """A PNG of a few hundred bytes that says it is that large, and is."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes((width + 7) // 8 + 1) * min(height, 1000), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF"])
@pytest.mark.parametrize("mode", ["RGB", "L", "P"])
def test_every_kind_of_image_becomes_rgb(kind: str, mode: str) -> None:
    image = noise() if mode == "RGB" else noise().convert(mode)
    if (kind, mode) == ("JPEG", "P"):
        image = image.convert("CMYK")
    decoded = decode(encoded(image, kind), LIMITS)
    assert (decoded.mode, decoded.size) == ("RGB", (40, 30))


def test_a_photograph_is_turned_as_its_camera_said() -> None:
    image = Image.new("RGB", (40, 30), "white")
    image.paste("red", (0, 0, 10, 30))  # a red stripe on the left of the stored pixels
    exif = Image.Exif()
    exif[0x0112] = 6  # shown a quarter turned clockwise: what is stored on the left is shown on top
    shown = decode(encoded(image, "PNG", exif=exif), LIMITS)
    assert shown.size == (30, 40)
    assert shown.getpixel((15, 3)) == (255, 0, 0)
    assert shown.getpixel((15, 30)) == (255, 255, 255)


JPEG, PNG = encoded(noise(), "JPEG"), encoded(noise(), "PNG")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "no JPEG"),
        (b"hello", "no JPEG"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>", "no JPEG"),
        (b"<!doctype html><script>alert(1)</script>", "no JPEG"),
        (b"PK\x03\x04" + bytes(100), "no JPEG"),
        (encoded(noise(), "TIFF"), "no JPEG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no JPEG"),
        (JPEG[:20], "JPEG"),
        (JPEG[: len(JPEG) // 2], "does not decode"),
        (PNG[: len(PNG) // 2], "does not decode"),
        (PNG[:200] + bytes(50) + PNG[250:], "does not decode"),
        (encoded(noise(), "WEBP")[:200], "JPEG|does not decode"),
        (png_of(400, 2000)[:-40], "at most|does not decode"),
    ],
)
def test_what_is_no_whole_image_is_refused(data: bytes, words: str) -> None:
    with pytest.raises(DataError, match=words):
        decode(data, LIMITS)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("width", "height"), [(12_000, 12_000), (2001, 300), (501, 500), (20, 201), (1, 2000)])
def test_the_size_is_refused_before_anything_is_decoded(
    width: int, height: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    with pytest.raises(TooLarge, match=f"{width} x {height} pixels"):
        decode(png_of(width, height), LIMITS)


def test_a_declared_size_beyond_all_reason_is_refused_as_too_large() -> None:
    with pytest.raises(TooLarge, match="more pixels than are taken"):
        decode(png_of(60_000, 60_000), LIMITS)


def test_too_many_bytes_are_refused_by_their_number() -> None:
    with pytest.raises(TooLarge, match=r"0\.2 MB, at most 0\.1 MB"):
        decode(bytes(150_001), LIMITS)
    with pytest.raises(TooLarge, match="at most"):
        from_base64(base64.b64encode(bytes(100_010)).decode(), LIMITS)


def test_base64_may_have_line_ends_and_nothing_else() -> None:
    assert from_base64(base64.encodebytes(JPEG).decode(), LIMITS) == JPEG
    for text in ("data:image/png;base64,aaaa", "a", "%%%%", "ää"):
        with pytest.raises(DataError, match="not base64"):
            from_base64(text, LIMITS)
