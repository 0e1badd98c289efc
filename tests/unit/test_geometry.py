import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from locvlm.config import GeometryConfig
from locvlm.errors import ConfigError, DataError
from locvlm.geometry import CLIP_MEAN_COLOUR, ImageGeometry, box_iou, inside, make_geometry, to_rgb
from locvlm.pixels import open_image, to_pixels

KINDS = ("squash", "letterbox", "crop")
SIZES = [
    (640, 427),
    (427, 640),
    (640, 480),
    (333, 500),
    (501, 333),
    (333, 333),
    (448, 448),
    (101, 77),
    (77, 101),
    (224, 224),
]


def painted(size: tuple[int, int], box: tuple[int, int, int, int]) -> Image.Image:
    """A black image with the pixels [x1, x2) x [y1, y2) in white."""
    image = Image.new("RGB", size)
    x1, y1, x2, y2 = box
    ImageDraw.Draw(image).rectangle((x1, y1, x2 - 1, y2 - 1), fill=(255, 255, 255))
    return image


def extent(image: Image.Image) -> tuple[int, int, int, int]:
    """Box of the pixels that are at least half white."""
    # blue: the padding colour is 104 there, below the threshold
    rows, columns = np.nonzero(np.asarray(image)[:, :, 2] >= 128)
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1


@pytest.mark.parametrize("side", [224, 336, 49])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_painted_rectangle_lands_where_its_box_lands(kind: str, size: tuple[int, int], side: int) -> None:
    geometry = ImageGeometry(kind, side)  # type: ignore[arg-type]
    width, height = size
    seen = 0
    for left, top in ((0.40, 0.40), (0.30, 0.45), (0.0, 0.05), (0.35, 0.6), (0.7, 0.65), (0.15, 0.1)):
        x1, y1 = round(left * width), round(top * height)
        box = (x1, y1, x1 + math.ceil(0.3 * width), y1 + math.ceil(0.25 * height))
        mapped = geometry.map_box(box, width, height)
        if mapped is None:
            assert kind == "crop"
            continue
        seen += 1
        found = extent(geometry.apply(painted(size, box)))
        assert all(abs(a - b) <= 1 for a, b in zip(found, mapped, strict=True)), (box, found, mapped)
    assert seen >= 2


@given(
    kind=st.sampled_from(KINDS),
    side=st.integers(8, 700),
    width=st.integers(1, 5000),
    height=st.integers(1, 5000),
    parts=st.tuples(*[st.floats(0, 1)] * 4),
)
def test_unmapping_undoes_mapping(kind: str, side: int, width: int, height: int, parts: tuple) -> None:
    geometry = ImageGeometry(kind, side)  # type: ignore[arg-type]
    x1, x2 = sorted((parts[0] * width, parts[1] * width))
    y1, y2 = sorted((parts[2] * height, parts[3] * height))
    mapped = geometry.map_box((x1, y1, x2, y2), width, height)
    if mapped is None:
        assert kind == "crop"
        return
    assert 0 <= mapped[0] <= mapped[2] <= side
    assert 0 <= mapped[1] <= mapped[3] <= side
    back = geometry.unmap_box(mapped, width, height)
    if kind == "crop":  # only the visible part comes back
        back_again = geometry.map_box(back, width, height)
        assert back_again == pytest.approx(mapped, abs=1e-6)
        assert x1 - 1e-6 <= back[0] <= back[2] <= x2 + 1e-6
    else:
        assert back == pytest.approx((x1, y1, x2, y2), abs=1e-6)


def test_squash_is_the_papers_formula() -> None:
    assert ImageGeometry("squash", 224).map_box((10, 120, 30, 145), 512, 512) == (4.375, 52.5, 13.125, 63.4375)
    assert ImageGeometry("squash", 100).map_box((10, 10, 20, 20), 200, 50) == (5, 20, 10, 40)


@pytest.mark.parametrize(
    ("size", "offset"),
    [((100, 51), (0, 24)), ((100, 50), (0, 25)), ((51, 100), (24, 0)), ((7, 8), (0, 0)), ((9, 9), (0, 0))],
)
def test_letterbox_offsets_are_floored(size: tuple[int, int], offset: tuple[int, int]) -> None:
    square = max(size)
    geometry = ImageGeometry("letterbox", square)  # scale 1: network pixels are pixels of the padded square
    assert geometry.map_box((0, 0, *size), *size) == (*offset, offset[0] + size[0], offset[1] + size[1])
    pixels = np.asarray(geometry.apply(Image.new("RGB", size, (255, 255, 255))))
    assert extent(Image.fromarray(pixels)) == (*offset, offset[0] + size[0], offset[1] + size[1])


def test_letterbox_pads_with_the_mean_colour_of_clip() -> None:
    image = ImageGeometry("letterbox", 64).apply(Image.new("RGB", (128, 32)))
    assert image.getpixel((0, 0)) == image.getpixel((63, 63)) == CLIP_MEAN_COLOUR == (122, 116, 104)
    assert image.getpixel((32, 32)) == (0, 0, 0)
    assert abs(float(to_pixels(image)[:, 0, 0].max())) < 0.02  # the mean becomes zero


@pytest.mark.parametrize("size", [(97, 64), (64, 97), (80, 79), (79, 80), (50, 50), (1, 30), (30, 1)])
def test_letterbox_gives_the_pixels_of_the_padded_square(size: tuple[int, int]) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8))
    square = max(size)
    canvas = Image.new("RGB", (square, square), CLIP_MEAN_COLOUR)
    canvas.paste(image, ((square - size[0]) // 2, (square - size[1]) // 2))
    wanted = canvas.resize((56, 56), Image.Resampling.BICUBIC)
    assert np.array_equal(np.asarray(ImageGeometry("letterbox", 56).apply(image)), np.asarray(wanted))


def test_shikras_square_is_white_and_places_boxes_as_the_other_does() -> None:
    white, grey = ImageGeometry("letterbox_white", 8), ImageGeometry("letterbox", 8)
    image = white.apply(Image.new("RGB", (8, 2), (9, 9, 9)))
    assert (image.getpixel((0, 0)), image.getpixel((0, 4))) == ((255, 255, 255), (9, 9, 9))
    assert white.map_box((1, 0, 5, 2), 8, 2) == grey.map_box((1, 0, 5, 2), 8, 2)


def test_crop_resizes_and_shifts_as_clip_does() -> None:
    # 640 x 427 -> int(224 * 640 / 427) = 335 x 224, cut (335 - 224) // 2 = 55 from the left
    box = ImageGeometry("crop", 224).map_box((200, 100, 400, 300), 640, 427)
    assert box == pytest.approx((200 * 335 / 640 - 55, 100 * 224 / 427, 400 * 335 / 640 - 55, 300 * 224 / 427))


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((100, 0, 300, 100), (0, 0, 100, 100)),  # exactly half is visible, the centre lies on the border: kept
        ((99, 0, 299, 100), None),  # a little less
        ((0, 0, 50, 50), None),  # wholly outside
        ((0, 0, 600, 100), None),  # the centre is visible, a third of the area is
        ((75, 0, 525, 100), None),  # the same with four ninths
        ((100, 0, 500, 100), (0, 0, 200, 100)),  # the same with half: kept
        ((190, 0, 410, 200), (0, 0, 200, 200)),  # wide, most of it visible
    ],
)
def test_crop_drops_objects_that_are_mostly_gone(box: tuple, expected: tuple | None) -> None:
    assert ImageGeometry("crop", 200).map_box(box, 600, 200) == expected


def test_crop_keeps_a_box_without_area_when_it_is_visible() -> None:
    geometry = ImageGeometry("crop", 200)
    assert geometry.map_box((300, 10, 300, 90), 600, 200) == (100, 10, 100, 90)
    assert geometry.map_box((100, 10, 100, 90), 600, 200) is None


def test_boxes_are_clipped_to_the_image_and_not_to_the_padding() -> None:
    assert ImageGeometry("letterbox", 100).map_box((-50, -50, 500, 500), 100, 50) == (0, 25, 100, 75)


@pytest.mark.parametrize("box", [(3, 0, 1, 1), (0, 3, 1, 1), (math.nan, 0, 1, 1), (0, 0, math.inf, 1), (0, 0, 1), None])
def test_a_bad_box_is_refused(box: object) -> None:
    with pytest.raises(DataError, match="mapping the box"):
        ImageGeometry().map_box(box, 640, 480)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [(0, 480), (640, -1), (640, math.nan), (math.inf, 480)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_size_without_area_is_refused(kind: str, size: tuple) -> None:
    with pytest.raises(DataError, match="width and height of 1 or more"):
        ImageGeometry(kind).map_box((0, 0, 1, 1), *size)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="width and height of 1 or more"):
        ImageGeometry(kind).unmap_box((0, 0, 1, 1), *size)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "mode",
    ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr", "HSV", "LAB", "I", "F", "I;16", "I;16B"],
)
def test_every_mode_becomes_a_square_rgb_image(mode: str, kind: str) -> None:
    image = ImageGeometry(kind, 32).apply(Image.new(mode, (60, 40)))  # type: ignore[arg-type]
    assert (image.mode, image.size) == ("RGB", (32, 32))


def test_colours_survive_the_conversion() -> None:
    assert to_rgb(Image.new("L", (2, 2), 77)).getpixel((0, 0)) == (77, 77, 77)
    assert to_rgb(Image.new("RGBA", (2, 2), (9, 8, 7, 0))).getpixel((0, 0)) == (9, 8, 7)
    assert to_rgb(Image.new("CMYK", (2, 2), (0, 255, 255, 0))).getpixel((0, 0)) == (255, 0, 0)
    palette = Image.new("RGB", (2, 2), (255, 0, 0)).quantize(4)
    palette.info["transparency"] = bytes([0] * 4)
    assert to_rgb(palette).getpixel((0, 0)) == (255, 0, 0)


def test_sixteen_bit_greyscale_keeps_its_range(tmp_path: Path) -> None:
    values = np.array([[0, 0x8000, 0xFFFF]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    opened = to_rgb(open_image(tmp_path / "deep.png"))
    assert np.asarray(opened)[0].tolist() == [[0] * 3, [128] * 3, [255] * 3]


def test_the_orientation_tag_is_ignored(tmp_path: Path) -> None:
    image = painted((60, 40), (0, 0, 30, 40))
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees to display"
    image.save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as opened:
        found = extent(ImageGeometry("letterbox", 60).apply(opened))
    assert found == (0, 10, 30, 50)


def test_applying_leaves_the_given_image_alone() -> None:
    image = Image.new("L", (50, 30), 9)
    for kind in KINDS:
        ImageGeometry(kind, 16).apply(image)  # type: ignore[arg-type]
    assert (image.mode, image.size) == ("L", (50, 30))


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    whole = tmp_path / "whole.jpg"
    Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(whole)
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(whole.read_bytes()[:1500])
    with pytest.raises(DataError, match=r"cut\.jpg.*damaged or cut short"):
        ImageGeometry().apply(Image.open(cut))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["squash", "crop"])
def test_pixels_equal_those_of_the_stock_clip_processor(kind: str) -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    rng = np.random.default_rng(1)
    for width, height in ((640, 427), (333, 500), (101, 77), (100, 31)):
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        for side in (224, 336):
            square = {"height": side, "width": side}
            size = {"shortest_edge": side} if kind == "crop" else square
            stock = CLIPImageProcessorPil(size=size, crop_size=square, do_center_crop=kind == "crop")
            expected = stock(image, return_tensors="np")["pixel_values"][0]
            ours = to_pixels(ImageGeometry(kind, side).apply(image))  # type: ignore[arg-type]
            np.testing.assert_allclose(ours, expected, atol=1e-6)


def test_the_configuration_names_a_geometry() -> None:
    assert make_geometry(GeometryConfig(kind="crop", side=336)) == ImageGeometry("crop", 336)
    assert make_geometry(GeometryConfig()) == ImageGeometry("squash", 224) == ImageGeometry()


@pytest.mark.parametrize(("kind", "side"), [("stretch", 224), ("squash", 0)])
def test_an_impossible_geometry_is_refused(kind: str, side: int) -> None:
    with pytest.raises(ConfigError, match="making an image geometry"):
        ImageGeometry(kind, side)  # type: ignore[arg-type]


def test_real_coco_pictures_of_every_shape_pass(realdata: Path) -> None:
    files = sorted((realdata / "coco_images").rglob("*.jpg"))[:12]
    assert files
    for path in files:
        for kind in KINDS:
            image = ImageGeometry(kind, 64).apply(open_image(path))  # type: ignore[arg-type]
            assert (image.mode, image.size) == ("RGB", (64, 64))


def test_iou_of_boxes_worked_by_hand() -> None:
    assert box_iou((0, 0, 10, 10), (0, 0, 10, 10)) == 1.0
    assert box_iou((0, 0, 10, 10), (5, 0, 15, 10)) == pytest.approx(50 / 150)
    assert box_iou((0, 0, 10, 10), (10, 0, 20, 10)) == 0.0
    assert box_iou((0, 0, 10, 10), (20, 20, 30, 30)) == 0.0
    assert box_iou((3, 3, 3, 3), (3, 3, 3, 3)) == 0.0


def test_a_point_on_the_border_is_inside() -> None:
    assert inside((10, 5), (0, 0, 10, 10))
    assert not inside((10.01, 5), (0, 0, 10, 10))
