"""Reading COCO files: every figure by hand, every fault of a record counted, every fault of a file told."""

import gzip
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from locvlm.data import coco
from locvlm.data.coco import (
    absent_categories,
    check_images,
    read_instances,
    split_captions,
    split_instances,
    usable_objects,
)
from locvlm.errors import DataError
from locvlm.records import ImageRecord, ObjectRecord

CATEGORIES = [{"id": 90, "name": "dog"}, {"id": 1, "name": "person"}, {"id": 17, "name": "cat"}]


def image(key: Any, name: Any = "", width: Any = 100, height: Any = 80) -> dict[str, Any]:
    return {"id": key, "file_name": name or f"{key}.jpg", "width": width, "height": height}


def annotation(key: Any, image_id: Any = 1, category: Any = 1, box: Any = (10, 20, 30, 40), crowd: Any = 0) -> Any:
    return {"id": key, "image_id": image_id, "category_id": category, "bbox": box, "iscrowd": crowd, "area": 1.5}


def coco_file(folder: Path, images: list[Any], annotations: list[Any], **other: Any) -> Path:
    path = folder / "instances.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": CATEGORIES, **other}))
    return path


def good(n: int, first: int = 100) -> list[Any]:
    """Sound annotations of image 1, so that faulty ones stay the minority."""
    return [annotation(first + k) for k in range(n)]


def test_images_ascend_by_id_and_objects_by_annotation_id_and_categories_by_category_id(tmp_path: Path) -> None:
    path = coco_file(tmp_path, [image(7), image(3)], [annotation(9, 7, 90), annotation(2, 7, 17), annotation(4, 3, 1)])
    instances = read_instances(path)
    assert [i.id for i in instances.images] == [3, 7]
    assert [(o.id, o.category) for o in instances.images[1].objects] == [(2, "cat"), (9, "dog")]
    assert instances.categories == ["person", "cat", "dog"]
    assert not instances.skipped
    assert not instances.notes


def test_a_box_becomes_two_corners_in_float_pixels(tmp_path: Path) -> None:
    path = coco_file(tmp_path, [image(1)], [annotation(1, box=[10, 20.5, 30, 40])])
    (thing,) = read_instances(path).images[0].objects
    assert thing == ObjectRecord(1, "person", (10.0, 20.5, 40.0, 60.5), False)


def test_a_gzipped_file_reads_like_the_plain_one_whatever_its_name(tmp_path: Path) -> None:
    plain = coco_file(tmp_path, [image(1)], good(3))
    for name in ("i.json.gz", "j.json"):
        packed = tmp_path / name
        packed.write_bytes(gzip.compress(plain.read_bytes(), mtime=0))
        assert read_instances(packed) == read_instances(plain)


def test_a_byte_order_mark_and_a_record_out_of_the_ordinary_do_not_change_the_rest(tmp_path: Path) -> None:
    path = coco_file(tmp_path, [image(1)], good(3))
    plain = read_instances(path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_instances(path) == plain
    # whole numbers written as floats and a null iscrowd go through the slow decoder
    path = coco_file(tmp_path, [image(1.0, "1.jpg", 100.0, 80)], [annotation(100 + k, crowd=None) for k in range(3)])
    assert read_instances(path) == plain


@pytest.mark.parametrize(
    ("faulty", "reason"),
    [
        (annotation(1, category=2), "annotation of an unknown category id"),
        (annotation(1, image_id=99), "annotation of an unknown image"),
        (annotation(1, box=[1, 2, 0, 5]), "box of zero or negative size"),
        (annotation(1, box=[1, 2, 5, -5]), "box of zero or negative size"),
        (annotation(1, box=[100, 2, 5, 5]), "box wholly outside the image"),
        (annotation(1, box=[1, -9, 5, 9]), "box wholly outside the image"),
        (annotation(1, box=[math.nan, 2, 5, 5]), "box that is not four finite numbers"),
        (annotation(1, box=[1, 2, math.inf, 5]), "box that is not four finite numbers"),
        (annotation(1, box=[1, 2, 10**400, 5]), "box that is not four finite numbers"),
        (annotation(1, box=[1, 2, 5]), "box that is not four finite numbers"),
        (annotation(1, box=[1, 2, 5, 5, 5]), "box that is not four finite numbers"),
        (annotation(1, box=None), "box that is not four finite numbers"),
        (annotation(1, box="1 2 3 4"), "box that is not four finite numbers"),
        (annotation(1, box=[True, 2, 3, 4]), "box that is not four finite numbers"),
        (annotation(100), "annotation id that occurred before"),
        (annotation("x"), "annotation record without a whole-number id, image_id or category_id"),
        (annotation(1, image_id=1.5), "annotation record without a whole-number id, image_id or category_id"),
        ({"id": 1}, "annotation record without a whole-number id, image_id or category_id"),
        (annotation(2**63), "annotation record without a whole-number id, image_id or category_id"),
        ("nonsense", "annotation record without a whole-number id, image_id or category_id"),
    ],
)
def test_a_faulty_annotation_is_counted_and_the_rest_is_used(tmp_path: Path, faulty: Any, reason: str) -> None:
    instances = read_instances(coco_file(tmp_path, [image(1)], [*good(3), faulty]))
    assert instances.skipped == {reason: 1}
    sound = [o for o in instances.images[0].objects if coco.has_place(o)]
    assert [o.id for o in sound] == [100, 101, 102]


@pytest.mark.parametrize(
    ("faulty", "reason"),
    [
        (image(1, "other.jpg"), "image id that occurred before"),
        (image(5, width=0), "image of zero or negative size"),
        (image(5, height=-3), "image of zero or negative size"),
        (image(5, width="100"), "image record without a whole-number id, a file_name, a width or a height"),
        (image(5, width=2**70), "image record without a whole-number id, a file_name, a width or a height"),
        ({"id": 5}, "image record without a whole-number id, a file_name, a width or a height"),
        (None, "image record without a whole-number id, a file_name, a width or a height"),
        *[
            (image(5, name), "image file name that leads out of the image folder")
            for name in ("/etc/passwd", "../a.jpg", "a/../../b.jpg", "a\\b.jpg", "a\0.jpg", ".", "..", "\ud800.jpg")
        ],
    ],
)
def test_a_faulty_image_is_counted_and_the_rest_is_used(tmp_path: Path, faulty: Any, reason: str) -> None:
    instances = read_instances(coco_file(tmp_path, [image(1), image(2), faulty], good(3)))
    assert instances.skipped == {reason: 1}
    assert [(i.id, i.file_name, len(i.objects)) for i in instances.images] == [(1, "1.jpg", 3), (2, "2.jpg", 0)]


def test_an_annotation_of_a_skipped_image_is_told_from_one_of_an_unknown_image(tmp_path: Path) -> None:
    images = [image(1), image(2), image(5, width=0)]
    path = coco_file(tmp_path, images, [*good(3), annotation(1, 5), annotation(2, 6)])
    assert read_instances(path).skipped == {
        "image of zero or negative size": 1,
        "annotation of a skipped image": 1,
        "annotation of an unknown image": 1,
    }


def test_a_box_partly_outside_is_clipped_and_noted_but_not_skipped(tmp_path: Path) -> None:
    path = coco_file(tmp_path, [image(1)], [annotation(1, box=[-5, 70, 20, 20]), annotation(2, box=[0, 0, 100, 80])])
    instances = read_instances(path)
    assert [o.box_xyxy for o in instances.images[0].objects] == [(0, 70, 15, 80), (0, 0, 100, 80)]
    assert instances.notes == {coco.CLIPPED: 1}
    assert not instances.skipped


def test_an_unusable_box_still_counts_as_an_instance_and_as_present(tmp_path: Path) -> None:
    path = coco_file(
        tmp_path,
        [image(1)],
        [
            annotation(1, category=90),
            annotation(2, category=90, box=[1, 1, 0, 0]),
            *good(1),
            annotation(3, box=[0] * 4),
        ],
    )
    (record,) = read_instances(path).images
    assert usable_objects(record) == []  # two dogs and two persons, one of each with a box
    assert absent_categories(record, ["person", "cat", "dog"]) == ["cat"]


def test_excluded_images_are_left_out_with_their_annotations_and_noted(tmp_path: Path) -> None:
    path = coco_file(tmp_path, [image(1), image(2)], [*good(2), annotation(1, 2)])
    instances = read_instances(path, exclude={1, 77})
    assert [i.id for i in instances.images] == [2]
    assert instances.notes == {coco.EXCLUDED: 1}
    assert not instances.skipped


def test_more_than_half_of_the_annotations_skipped_means_the_file_does_not_fit(tmp_path: Path) -> None:
    bad = [annotation(k, category=55) for k in range(3)]
    assert read_instances(coco_file(tmp_path, [image(1)], [*good(3), *bad])).skipped.total() == 3
    with pytest.raises(DataError, match=r"4 of 7 annotations.*\n.*unknown category id: 3\n.*unknown image: 1\n"):
        read_instances(coco_file(tmp_path, [image(1)], [*good(3), *bad, annotation(50, image_id=9)]))


def test_more_than_half_of_the_images_skipped_means_the_file_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"2 of 3 images.*\n.*leads out of the image folder: 2"):
        read_instances(coco_file(tmp_path, [image(1), image(2, "/a"), image(3, "/b")], []))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b'{"images": [{"id": 1, "file_na', "cut short"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b"[]", "found a list at the top"),
        (b'"text"', "found a string at the top"),
        (b"null", "found a null at the top"),
        (b"{}", "no list images or annotations or categories"),
        (b'{"images": [], "categories": []}', "no list annotations"),
        (b'{"images": {}, "annotations": [], "categories": []}', "no list images"),
        (b'{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}', "list of images is empty"),
        (b'{"images": [{"id": 1}], "annotations": [], "categories": []}', "list of categories is empty"),
        (b'{"images": [], "annotations": [], "categories": [{"id": 1}]}', "no whole-number id or no name"),
        (b'{"images": [], "annotations": [], "categories": [{"id": 1, "name": ""}]}', "empty name"),
        (
            b'{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}',
            "is both 'a' and 'b'",
        ),
        (gzip.compress(b'{"images": []}' * 99, mtime=0)[:40], "gzip file is cut short"),
        (gzip.compress(b"{}", mtime=0)[:-6] + b"123456", "cut short or damaged"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"info": ' + b"[" * 100_000, "nested too deeply"),
        (b'{"images": [{"id": ' + b"9" * 5000 + b"}]}", "4300 digits"),
    ],
)
def test_a_faulty_file_gives_one_error_that_names_it(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as fault:
        read_instances(path)
    assert str(path) in str(fault.value)


def test_a_missing_file_and_a_folder_give_one_error_that_names_them(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_instances(tmp_path / "none.json")
    with pytest.raises(DataError, match="this is a folder"):
        read_instances(tmp_path)


def scene(*things: tuple[str, bool]) -> ImageRecord:
    boxes = ((0.0, 0.0, 5.0, 5.0),) * len(things)
    objects = (ObjectRecord(k, name, boxes[k], crowd) for k, (name, crowd) in enumerate(things))
    return ImageRecord(1, "1.jpg", 10, 10, tuple(objects))


@pytest.mark.parametrize(
    ("crowd", "names"),
    [
        # one dog; two cats; one cup and a crowd of cups; a crowd of bees alone; two crowds of ants
        ("counts", ["dog"]),
        ("ignored", ["dog", "cup"]),
        ("singleton_ok", ["dog", "bee"]),
        ("ignored_singleton_ok", ["dog", "cup", "bee"]),
    ],
)
def test_the_four_crowd_rules_of_the_unique_object_filter(crowd: Any, names: list[str]) -> None:
    image = scene(
        ("dog", False), ("cat", False), ("cup", True), ("cat", False), ("cup", False), ("bee", True), ("ant", True),
        ("ant", True),
    )  # fmt: skip
    usable = usable_objects(image, crowd)
    assert [thing.category for thing in usable] == names
    assert [thing.id for thing in usable] == sorted(thing.id for thing in usable)


def test_a_crowd_region_makes_its_category_present() -> None:
    assert absent_categories(scene(("dog", True)), ["cat", "dog", "bee"]) == ["cat", "bee"]


def test_real_files_have_the_published_counts(realdata: Path) -> None:
    folder = realdata / "coco_annotations"
    for name, expected in json.loads((folder / "expected_counts.json").read_text()).items():
        instances = read_instances(folder / name)
        objects = [thing for image in instances.images for thing in image.objects]
        found = {
            "images": len(instances.images),
            "annotations": len(objects),
            "crowd": sum(thing.is_crowd for thing in objects),
            "categories": len(instances.categories),
            "images_without_annotation": sum(not image.objects for image in instances.images),
            # crowd annotations count as occurrences there, and a lone one would count as one
            "image_category_pairs_with_exactly_one_annotation": sum(
                len(usable_objects(image, "singleton_ok")) for image in instances.images
            ),
        }
        assert found == {key: expected[key] for key in found}, name
        assert not instances.skipped
        lone_crowds = sum(
            n == 1 and any(t.is_crowd for t in image.objects if t.category == category)
            for image in instances.images
            for category, n in Counter(t.category for t in image.objects).items()
        )
        usable = sum(len(usable_objects(image)) for image in instances.images)
        assert usable == expected["image_category_pairs_with_exactly_one_annotation"] - lone_crowds


def test_real_boxes_agree_with_pycocotools(realdata: Path) -> None:
    from pycocotools.coco import COCO

    path = realdata / "coco_annotations" / "instances_val2014_100.json"
    theirs = COCO(str(path))
    for image in read_instances(path).images:
        annotations = {a["id"]: a for a in theirs.loadAnns(theirs.getAnnIds(imgIds=image.id))}
        assert sorted(annotations) == [thing.id for thing in image.objects]
        for thing in image.objects:
            x, y, w, h = annotations[thing.id]["bbox"]
            assert thing.box_xyxy == (x, y, x + w, y + h)
            assert thing.category == theirs.loadCats(annotations[thing.id]["category_id"])[0]["name"]


def pictures(folder: Path) -> list[ImageRecord]:
    """Six sound pictures and one of each fault, and their records."""
    records = []
    for key in range(9):
        Image.new("RGB", (40, 30), (key, 200, 9)).save(folder / f"{key}.jpg")
        records.append(ImageRecord(key, f"{key}.jpg", 40, 30))
    (folder / "1.jpg").unlink()
    whole = (folder / "3.jpg").read_bytes()
    (folder / "3.jpg").write_bytes(whole[: len(whole) - 60])
    (folder / "5.jpg").write_text("not a picture")
    records[7] = ImageRecord(7, "7.jpg", 30, 40)
    return records


def test_missing_damaged_and_misfitting_image_files_are_counted(tmp_path: Path) -> None:
    steps: list[int] = []
    sound, skipped = check_images(pictures(tmp_path), tmp_path, lambda: steps.append(1))
    assert [image.id for image in sound] == [0, 2, 4, 6, 8]
    assert skipped == {
        "image file that is missing": 1,
        "image file that does not decode": 2,
        "image file of another size than annotated": 1,
    }
    assert len(steps) == 9


def test_a_folder_with_a_part_of_the_images_serves_that_part(tmp_path: Path, realdata: Path) -> None:
    folder = realdata / "coco_images" / "train2017"
    instances = read_instances(realdata / "coco_annotations" / "coco128_instances_train2017.json")
    sound, skipped = check_images(instances.images, folder)
    assert (len(sound), skipped) == (27, {"image file that is missing": 101})


def test_a_folder_of_other_or_mostly_broken_images_is_refused(tmp_path: Path) -> None:
    records = pictures(tmp_path)
    with pytest.raises(DataError, match=r"3 of 4 image files cannot be used\n.*does not decode: 2"):
        check_images([records[1], records[3], records[5], records[7], records[0]], tmp_path)
    with pytest.raises(DataError, match="it holds none of the 1 images"):
        check_images(records[1:2], tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        check_images(records, tmp_path / "none")


def test_real_photographs_decode_and_have_the_annotated_size(realdata: Path) -> None:
    folder = realdata / "coco_images" / "train2017"
    instances = read_instances(realdata / "coco_annotations" / "coco128_instances_train2017.json")
    there = [image for image in instances.images if (folder / image.file_name).is_file()]
    sound, skipped = check_images(there, folder)
    assert len(there) == 27
    assert sound == there
    assert not skipped


def test_splitting_keeps_every_field_of_every_used_record(tmp_path: Path, realdata: Path) -> None:
    path = realdata / "coco_annotations" / "coco_mini_instances_train2017.json"
    instances = read_instances(path)
    counts = split_instances(path, instances, tmp_path, lambda image_id: image_id % 3 == 0)
    whole = json.loads(path.read_text())
    parts = {name: json.loads((tmp_path / f"instances_{name}.json").read_text()) for name in ("train", "test")}
    for kind, key in (("images", "id"), ("annotations", "image_id")):
        assert parts["test"][kind] == [record for record in whole[kind] if record[key] % 3 == 0]
        assert parts["train"][kind] == [record for record in whole[kind] if record[key] % 3]
        assert [counts[f"{kind}_{name}"] for name in parts] == [len(parts[name][kind]) for name in parts]
    assert all(part["categories"] == whole["categories"] and part["info"] == whole["info"] for part in parts.values())
    again = [read_instances(tmp_path / f"instances_{name}.json") for name in parts]
    assert sorted((i for part in again for i in part.images), key=lambda i: i.id) == instances.images


def test_a_split_leaves_skipped_records_out_and_reads_back_the_same(tmp_path: Path) -> None:
    images = [
        image(1),
        image(2),
        image(2, "again.jpg"),
        image(3, "/out.jpg"),
        image(4),
        "text",
        image(6, "\ud800"),
        image(8),
    ]
    faulty = [
        annotation(100, box=[1, 1, 1, 1]),
        annotation(1, box=[math.nan, 1, 1, 1], crowd=1),
        annotation(2, category=55),
        annotation(3, image_id=3),
        annotation(4, box=[-5, 1, 10, 10]),
    ]
    path = coco_file(tmp_path, images, [*good(9), *faulty], info={"limit": math.inf})
    instances = read_instances(path)
    split_instances(path, instances, tmp_path, lambda image_id: image_id == 4)
    part = json.loads((tmp_path / "instances_train.json").read_text(), parse_constant=pytest.fail)
    assert [i["file_name"] for i in part["images"]] == ["1.jpg", "2.jpg", "8.jpg"]
    assert [a["id"] for a in part["annotations"]] == [*range(100, 109), 1, 4]
    assert part["annotations"][-2] == annotation(1, box=[0, 0, 0, 0], crowd=1) | {"area": 0}
    assert part["annotations"][-1] == annotation(4, box=[-5, 1, 10, 10])
    again = read_instances(tmp_path / "instances_train.json")
    assert [(i.id, [o.id for o in i.objects]) for i in again.images] == [
        (i.id, [o.id for o in i.objects]) for i in instances.images if i.id != 4
    ]


def test_captions_are_split_with_their_images(tmp_path: Path) -> None:
    path = coco_file(tmp_path, [image(1), image(2), image(3)], good(2))
    captions = [{"id": k, "image_id": k % 4, "caption": f"text {k}"} for k in range(8)] + [{"id": 9, "image_id": 1}]
    source = tmp_path / "captions.json"
    source.write_text(json.dumps({"images": [image(1), image(0)], "annotations": captions}))
    counts = split_captions(source, read_instances(path), tmp_path, lambda image_id: image_id == 2)
    assert counts == {"captions_train": 4, "captions_test": 2}
    part = json.loads((tmp_path / "captions_train.json").read_text())
    assert [c["id"] for c in part["annotations"]] == [1, 3, 5, 7]
    assert [i["id"] for i in part["images"]] == [1]
    source.write_text(json.dumps({"annotations": captions[::4]}))
    with pytest.raises(DataError, match="no caption of the images"):
        split_captions(source, read_instances(path), tmp_path, lambda image_id: image_id == 2)
