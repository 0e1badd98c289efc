"""Segments to boxes: the real COCO panoptic files, exact small cases, files that are not what they should be."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from locvlm.data.panoptic import (
    CATEGORIES,
    STUFF,
    THINGS,
    Label,
    Segment,
    clean_category,
    large_segments,
    read_id_map,
    read_panoptic,
    segment_boxes,
)
from locvlm.errors import DataError


def test_the_categories_are_the_official_133_without_their_suffixes(realdata: Path) -> None:
    official = json.loads((realdata / "coco_panoptic" / "panoptic_coco_categories.json").read_text())
    names = [(clean_category(record["name"]), bool(record["isthing"])) for record in official]
    assert names == [(name, True) for name in THINGS] + [(name, False) for name in STUFF]
    assert (len(THINGS), len(STUFF), len(set(CATEGORIES))) == (80, 53, 133)
    assert clean_category("sky-other-merged") == "sky"
    assert clean_category("floor-wood") == "floor-wood"


def test_every_segment_of_the_real_pngs_has_the_box_and_area_of_the_annotation(realdata: Path) -> None:
    folder = realdata / "coco_panoptic"
    raw = json.loads((folder / "panoptic_train2017.json").read_text())
    names = {record["id"]: clean_category(record["name"]) for record in raw["categories"]}
    wanted = {record["image_id"]: record["segments_info"] for record in raw["annotations"]}
    n = 0
    for image in read_panoptic(folder / "panoptic_train2017.json"):
        id_map = read_id_map(image, folder / "panoptic_train2017")
        assert id_map.shape == (image.height, image.width)
        for record in wanted[image.id]:
            x, y, w, h = record["bbox"]
            name = names[record["category_id"]]
            # one at a time: several segments of a stuff category would be joined
            (segment,) = segment_boxes(id_map, {record["id"]: image.labels[record["id"]]})
            crowd = bool(record["iscrowd"])
            assert segment == Segment(name, name in THINGS, (x, y, x + w, y + h), record["area"], crowd)
            n += 1
        assert sum(s.area for s in segment_boxes(id_map, image.labels)) == sum(r["area"] for r in wanted[image.id])
    assert n == 1111


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.data())
def test_boxes_of_any_id_map_equal_those_of_a_loop_over_masks(height: int, width: int, data: Any) -> None:
    values = data.draw(st.lists(st.integers(0, 5), min_size=height * width, max_size=height * width))
    id_map = np.array(values, np.int32).reshape(height, width)
    keys = data.draw(st.permutations([1, 2, 3, 4, 70]))
    expected = []
    for key in keys:
        rows, columns = np.nonzero(id_map == key)
        if len(rows):
            box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            expected.append(Segment("dog", True, tuple(map(float, box)), len(rows)))  # type: ignore[arg-type]
    assert segment_boxes(id_map, {key: Label("dog") for key in keys}) == expected


def test_a_stuff_category_is_one_segment_and_things_stay_apart() -> None:
    id_map = np.zeros((10, 20), np.int32)
    id_map[0:2, 0:3], id_map[5:9, 10:20], id_map[4, 4], id_map[4, 9] = 1, 2, 3, 4
    labels = {1: Label("sky"), 2: Label("sky"), 3: Label("cat"), 4: Label("cat", is_crowd=True), 9: Label("dog")}
    assert segment_boxes(id_map, labels) == [
        Segment("sky", False, (0, 0, 20, 9), 46),
        Segment("cat", True, (4, 4, 5, 5), 1),
        Segment("cat", True, (9, 4, 10, 5), 1, is_crowd=True),
    ]
    assert segment_boxes(id_map, {}) == []


def test_a_segment_of_a_thousandth_of_the_image_is_large_enough() -> None:
    segments = [Segment("cat", True, (0, 0, 50, 50), area) for area in (99, 100)]
    assert large_segments(segments, 400, 250) == segments[1:]
    assert large_segments(segments, 400, 250, min_share=0) == segments


CATEGORY = {"id": 17, "name": "cat", "isthing": 1}
IMAGE = {"id": 5, "width": 4, "height": 3, "file_name": "5.jpg"}
SEGMENT = {"id": 258, "category_id": 17, "iscrowd": 0, "bbox": [0, 0, 1, 1], "area": 1}


def panoptic(folder: Path, **changes: Any) -> Path:
    annotation = {"image_id": 5, "file_name": "5.png", "segments_info": [SEGMENT]}
    value = {"images": [IMAGE], "annotations": [annotation], "categories": [CATEGORY], **changes}
    path = folder / "panoptic.json"
    path.write_text(json.dumps(value))
    return path


def test_the_id_of_a_pixel_is_red_plus_256_green_plus_65536_blue(tmp_path: Path) -> None:
    (image,) = read_panoptic(panoptic(tmp_path))
    pixels = np.zeros((3, 4, 3), np.uint8)
    pixels[1, 2] = (2, 1, 0)
    pixels[2, 3] = (255, 255, 255)
    Image.fromarray(pixels).save(tmp_path / "5.png")
    ids = read_id_map(image, tmp_path)
    assert (ids[1, 2], ids[2, 3], ids.sum()) == (258, 2**24 - 1, 258 + 2**24 - 1)
    assert segment_boxes(ids, image.labels) == [Segment("cat", True, (2, 1, 3, 2), 1)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"annotations": None}, "not a COCO panoptic file"),
        ({"annotations": []}, "list of annotations is empty"),
        ({"images": []}, "a record cannot be used"),
        ({"categories": [{"id": 17, "name": "armchair"}]}, "'armchair' is not one of the 133"),
        ({"categories": []}, "a record cannot be used"),
        ({"images": [{**IMAGE, "width": 0}]}, "image 5 has no size"),
        ({"images": [{"id": 5}]}, "no 'width'"),
        ({"annotations": [1]}, "a record cannot be used"),
    ],
)
def test_a_file_that_is_not_coco_panoptic_gives_one_error(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = panoptic(tmp_path, **changes)
    with pytest.raises(DataError, match=message) as fault:
        read_panoptic(path)
    assert str(path) in str(fault.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"file_name": "../5.png"}, "leads out"),
        ({"segments_info": [{**SEGMENT, "id": 0}]}, "different numbers from 1"),
        ({"segments_info": [{**SEGMENT, "id": 2**24}]}, "different numbers from 1"),
        ({"segments_info": [SEGMENT, SEGMENT]}, "different numbers from 1"),
        ({"segments_info": [{**SEGMENT, "id": float("nan")}]}, "not a whole number"),
        ({"segments_info": [{"id": 3}]}, "no 'category_id'"),
        ({"segments_info": None}, "a record cannot be used"),
    ],
)
def test_an_annotation_that_cannot_be_used_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    annotation = {"image_id": 5, "file_name": "5.png", "segments_info": [SEGMENT], **changes}
    with pytest.raises(DataError, match=message):
        read_panoptic(panoptic(tmp_path, annotations=[annotation]))


def test_two_annotations_of_one_image_are_refused(tmp_path: Path) -> None:
    path = panoptic(tmp_path, annotations=[{"image_id": 5, "file_name": "5.png", "segments_info": []}] * 2)
    with pytest.raises(DataError, match="two annotations have one image_id"):
        read_panoptic(path)


@pytest.mark.parametrize(("mode", "size"), [("P", (4, 3)), ("L", (4, 3)), ("RGB", (3, 4)), ("", (4, 3)), ("cut", ())])
def test_a_png_that_is_no_id_map_of_the_image_gives_one_error(tmp_path: Path, mode: str, size: Any) -> None:
    (image,) = read_panoptic(panoptic(tmp_path))
    if mode == "cut":
        (tmp_path / "5.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    elif mode:
        Image.new(mode, size).save(tmp_path / "5.png")
    with pytest.raises(DataError, match=r"5\.png"):
        read_id_map(image, tmp_path)
