"""YOLO labels and normalised corners: the same images in another form give the same boxes and the same text."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from locvlm.coordinates import DIGA, IVB, NFP
from locvlm.data.coco import CLIPPED, EXCLUDED, Instances, has_place, read_instances
from locvlm.data.formats import NO_LABELS, is_coco, read_annotations, write_coco
from locvlm.errors import DataError

NAMES = ["cat", "dog", "cup"]


def labels(folder: Path, **texts: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text)
    return folder


def sizes(folder: Path, **pairs: Any) -> Path:
    path = folder / "sizes.json"
    path.write_text(json.dumps({f"{name}.jpg": pair for name, pair in pairs.items()}))
    return path


def classes(folder: Path, text: str = "cat\ndog\n\ncup\n", name: str = "names.txt") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def rows(path: Path, *values: Any) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def read_yolo(tmp_path: Path, **texts: str) -> Instances:
    """Labels of images of 200 x 100 pixels."""
    listed = sizes(tmp_path, **{name: [200, 100] for name in texts})
    return read_annotations(labels(tmp_path / "labels", **texts), sizes=listed, class_names=classes(tmp_path))


def test_labels_become_corners_in_pixels(tmp_path: Path) -> None:
    found = read_yolo(tmp_path, a7="1 0.5 0.5 0.25 0.5\n0 0.1 0.2 0.1 0.2\n", a3="\n")
    assert [(image.id, image.file_name, image.width, image.height) for image in found.images] == [
        (3, "a3.jpg", 200, 100),
        (7, "a7.jpg", 200, 100),
    ]
    first, second = found.images[1].objects
    assert (first.category, first.box_xyxy, first.id, first.is_crowd) == ("dog", (75.0, 25.0, 125.0, 75.0), 1, False)
    assert (second.category, second.box_xyxy, second.id) == ("cat", (10.0, 10.0, 30.0, 30.0), 2)
    assert found.categories == NAMES
    assert not found.skipped
    assert not found.notes


@pytest.mark.parametrize(
    ("line", "reason", "n_objects"),
    [
        ("x 0.5 0.5 0.1 0.1", "label without a class", 3),
        ("1.5 0.5 0.5 0.1 0.1", "label without a class", 3),
        ("-1 0.5 0.5 0.1 0.1", "label without a class", 3),
        ("3 0.5 0.5 0.1 0.1", "label of an unknown class", 3),
        ("9999999999999 0.5 0.5 0.1 0.1", "label of an unknown class", 3),
        # what has a class stays in the image as a fact
        ("1 0.5 0.5 0.1", "box that is not four finite numbers", 4),
        ("1 0.1 0.1 0.2 0.1 0.2 0.2 0.1 0.2", "box that is not four finite numbers", 4),
        ("1 0.5 nan 0.1 0.1", "box that is not four finite numbers", 4),
        ("1 0.5 0.5 0 0.1", "box of zero or negative size", 4),
        ("1 0.5 0.5 -0.1 0.1", "box of zero or negative size", 4),
        ("1 100 50 20 20", "box beyond the image: not shares of its width and height", 4),
    ],
)
def test_a_faulty_label_is_counted_and_the_rest_is_used(tmp_path: Path, line: str, reason: str, n_objects: int) -> None:
    found = read_yolo(tmp_path, a="\n".join(["0 0.5 0.5 0.1 0.1"] * 3 + [line]))
    assert found.skipped == {reason: 1}
    assert len(found.images[0].objects) == n_objects
    assert sum(map(has_place, found.images[0].objects)) == 3


def test_a_box_that_rounding_put_beyond_the_border_is_clipped_and_noted(tmp_path: Path) -> None:
    found = read_yolo(tmp_path, a="0 0.05 0.5 0.101 0.2\n")
    assert found.images[0].objects[0].box_xyxy == pytest.approx((0.0, 40.0, 20.1, 60.0))
    assert found.notes == {CLIPPED: 1}


def test_sizes_come_from_the_images_and_names_match_in_any_folder(tmp_path: Path) -> None:
    images = tmp_path / "images" / "train2017"
    images.mkdir(parents=True)
    for name, size in (("000000000009.jpg", (60, 40)), ("000000000010.png", (40, 60)), ("000000000011.jpg", (9, 9))):
        Image.new("RGB", size).save(images / name)
    (images / "000000000012.jpg").write_bytes(b"no image")
    folder = labels(tmp_path / "labels", **{f"0000000000{n:02}": "0 0.5 0.5 0.5 0.5\n" for n in (9, 10, 12, 13)})
    listed = classes(tmp_path, "names:\n  0: cat\n  1: dog\n", "data.yaml")
    found = read_annotations(folder, images=tmp_path / "images", class_names=listed)
    assert [(i.id, i.file_name, i.width, i.height) for i in found.images] == [
        (9, "train2017/000000000009.jpg", 60, 40),
        (10, "train2017/000000000010.png", 40, 60),
    ]
    assert found.categories == ["cat", "dog"]
    assert found.skipped == {"labels of an image whose size is not known": 2}  # one damaged, one missing
    assert found.notes == {NO_LABELS: 2}


def test_images_without_different_numbers_are_numbered_in_the_order_of_names(tmp_path: Path) -> None:
    found = read_yolo(tmp_path, b1="", a1="", c="")
    assert [(image.id, image.file_name) for image in found.images] == [(1, "a1.jpg"), (2, "b1.jpg"), (3, "c.jpg")]


def test_excluded_images_are_left_out_and_noted(tmp_path: Path) -> None:
    folder, listed = labels(tmp_path / "labels", a1="0 .5 .5 .1 .1", a2=""), sizes(tmp_path, a1=[9, 9], a2=[9, 9])
    found = read_annotations(folder, sizes=listed, class_names=classes(tmp_path), exclude={1})
    assert [image.id for image in found.images] == [2]
    assert found.notes == {EXCLUDED: 1}


def test_rows_of_normalised_corners_become_pixels(tmp_path: Path) -> None:
    things = [{"category": "dog", "bbox": [0.1, 0.2, 0.5, 1]}, {"category": "cat", "bbox": [0, 0, 1, 1]}]
    path = rows(
        tmp_path / "x.jsonl",
        {"id": "5", "image": "5.jpg", "captions": [], "instances": things},
        {"image": "6.jpg", "width": 10, "height": 20, "instances": things[:1]},
    )
    found = read_annotations(path, sizes=sizes(tmp_path, **{"5": [200, 100]}))
    assert [(t.category, t.box_xyxy) for t in found.images[0].objects] == [
        ("dog", (20.0, 20.0, 100.0, 100.0)),
        ("cat", (0.0, 0.0, 200.0, 100.0)),
    ]
    assert (found.images[1].width, found.images[1].objects[0].box_xyxy) == (10, (1.0, 4.0, 5.0, 20.0))
    assert found.categories == ["cat", "dog"]  # those that occur
    packed = tmp_path / "packed"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert read_annotations(packed, sizes=tmp_path / "sizes.json") == found
    every = read_annotations(path, sizes=tmp_path / "sizes.json", class_names=classes(tmp_path))
    assert (every.categories, every.images) == (NAMES, found.images)


def test_a_damaged_gzip_file_gives_one_error(tmp_path: Path) -> None:
    packed = tmp_path / "x.json.gz"
    packed.write_bytes(gzip.compress(b"{}")[:10] + b"\xff" * 50)
    with pytest.raises(DataError, match="cut short or damaged"):
        read_annotations(packed)


@pytest.mark.parametrize(
    ("faulty", "reason"),
    [
        ([], "row that does not have the form {id, image, instances}"),
        ({"image": "../x.jpg", "instances": []}, "row that does not have the form {id, image, instances}"),
        ({"image": "9.jpg", "instances": 5}, "row that does not have the form {id, image, instances}"),
        ({"image": "1.jpg", "instances": []}, "image that occurred before"),
        ({"image": "8.jpg", "instances": []}, "labels of an image whose size is not known"),
        ({"image": "9.jpg", "instances": [{"category": 7, "bbox": [0, 0, 1, 1]}]}, "label without a class"),
        ({"image": "9.jpg", "instances": [5]}, "label without a class"),
        (
            {"image": "9.jpg", "instances": [{"category": "cat", "bbox": [0, 0, 1]}]},
            "box that is not four finite numbers",
        ),
        (
            {"image": "9.jpg", "instances": [{"category": "cat", "bbox": [0, 0, 1, True]}]},
            "box that is not four finite numbers",
        ),
        (
            {"image": "9.jpg", "instances": [{"category": "cat", "bbox": [0, 0, 10**400, 1]}]},
            "box beyond the image: not shares of its width and height",
        ),
    ],
)
def test_a_faulty_row_is_counted_and_the_rest_is_used(tmp_path: Path, faulty: Any, reason: str) -> None:
    sound = [{"image": f"{n}.jpg", "instances": [{"category": "cat", "bbox": [0, 0, 1, 1]}]} for n in (1, 2, 3)]
    path = rows(tmp_path / "x.jsonl", *sound, faulty)
    found = read_annotations(path, sizes=sizes(tmp_path, **{str(n): [9, 9] for n in (1, 2, 3, 9)}))
    assert found.skipped == {reason: 1}
    assert [image.file_name for image in found.images][:3] == ["1.jpg", "2.jpg", "3.jpg"]


def test_what_is_missing_or_most_faulty_gives_one_message(tmp_path: Path) -> None:
    folder = labels(tmp_path / "labels", a="0 0.5 0.5 0.1 0.1\n" + "7 0 0 0 0\n" * 2)
    listed, names = sizes(tmp_path, a=[9, 9]), classes(tmp_path)
    with pytest.raises(DataError, match="nothing says these"):
        read_annotations(folder, class_names=names)
    with pytest.raises(DataError, match="nothing says what their class numbers mean"):
        read_annotations(folder, sizes=listed)
    with pytest.raises(DataError, match=r"2 of 3 boxes cannot be used\n.*unknown class: 2"):
        read_annotations(folder, sizes=listed, class_names=names)
    (folder / "b.txt").write_bytes(b"\xff\xfe")
    (folder / "c.txt").write_text("")
    with pytest.raises(DataError, match=r"2 of 3 images cannot be used\n.*\n.*"):
        read_annotations(folder, sizes=listed, class_names=names)
    with pytest.raises(DataError, match="nothing says these"):
        read_annotations(rows(tmp_path / "x.jsonl", {"image": "1.jpg", "instances": []}))
    broken = rows(tmp_path / "y.jsonl", {"image": "1.jpg", "width": 9, "height": 9, "instances": []})
    broken.write_text(broken.read_text() + '{"image": ')
    with pytest.raises(DataError, match="line 2 is not valid JSON"):
        read_annotations(broken)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"a folder without \*\.txt"):
        read_annotations(tmp_path / "empty")
    for text in ('{"a.jpg": [0, 5]}', "[]", '{"a.jpg": 5}'):
        listed.write_text(text)
        with pytest.raises(DataError, match="reading the sizes"):
            read_annotations(folder, sizes=listed, class_names=names)
    listed.write_text('{"a.jpg": [9, 9]}')
    for text, name in (("", "n.txt"), ("a\na\n", "n.txt"), ("names: 5", "n.yaml"), ("names: [", "n.yml")):
        with pytest.raises(DataError, match="reading the class names"):
            read_annotations(folder, sizes=listed, class_names=classes(tmp_path, text, name))


def shared_images(realdata: Path) -> tuple[Instances, Instances]:
    """The 126 images with objects that coco128 and the YOLO labels share, from either, crowd regions left out of the
    first."""
    folder = realdata / "coco_annotations"
    coco_file = folder / "coco128_instances_train2017.json"
    yolo = read_annotations(folder / "yolo_labels_train2017", sizes=coco_file)
    assert yolo.skipped == {"labels of an image whose size is not known": 2}
    named = {image.id for image in yolo.images}
    coco = read_instances(coco_file)
    coco.images = [image for image in coco.images if image.id in named]
    return coco, yolo


def test_real_labels_and_the_coco_file_of_the_same_images_give_the_same_text(realdata: Path) -> None:
    coco, yolo = shared_images(realdata)
    assert yolo.categories == coco.categories
    n_boxes = 0
    for ours, theirs in zip(yolo.images, coco.images, strict=True):
        size = (theirs.width, theirs.height)
        assert sorted(t.box_xyxy for t in ours.objects) == sorted(t.box_xyxy for t in theirs.objects if not t.is_crowd)
        assert (ours.id, ours.file_name, ours.width, ours.height) == (theirs.id, theirs.file_name, *size)
        things = [thing for thing in theirs.objects if not thing.is_crowd]
        for codec in (IVB(224), IVB(336), NFP(), DIGA(224)):
            texts = [
                sorted((thing.category, codec.encode_box(thing.box_xyxy, *size)) for thing in side)
                for side in (ours.objects, things)
            ]
            assert texts[0] == texts[1]
        n_boxes += len(things)
    assert (n_boxes, sum(bool(image.objects) for image in yolo.images)) == (929, 126)


def test_normalised_corners_of_the_same_images_give_the_same_text_as_far_as_their_decimals_go(
    realdata: Path, tmp_path: Path
) -> None:
    coco, _ = shared_images(realdata)
    codec, n_other = IVB(224), {}
    for decimals in (3, 6):
        values = []
        for image in coco.images:
            ends = (image.width, image.height) * 2
            things = [
                {
                    "category": t.category,
                    "bbox": [round(v / end, decimals) for v, end in zip(t.box_xyxy, ends, strict=True)],
                }
                for t in image.objects
            ]
            size = {"width": image.width, "height": image.height}
            values.append({"id": str(image.id), "image": image.file_name, **size, "instances": things})
        found = read_annotations(rows(tmp_path / "x.jsonl", *values))
        pairs = [
            (codec.encode_box(a.box_xyxy, *size), codec.encode_box(b.box_xyxy, *size))
            for ours, theirs in zip(found.images, coco.images, strict=True)
            for size in [(theirs.width, theirs.height)]
            for a, b in zip(ours.objects, theirs.objects, strict=True)
        ]
        n_other[decimals] = sum(a != b for a, b in pairs)
        for a, b in pairs:
            bins = zip(json.loads(f"[{a[1:-1]}]"), json.loads(f"[{b[1:-1]}]"), strict=True)
            assert all(abs(x - y) <= 1 for x, y in bins)
    assert len(pairs) == 939
    assert n_other[6] == 0
    assert 0 < n_other[3] < 939 * 0.25  # a thousandth is a quarter of a bin: one box in five has a bin next door


def test_the_real_file_of_normalised_corners_reads_whole_and_its_text_does_not_depend_on_the_size(
    realdata: Path, tmp_path: Path
) -> None:
    path = realdata / "coco_annotations" / "caps_boxes_coco2014_val_80.jsonl"
    raw = [json.loads(line) for line in path.read_text().splitlines()]
    texts = []
    for size in ([640, 480], [480, 640]):
        found = read_annotations(path, sizes=sizes(tmp_path, **{row["image"][:-4]: size for row in raw}))
        assert (len(found.images), sum(len(image.objects) for image in found.images)) == (80, 476)
        assert not found.skipped
        texts.append(
            [
                (t.category, NFP().encode_box(t.box_xyxy, image.width, image.height))
                for image in found.images
                for t in image.objects
            ]
        )
    assert texts[0] == texts[1]
    written = {
        (thing["category"], "(" + ",".join(f"{v:.4f}" for v in thing["bbox"]) + ")")
        for row in raw
        for thing in row["instances"]
    }
    assert set(texts[0]) == written


def test_a_coco_file_is_told_and_read_as_such_and_can_be_written(realdata: Path, tmp_path: Path) -> None:
    path = realdata / "coco_annotations" / "instances_val2014_100.json"
    assert is_coco(path)
    assert read_annotations(path) == read_instances(path)
    assert not is_coco(realdata / "coco_annotations" / "yolo_labels_train2017")
    coco, yolo = shared_images(realdata)
    write_coco(tmp_path / "coco.json", yolo)
    again = read_instances(tmp_path / "coco.json")
    assert (again.categories, len(again.images)) == (yolo.categories, len(coco.images))
    for written, image in zip(again.images, yolo.images, strict=True):
        for a, b in zip(written.objects, image.objects, strict=True):
            assert (a.id, a.category) == (b.id, b.category)
            assert a.box_xyxy == pytest.approx(b.box_xyxy, abs=1e-9)
