import math
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from locvlm.config import CoordinateConfig
from locvlm.coordinates import DIGA, IVB, NFP, Codec, LocationFormat, PatchTokens, make_codec, make_location_format
from locvlm.errors import ConfigError, DataError
from locvlm.geometry import ImageGeometry

BOX = (10, 120, 30, 145)  # the paper's worked example, in an image of 512 x 512
CENTRE = (20, 132.5)

GOLDEN = [
    (NFP(), "(0.0195,0.2344,0.0586,0.2832)", "(0.0391,0.2588)"),
    (IVB(224), "(4,52,13,63)", "(9,58)"),
    (IVB(336), "(7,79,20,95)", "(13,87)"),
    (DIGA(224), "(0,4,-3,-11,6,0)", "(0,4,2,-5)"),
    (DIGA(336), "(0,6,0,-12,13,4)", "(0,6,6,-4)"),
    (DIGA(224, sign="unsigned_paper"), "(0,4,3,11,6,0)", "(0,4,2,5)"),
    (IVB(224, brackets="[]", separator=", "), "[4, 52, 13, 63]", "[9, 58]"),
]
CODECS = [NFP(), IVB(224), IVB(336), IVB(48), IVB(7), DIGA(224), DIGA(336), DIGA(48, 8), DIGA(21, 7)]

sizes = st.integers(1, 10_000)
fractions = st.floats(0, 1)


@st.composite
def boxes(draw: st.DrawFn) -> tuple[tuple[float, float, float, float], int, int]:
    """A box inside an image, and the image's width and height."""
    width, height = draw(sizes), draw(sizes)
    x1, x2 = sorted((draw(fractions) * width, draw(fractions) * width))
    y1, y2 = sorted((draw(fractions) * height, draw(fractions) * height))
    return (x1, y1, x2, y2), width, height


def slack(codec: Codec, side: float) -> float:
    """The greatest quantisation error in pixels, plus what float64 may add."""
    step = side * 1e-4 if isinstance(codec, NFP) else side / codec.n_bins  # type: ignore[attr-defined]
    return step / 2 + side * 1e-12


@pytest.mark.parametrize(("codec", "box_text", "point_text"), GOLDEN)
def test_the_papers_example_is_reproduced(codec: Codec, box_text: str, point_text: str) -> None:
    assert codec.encode_box(BOX, 512, 512) == box_text
    assert codec.encode_point(CENTRE, 512, 512) == point_text


def test_halves_are_rounded_to_even() -> None:
    # 224 * 120 / 512 = 52.5 is 52 in the paper; 53.5 has to become 54
    assert IVB(224).encode_point((120, 53.5 * 512 / 224), 512, 512) == "(52,54)"
    assert IVB(2).encode_box((1, 1, 3, 3), 4, 4) == "(0,0,2,2)"


def test_integers_and_floats_and_numpy_numbers_give_the_same_text() -> None:
    np = pytest.importorskip("numpy")
    for codec in CODECS:
        expected = codec.encode_box((10.0, 120.0, 30.0, 145.0), 500.0, 333.0)
        assert codec.encode_box((10, 120, 30, 145), 500, 333) == expected
        assert codec.encode_box(np.array(BOX, np.float32), np.float32(500), np.int64(333)) == expected
        assert codec.encode_box(np.array(BOX, np.int32), 500, 333) == expected


@pytest.mark.parametrize("n_bins", [1, 7, 48, 224, 336, 1000, 10_000])
def test_every_bin_comes_back_to_itself(n_bins: int) -> None:
    codec = IVB(n_bins)
    for width, height in ((1, 10_000), (427, 640), (9973, 3), (224, 336)):
        for b in range(0, n_bins + 1, max(1, n_bins // 1000)):
            text = f"({b},{n_bins - b})"
            point = codec.decode_point(text, width, height)
            assert point is not None
            assert codec.encode_point(point, width, height) == text


@given(width=sizes, height=sizes, b=st.integers(0, 10_000), c=st.integers(0, 10_000))
def test_nfp_texts_come_back_to_themselves(width: int, height: int, b: int, c: int) -> None:
    text = f"({b / 1e4:.4f},{c / 1e4:.4f})"
    point = NFP().decode_point(text, width, height)
    assert point is not None
    assert NFP().encode_point(point, width, height) == text


@given(item=boxes(), codec=st.sampled_from(CODECS))
def test_decoding_undoes_encoding_within_half_a_step(item: tuple, codec: Codec) -> None:
    box, width, height = item
    text = codec.encode_box(box, width, height)
    decoded = codec.decode_box(text, width, height)
    assert decoded is not None
    for i, side in enumerate((width, height, width, height)):
        assert abs(decoded[i] - box[i]) <= slack(codec, side)
    assert codec.encode_box(decoded, width, height) == text


@given(item=boxes(), codec=st.sampled_from(CODECS))
def test_points_come_back_within_half_a_step(item: tuple, codec: Codec) -> None:
    (x, y, _, _), width, height = item
    text = codec.encode_point((x, y), width, height)
    decoded = codec.decode_point(text, width, height)
    assert decoded is not None
    assert abs(decoded[0] - x) <= slack(codec, width)
    assert abs(decoded[1] - y) <= slack(codec, height)
    assert codec.encode_point(decoded, width, height) == text


@pytest.mark.parametrize(
    ("codec", "expected"),
    [(NFP(), "(0.0000,0.0000,1.0000,1.0000)"), (IVB(224), "(0,0,224,224)"), (DIGA(224), "(8,8,-119,-119,105,105)")],
)
def test_boxes_that_leave_the_image_are_clipped_to_it(codec: Codec, expected: str) -> None:
    assert codec.encode_box((-5, -0.0, 641, 1e300), 640, 480) == expected


def test_an_object_at_the_far_border_belongs_to_the_last_anchor() -> None:
    assert DIGA(224).encode_point((640, 480), 640, 480) == "(15,15,7,7)"
    assert DIGA(224).decode_point("(15,15,7,7)", 640, 480) == (640, 480)


def test_diga_anchors_reach_beyond_the_papers_thirteen() -> None:
    anchors = {DIGA(224).encode_point((x, 0), 224, 224).split(",")[0] for x in range(224)}
    assert anchors == {f"({p}" for p in range(16)}


def test_the_unsigned_form_of_the_paper_loses_boxes_on_one_side_of_an_anchor() -> None:
    paper = DIGA(224, sign="unsigned_paper")
    assert paper.decode_box("(0,4,3,11,6,0)", 224, 224) == (4, 52, 13, 63)
    # both corners before the anchor's centre 7: the sign of x2 is gone
    assert paper.decode_box(paper.encode_box((1, 1, 5, 5), 224, 224), 224, 224) == (1, 1, 9, 9)
    assert DIGA(224).decode_box(DIGA(224).encode_box((1, 1, 5, 5), 224, 224), 224, 224) == (1, 1, 5, 5)


@pytest.mark.parametrize(
    "box",
    [
        (30, 120, 10, 145),
        (10, 145, 30, 120),
        (math.nan, 0, 1, 1),
        (0, 0, math.inf, 1),
        (-math.inf, 0, 1, 1),
        (0, 0, 1),
        (0, 0, 1, 1, 1),
        (0, 0, 1, "x"),
        (0, 0, 1, None),
        (0, 0, 1, 10**400),
        None,
    ],
)
@pytest.mark.parametrize("codec", [NFP(), IVB(224), DIGA(224)])
def test_a_bad_box_is_refused(codec: Codec, box: object) -> None:
    with pytest.raises(DataError, match="encoding the box"):
        codec.encode_box(box, 640, 480)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [(0, 480), (640, 0), (-640, 480), (640, math.nan), (math.inf, 480), (None, 480)])
@pytest.mark.parametrize("codec", [NFP(), IVB(224), DIGA(224)])
def test_a_size_without_area_is_refused(codec: Codec, size: tuple) -> None:
    with pytest.raises(DataError, match="positive width and height"):
        codec.encode_box((0, 0, 1, 1), *size)
    with pytest.raises(DataError, match="positive width and height"):
        codec.encode_point((0, 0), *size)


@pytest.mark.parametrize("point", [(math.nan, 0), (0, math.inf), (1,), (1, 2, 3), ("x", 1), 5])
def test_a_bad_point_is_refused(point: object) -> None:
    with pytest.raises(DataError, match="encoding the point"):
        IVB(224).encode_point(point, 640, 480)  # type: ignore[arg-type]


def test_a_box_without_extent_is_kept() -> None:
    assert IVB(224).encode_box((7, 9, 7, 9), 224, 224) == "(7,9,7,9)"


@pytest.mark.parametrize(
    "text",
    [
        "(4,52,13,63)",
        "[4,52,13,63]",
        "4,52,13,63",
        "4 52 13 63",
        "[4 52 13 63]",
        "( 4, 52 ,13,  63 )",
        "(4.0,52.00,+13,63)",
        "(4,\n52,\t13,63)",
        "(4;52;13;63)",
        "It is located at (4,52,13,63)",
        "It is located at (4,52,13,63).",
        "It is at 4, 52, 13, 63.",
        "the box (x1,y1,x2,y2) is (4,52,13,63)",
        "(1,2,3) and then (4,52,13,63) and (5,6,7,8)",
        "there are 2 dogs, 7 cats: 4,52,13,63",
        "1,2,3,4 are guesses, the answer is (4,52,13,63)",
        "It is located at (4,52,13,63",
        "It is located at (4,52,13,63]",
        "((4,52,13,63))",
        "(4,52,13,63,)",
        "(13,63,4,52)",
        "(13,52,4,63)",
    ],
)
def test_the_parser_finds_the_box_in_what_a_model_says(text: str) -> None:
    assert IVB(224).decode_box(text, 224, 224) == (4, 52, 13, 63)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "There is no such object in the image",
        "(4,52,13)",
        "(4,52,13,63,70)",
        "(4,52),(13,63)",
        "(a,b,c,d)",
        "(x1,y1,x2,y2)",
        "(nan,nan,nan,nan)",
        "(inf,0,1,1)",
        "(1e5,2,3,4)",
        "(4px,52px,13px,63px)",
        "(0x10,2,3,4)",
        "(4,,52,13,63)",
        "4-52-13-63",
        "1.2.3.4",
        "version 1.2.3.4,5,6,7",
        "(\u0664,\u0665,\u0666,\u0667)",
        "()",
        "[" * 1000,
    ],
)
def test_the_parser_says_none_when_there_is_no_box(text: str) -> None:
    assert IVB(224).decode_box(text, 224, 224) is None


def test_a_box_is_not_taken_for_a_point() -> None:
    assert IVB(224).decode_point("(4,52,13,63)", 224, 224) is None
    assert IVB(224).decode_point("It is at 9,58.", 224, 224) == (9, 58)


def test_decimals_are_read_as_they_stand() -> None:
    assert IVB(224).decode_point("(4.5,.25)", 448, 448) == (9, 0.5)
    assert NFP().decode_point("(0.5,1)", 640, 480) == (320, 480)


@pytest.mark.parametrize("codec", [NFP(), IVB(224)])
def test_numbers_outside_the_range_mean_the_border(codec: Codec) -> None:
    assert codec.decode_box("(-3,-0.0,99999,225)", 640, 480) == (0, 0, 640, 480)
    assert codec.decode_box(f"(0,0,{'9' * 5000},{'9' * 400}.5)", 640, 480) == (0, 0, 640, 480)


def test_diga_numbers_outside_the_range_mean_the_border() -> None:
    huge = "9" * 5000
    assert DIGA(224).decode_box(f"(0,0,-{huge},-9,{huge},999)", 640, 480) == (0, 0, 640, 480)
    assert DIGA(224).decode_box(f"({huge},-{huge},0,0,0,0)", 640, 480) == (640, 0, 640, 0)


def test_diga_anchors_must_be_whole_numbers() -> None:
    assert DIGA(224).decode_box("(0.5,4,-3,-11,6,0)", 224, 224) is None
    assert DIGA(224).decode_point("(0,4.1,2,-5)", 224, 224) is None
    assert DIGA(224).decode_point("(0.0,4,2,-5)", 224, 224) == (9, 58)


numberish = st.text(alphabet="()[],;. -+0123456789eExnaif\n", max_size=60)


@given(text=st.one_of(st.text(), numberish, st.just("9" * 5000), st.just("(" + "9" * 5000 + ",1,1,1)")))
def test_no_string_makes_the_parser_raise_or_leave_the_image(text: str) -> None:
    for codec in (NFP(), IVB(224), DIGA(224), DIGA(224, sign="unsigned_paper")):
        box = codec.decode_box(text, 640, 480)
        if box is not None:
            assert 0 <= box[0] <= box[2] <= 640
            assert 0 <= box[1] <= box[3] <= 480
        point = codec.decode_point(text, 640, 480)
        if point is not None:
            assert 0 <= point[0] <= 640
            assert 0 <= point[1] <= 480


@pytest.mark.parametrize(
    "text",
    ["9" * 200_000, "9" * 200_000 + "x", "(" * 200_000, "1," * 100_000, "(1" + " " * 200_000 + "x)", "1.1" * 70_000],
)
def test_long_nonsense_is_read_in_linear_time(text: str) -> None:
    start = time.perf_counter()
    assert IVB(224).decode_box(text, 640, 480) is None
    assert time.perf_counter() - start < 2  # a quadratic parser needs minutes


def test_decoding_for_an_impossible_image_is_an_error() -> None:
    with pytest.raises(DataError, match="positive width and height"):
        IVB(224).decode_box("(1,2,3,4)", 0, 480)


@pytest.mark.parametrize("name", ["nfp", "ivb", "diga"])
def test_the_configuration_names_a_codec(name: str) -> None:
    config = CoordinateConfig(representation=name, n_bins=336, brackets="[]", separator=", ")  # type: ignore[arg-type]
    style = {"brackets": "[]", "separator": ", "}
    expected = {"nfp": NFP(**style), "ivb": IVB(336, **style), "diga": DIGA(336, 14, **style)}
    assert make_codec(config) == expected[name]


def test_the_configuration_reaches_patch_and_sign() -> None:
    config = CoordinateConfig(representation="diga", n_bins=48, patch=8, diga_sign="unsigned_paper")
    assert make_codec(config) == DIGA(48, 8, sign="unsigned_paper")


@pytest.mark.parametrize(
    "make",
    [
        lambda: IVB(0),
        lambda: DIGA(225),
        lambda: DIGA(224, 0),
        lambda: DIGA(224, sign="up"),  # type: ignore[arg-type]
        lambda: IVB(224, brackets="{}"),
        lambda: NFP(separator="|"),
    ],
)
def test_an_impossible_codec_is_refused(make: Callable[[], Codec]) -> None:
    with pytest.raises(ConfigError, match=r"making (a|the)"):
        make()


def location_format(**values: object) -> LocationFormat:
    return make_location_format(CoordinateConfig(**values))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, "(x1,y1,x2,y2) bbox"),
        ({"location": "point"}, "(cx,cy) point"),
        ({"representation": "nfp"}, "(x1,y1,x2,y2) bbox"),
        ({"representation": "diga"}, "(p,q,dx1,dy1,dx2,dy2) bbox"),
        ({"representation": "diga", "location": "point"}, "(p,q,dx,dy) point"),
        ({"brackets": "[]", "separator": ", "}, "[x1, y1, x2, y2] bbox"),
    ],
)
def test_the_prompt_names_the_form_that_is_written(values: dict, expected: str) -> None:
    assert location_format(**values).repr_text == expected


def test_a_box_location_is_the_codecs_box() -> None:
    location = location_format()
    assert location.encode(BOX, 512, 512) == "(4,52,13,63)"
    assert location.decode("(4,52,13,63)", 224, 448) == (4, 104, 13, 126)
    assert location.decode("no idea", 512, 512) is None


def test_a_point_location_is_the_centre_of_the_continuous_box() -> None:
    location = location_format(location="point")
    assert location.encode(BOX, 512, 512) == "(9,58)"  # the mean of the encoded corners would be (8,58)
    assert location.decode("(9,58)", 224, 448) == (9, 116)
    assert location.decode("(4,52,13,63)", 224, 224) is None
    with pytest.raises(DataError, match="encoding the box"):
        location.encode((30, 120, 10, 145), 512, 512)


def test_squash_writes_what_the_codec_writes() -> None:
    plain = make_location_format(CoordinateConfig())
    squashed = make_location_format(CoordinateConfig(), ImageGeometry("squash", 336))
    for x in range(0, 400, 7):
        box = (x / 3, x / 7, x / 2, x / 2)
        assert squashed.encode(box, 201, 333) == plain.encode(box, 201, 333)


@pytest.mark.parametrize("kind", ["bbox", "point"])
def test_letterbox_text_counts_from_the_padded_square(kind: str) -> None:
    location = make_location_format(CoordinateConfig(location=kind), ImageGeometry("letterbox", 224))  # type: ignore[arg-type]
    # 448 x 224: scale 1/2, 112 rows of padding above
    text = location.encode((100, 0, 200, 224), 448, 224)
    assert text == {"bbox": "(50,56,100,168)", "point": "(75,112)"}[kind]
    assert location.decode(text, 448, 224) == {"bbox": (100, 0, 200, 224), "point": (150, 112)}[kind]
    assert location.decode("nothing", 448, 224) is None


def test_a_predicted_box_in_the_padding_is_clipped_to_the_image() -> None:
    location = make_location_format(CoordinateConfig(), ImageGeometry("letterbox", 224))
    assert location.decode("(0,0,224,224)", 448, 224) == (0, 0, 448, 224)


def test_crop_text_counts_from_the_central_square_and_lost_objects_are_an_error() -> None:
    location = make_location_format(CoordinateConfig(), ImageGeometry("crop", 224))
    assert location.encode((112, 0, 336, 224), 448, 224) == "(0,0,224,224)"
    assert location.decode("(0,0,224,224)", 448, 224) == (112, 0, 336, 224)
    with pytest.raises(DataError, match="the crop to the central square loses this object"):
        location.encode((0, 0, 100, 100), 448, 224)


def test_bins_and_the_side_of_the_network_are_independent() -> None:
    location = make_location_format(CoordinateConfig(n_bins=1000), ImageGeometry("letterbox", 224))
    assert location.encode((0, 0, 100, 50), 100, 100) == "(0,0,1000,500)"


def test_importing_the_module_needs_no_heavy_package() -> None:
    code = "import sys, locvlm.coordinates; print({'numpy', 'pydantic', 'PIL', 'torch'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"


@pytest.mark.parametrize(
    ("codec", "box", "point"),
    [
        (NFP(decimals=3, brackets="[]"), "[0.020,0.234,0.059,0.283]", "[0.039,0.259]"),  # Shikra
        (NFP(decimals=2, brackets="[]", separator=", "), "[0.02, 0.23, 0.06, 0.28]", "[0.04, 0.26]"),  # LLaVA-1.5
        (PatchTokens(32), "<patch_index_0224><patch_index_0289>", "<patch_index_0257>"),  # Kosmos-2
    ],
)
def test_the_forms_of_other_peoples_models(codec: Codec, box: str, point: str) -> None:
    assert codec.encode_box(BOX, 512, 512) == box
    assert codec.encode_point(CENTRE, 512, 512) == point


@given(boxes())
def test_patch_tokens_are_those_of_kosmos_2(drawn: tuple[tuple[float, float, float, float], int, int]) -> None:
    from transformers.models.kosmos2 import processing_kosmos2 as kosmos

    box, width, height = drawn
    codec = PatchTokens(32)
    text = codec.encode_box(box, width, height)
    assert codec.encode_box(codec.decode_box(text, width, height), width, height) == text  # type: ignore[arg-type]
    normal = (box[0] / width, box[1] / height, box[2] / width, box[3] / height)
    on_edge = any(abs(value * 32 - round(value * 32)) < 1e-6 for value in normal)
    if normal[0] < normal[2] and normal[1] < normal[3] and not on_edge:
        first, last = kosmos.coordinate_to_patch_index(normal, 32)
        assert text == f"<patch_index_{first:04d}><patch_index_{last:04d}>"
        place = kosmos.patch_index_to_coordinate(first, last, 32)
        expected = (place[0] * width, place[1] * height, place[2] * width, place[3] * height)
        assert codec.decode_box(text, width, height) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("<phrase> a dog</phrase><object><patch_index_0044><patch_index_0863></object> runs", (250, 15, 630, 265)),
        ("<object> <patch_index_0863> <patch_index_0044> </object>", (250, 15, 630, 265)),  # corners in any order
        ("<patch_index_0000><patch_index_0000>", (0, 0, 20, 10)),
        ("<patch_index_0000><patch_index_0003>", (0, 0, 80, 10)),  # one row: to the outer edges
        ("<patch_index_0044>", None),
        ("<patch_index_0044><patch_index_1024>", None),
        ("<patch_index_99999999999><patch_index_0044>", None),
        ("(1,2,3,4)", None),
        ("", None),
    ],
)
def test_patch_tokens_are_read_out_of_an_answer(text: str, box: tuple[float, ...] | None) -> None:
    assert PatchTokens(32).decode_box(text, 640, 320) == box


def test_a_box_at_the_border_has_its_patches_inside() -> None:
    codec = PatchTokens(32)
    assert codec.encode_box((0, 0, 640, 320), 640, 320) == "<patch_index_0000><patch_index_1023>"
    assert codec.encode_box((640, 320, 640, 320), 640, 320) == "<patch_index_1023><patch_index_1023>"
    assert codec.encode_box((20, 10, 40, 20), 640, 320) == "<patch_index_0033><patch_index_0033>"
    assert codec.decode_point(codec.encode_point((30, 15), 640, 320), 640, 320) == (30, 15)
    assert codec.decode_point("nowhere", 640, 320) is None


def test_the_configuration_names_the_forms_of_others_too() -> None:
    assert make_codec(CoordinateConfig(representation="patches", n_bins=32)) == PatchTokens(32)
    shikra = CoordinateConfig(representation="nfp", decimals=3, brackets="[]")
    assert make_codec(shikra) == NFP(decimals=3, brackets="[]")
    with pytest.raises(ConfigError, match="n_side is 0"):
        PatchTokens(0)
    with pytest.raises(ConfigError, match="decimals is 0"):
        NFP(decimals=0)
