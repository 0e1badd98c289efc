import json
import re
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from locvlm.data import scenes
from locvlm.data.coco import Instances, read_instances, usable_objects
from locvlm.data.conversations import open_conversations
from locvlm.data.scenes import CATEGORIES, draw_scenes
from locvlm.data.spatial import build_coco_spatial
from locvlm.errors import DataError
from locvlm.pixels import open_images
from locvlm.records import fingerprint, read_manifest

N_TRAIN, N_TEST = 400, 60
COLOURS = {category.name: category.colour for category in CATEGORIES}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("drawn") / "scenes"
    draw_scenes(path, 0, N_TRAIN, N_TEST)
    return path


@pytest.fixture(scope="module")
def train(folder: Path) -> Instances:
    return read_instances(folder / "instances_train.json")


def _load(path: Path) -> Any:
    return json.loads(path.read_text())


def _pixels(folder: Path, file_name: str) -> "np.ndarray[Any, Any]":
    with Image.open(folder / "images" / file_name) as image:
        assert image.mode == "RGB"
        return np.asarray(image)


def test_the_folder_holds_what_was_asked_for_and_nothing_is_left_beside_it(folder: Path) -> None:
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    assert len([name for name in names if name.startswith("images/train/")]) == N_TRAIN
    assert len([name for name in names if name.startswith("images/test/")]) == N_TEST
    assert [name for name in names if "/" not in name] == [
        "captions_test.json",
        "captions_train.json",
        "instances_test.json",
        "instances_train.json",
        "manifest.json",
        "qa_train.json",
    ]
    assert "images/train/000001.png" in names
    assert [path.name for path in folder.parent.iterdir()] == ["scenes"]
    counts = read_manifest(folder)["counts"]
    assert (counts["images"], counts["images_train"], counts["images_test"]) == (N_TRAIN + N_TEST, N_TRAIN, N_TEST)


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_box_equals_the_painted_pixels(folder: Path, split: str) -> None:
    n_checked = 0
    for image in read_instances(folder / f"instances_{split}.json").images:
        pixels = _pixels(folder, image.file_name)
        assert pixels.shape == (image.height, image.width, 3)
        coloured = np.zeros(pixels.shape[:2], dtype=bool)
        for category in {thing.category for thing in image.objects}:
            painted = (pixels == COLOURS[category]).all(axis=2)
            coloured |= painted
            for thing in image.objects:  # the instances of one category do not overlap, so a box holds one of them
                if thing.category == category:
                    x1, y1, x2, y2 = (int(value) for value in thing.box_xyxy)
                    rows, columns = np.nonzero(painted[y1:y2, x1:x2])
                    extent = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
                    assert extent == (0, 0, x2 - x1, y2 - y1)
                    painted[y1:y2, x1:x2] = False
                    n_checked += 1
            assert not painted.any(), f"{image.file_name}: {category} outside its boxes"
        ground = pixels[~coloured]
        assert (ground == ground[0]).all()
        assert len(set(ground[0].tolist())) == 1
    assert n_checked > 2 * (N_TRAIN if split == "train" else N_TEST)


def test_the_annotation_files_are_coco_files_that_pycocotools_reads(folder: Path) -> None:
    from pycocotools import mask as masks
    from pycocotools.coco import COCO

    coco = COCO(str(folder / "instances_train.json"))
    assert sorted(coco.getCatIds()) != list(range(1, 13)), "COCO's ids have gaps, so must ours"
    n_crowd = 0
    for annotation in coco.dataset["annotations"]:
        mask = coco.annToMask(annotation)
        assert set(annotation) == {"id", "image_id", "category_id", "bbox", "area", "iscrowd", "segmentation"}
        if annotation["iscrowd"]:
            n_crowd += 1
            box = masks.toBbox(masks.encode(np.asfortranarray(mask))).tolist()
            assert box == annotation["bbox"]
            assert mask.sum() == annotation["area"]
        else:
            assert abs(int(mask.sum()) - annotation["area"]) < 0.15 * annotation["area"]
    assert n_crowd >= 3
    value = _load(folder / "captions_test.json")
    assert {"info", "licenses", "images", "annotations"} == set(value)
    assert set(value["annotations"][0]) == {"id", "image_id", "caption"}


def test_nothing_is_skipped_or_clipped_when_the_files_are_read_back(train: Instances) -> None:
    assert not train.skipped
    assert not train.notes
    assert len(train.images) == N_TRAIN
    assert train.categories == [category.name for category in CATEGORIES]


def test_objects_have_the_promised_sizes_and_keep_apart(train: Instances) -> None:
    for image in train.images:
        assert (image.width, image.height) in {(96, 96), (96, 72), (72, 96)}
        assert 1 <= len(image.objects) <= 4
        for thing in image.objects:
            x1, y1, x2, y2 = thing.box_xyxy
            assert x1 >= 2
            assert y1 >= 2
            assert x2 <= image.width - 2
            assert y2 <= image.height - 2
            if not thing.is_crowd:
                assert 18 <= x2 - x1 <= 28
                assert 18 <= y2 - y1 <= 28
        for a, b in combinations(image.objects, 2):
            apart = [b.box_xyxy[k] - a.box_xyxy[k + 2] for k in (0, 1)]
            apart += [a.box_xyxy[k] - b.box_xyxy[k + 2] for k in (0, 1)]
            assert max(apart) >= 3


def test_the_mix_of_scenes_exercises_the_filters(train: Instances) -> None:
    shares = Counter[str]()
    for image in train.images:
        shares["unique objects"] += len(usable_objects(image)) > 0
        shares["duplicate"] += max(Counter(thing.category for thing in image.objects).values()) > 1
        shares["crowd"] += any(thing.is_crowd for thing in image.objects)
        shares["two or more objects"] += len(image.objects) >= 2
    assert shares["two or more objects"] == N_TRAIN
    assert 0.95 <= shares["unique objects"] / N_TRAIN < 1
    assert 0.08 <= shares["duplicate"] / N_TRAIN <= 0.16
    assert 0.01 <= shares["crowd"] / N_TRAIN <= 0.06
    for axis in ("horizontal", "vertical"):
        spatial = build_coco_spatial(train, "paper", axis)
        assert 0.37 <= spatial.counts["images"] / N_TRAIN <= 0.53
    sizes = Counter((image.width, image.height) for image in train.images)
    assert min(sizes.values()) > N_TRAIN / 5
    categories = Counter(thing.category for image in train.images for thing in image.objects)
    assert min(categories.values()) > 0.6 * max(categories.values())


def test_colours_are_far_from_each_other_and_from_grey() -> None:
    for a, b in combinations(CATEGORIES, 2):
        assert np.linalg.norm(np.subtract(a.colour, b.colour)) > 85, (a.name, b.name)
    for category in CATEGORIES:
        assert max(category.colour) - min(category.colour) >= 80
    assert len({category.name for category in CATEGORIES}) == 12
    assert {category.shape for category in CATEGORIES} == {"square", "disc", "triangle"}
    assert sum(" " in category.name for category in CATEGORIES) >= 2
    assert any(category.name[0] in "aeiou" for category in CATEGORIES)


@pytest.mark.parametrize("shape", ["square", "disc", "triangle"])
def test_a_shape_touches_all_four_sides_of_its_box(shape: str) -> None:
    for width in range(5, 29):
        for height in range(5, 29):
            stencil = scenes._stencil(shape, width, height)
            assert stencil.shape == (height, width)
            assert stencil[0].any()
            assert stencil[-1].any()
            assert stencil[:, 0].any()
            assert stencil[:, -1].any()


def test_captions_name_the_categories_in_sorted_order_and_no_place(folder: Path, train: Instances) -> None:
    captions = {row["image_id"]: row["caption"] for row in _load(folder / "captions_train.json")["annotations"]}
    place = re.compile(r"\b(left|right|above|below|top|bottom|side|next|under|over|near|behind|middle|corner)\b")
    for image in train.images:
        caption = captions[image.id]
        assert not place.search(caption)
        named = sorted((caption.index(name), name) for name in COLOURS if re.search(rf"\b{name}\b", caption))
        assert [name for _, name in named] == sorted({thing.category for thing in image.objects})
    assert any(re.fullmatch(r"A photo of an \w.*, an? .* and an? .*\.", caption) for caption in captions.values())
    assert not any(re.search(r"\ba [aeiou]|\ban [^aeiou]", caption) for caption in captions.values())


def test_the_questions_are_a_llava_list_about_training_images_only(folder: Path) -> None:
    conversations = open_conversations(folder / "qa_train.json")
    assert not conversations.skipped
    objectives = Counter(conversations.objectives)
    counts = read_manifest(folder)["counts"]
    assert set(objectives) == {"caption", "presence", "left_right", "above_below"}
    assert all(counts[name] == n for name, n in objectives.items())
    assert counts["conversations"] == len(conversations)
    assert all(name.startswith("train/") for name in conversations.images)
    assert len({conversation.id for conversation in conversations}) == len(conversations)


def test_two_runs_with_one_seed_give_the_same_bytes_and_another_seed_does_not(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        draw_scenes(tmp_path / name, seed, 12, 5)
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b")
    for part in ("images", "instances_train.json", "captions_test.json", "qa_train.json"):
        assert fingerprint(tmp_path / "a" / part) != fingerprint(tmp_path / "c" / part)


def test_a_scene_does_not_depend_on_how_many_are_drawn(tmp_path: Path) -> None:
    draw_scenes(tmp_path / "small", 1, 3, 2)
    draw_scenes(tmp_path / "large", 1, 9, 4)
    for path in sorted((tmp_path / "small" / "images").rglob("*.png")):
        other = tmp_path / "large" / path.relative_to(tmp_path / "small")
        assert path.read_bytes() == other.read_bytes()


def test_no_test_picture_is_a_training_picture(folder: Path) -> None:
    seen = {path.read_bytes() for path in (folder / "images" / "train").iterdir()}
    assert len(seen) == N_TRAIN
    assert not any(path.read_bytes() in seen for path in (folder / "images" / "test").iterdir())


def test_a_finished_folder_of_the_same_scenes_is_left_as_it_is(tmp_path: Path) -> None:
    draw_scenes(tmp_path / "scenes", 0, 2, 2)
    mark = tmp_path / "scenes" / "manifest.json"
    before = mark.stat().st_mtime_ns
    draw_scenes(tmp_path / "scenes", 0, 2, 2)
    assert mark.stat().st_mtime_ns == before


def test_other_scenes_are_replaced_only_with_force(tmp_path: Path) -> None:
    draw_scenes(tmp_path / "scenes", 0, 2, 2)
    before = fingerprint(tmp_path / "scenes")
    with pytest.raises(DataError, match="--force"):
        draw_scenes(tmp_path / "scenes", 1, 2, 2)
    assert fingerprint(tmp_path / "scenes") == before
    draw_scenes(tmp_path / "scenes", 1, 2, 2, force=True)
    draw_scenes(tmp_path / "fresh", 1, 2, 2)
    assert fingerprint(tmp_path / "scenes") == fingerprint(tmp_path / "fresh")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fresh", "scenes"]


def test_a_folder_that_holds_something_else_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    for force in (False, True):
        with pytest.raises(DataError, match="not a finished folder of drawn scenes"):
            draw_scenes(tmp_path, 0, 2, 2, force=force)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_an_empty_folder_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "scenes").mkdir()
    draw_scenes(tmp_path / "scenes", 0, 2, 2)
    assert read_manifest(tmp_path / "scenes")["counts"]["images_train"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["scenes"]


def test_a_run_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def disk_full(folder: Path, seed: int) -> Counter[str]:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(scenes, "_write_questions", disk_full)
    with pytest.raises(OSError, match="No space left"):
        draw_scenes(tmp_path / "scenes", 0, 2, 2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("n_train", "n_test"), [(0, 5), (5, 0), (-1, 5), (500_001, 5)])
def test_impossible_numbers_of_scenes_are_refused(tmp_path: Path, n_train: int, n_test: int) -> None:
    with pytest.raises(DataError, match="each must lie between 1 and 500000"):
        draw_scenes(tmp_path / "scenes", 0, n_train, n_test)


def test_images_in_shards_are_the_loose_ones_byte_for_byte(tmp_path: Path) -> None:
    draw_scenes(tmp_path / "loose", 0, 5, 2)
    draw_scenes(tmp_path / "packed", 0, 5, 2, shards=True)
    loose, packed = (open_images(tmp_path / name / "images") for name in ("loose", "packed"))
    files = sorted(p.name for p in (tmp_path / "packed" / "images").iterdir())
    assert files == ["images-00000.tar", "images.arrow"]
    names = list(loose.names())
    assert list(packed.names()) == names
    assert len(names) == 7
    assert all(packed.stream(name).read() == loose.stream(name).read() for name in names)
    draw_scenes(tmp_path / "packed", 0, 5, 2, shards=True)  # finished: left as it is
    with pytest.raises(DataError, match="holds the scenes"):
        draw_scenes(tmp_path / "packed", 0, 5, 2)
