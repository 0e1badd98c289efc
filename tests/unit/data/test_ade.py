from pathlib import Path

import pytest
from PIL import Image

from locvlm.data.ade import OVERLAPS, check_photographs, find_classes, kept_classes, read_classes, read_label_maps
from locvlm.data.coco import read_instances
from locvlm.errors import DataError


@pytest.fixture
def ade(realdata: Path) -> Path:
    return realdata / "ade20k"


def _maps(folder: Path, **images: Image.Image) -> Path:
    folder.mkdir()
    for name, image in images.items():
        image.save(folder / f"{name}.png")
    return folder


def test_the_150_classes_go_by_their_first_name(ade: Path) -> None:
    names = read_classes(ade / "objectInfo150.txt")
    assert (len(names), len(set(names))) == (150, 150)
    assert names[0] == "wall"
    assert (names[7], names[8], names[21], names[89]) == ("bed", "windowpane", "water", "television")
    assert names[149] == "flag"


def test_the_exact_list_is_what_shares_a_name_with_a_coco_category(realdata: Path, ade: Path) -> None:
    coco = set(read_instances(realdata / "coco_annotations" / "coco128_instances_train2017.json").categories)
    lines = (ade / "objectInfo150.txt").read_text().splitlines()[1:]
    synonyms = [[name.strip() for name in line.split("\t")[-1].split(",")] for line in lines]
    assert set(OVERLAPS["exact"]) == {names[0] for names in synonyms if coco.intersection(names)}
    assert len(coco) == 80


def test_the_stricter_list_holds_the_laxer_one_and_known_classes_only(ade: Path) -> None:
    exact, near = (
        kept_classes(ade / "objectInfo150.txt", "exact"),
        kept_classes(ade / "objectInfo150.txt", "near-synonyms"),
    )
    assert (len(exact), len(near)) == (128, 100)
    assert near.items() < exact.items()
    for name in ("wall", "building", "sky", "floor", "tree", "ceiling", "road", "cabinet", "door", "curtain", "lamp"):
        assert name in near.values()
    for name in ("mirror", "rug", "fence", "pillow", "stairs", "chandelier", "fountain", "flag"):
        assert name in near.values()
    gone = {"desk", "armchair", "van", "crt screen", "minibike", "stove", "plant", "glass", "tray", "signboard"}
    assert gone <= set(exact.values())
    assert not gone & set(near.values())
    assert "toilet" not in exact.values()
    assert len(OVERLAPS["near-synonyms"]) == len(set(OVERLAPS["near-synonyms"]))


def test_real_label_maps_show_what_their_pixels_say(ade: Path) -> None:
    shown, skipped = read_label_maps(ade, ade / "objectInfo150.txt")
    assert not skipped
    assert [(one.key, one.file_name, one.size) for one in shown] == [
        ("ADE_val_00000001", "ADE_val_00000001.jpg", (683, 512)),
        ("ADE_val_00000002", "ADE_val_00000002.jpg", (500, 364)),
    ]
    assert list(shown[0].present) == ["wall", "building", "sky", "tree", "road", "grass"]  # and plant, left out
    assert list(shown[1].present) == ["wall", "building", "sky", "tree", "earth"]
    assert all(len(one.present) + len(one.absent) == 100 for one in shown)
    laxer, _ = read_label_maps(ade, ade / "objectInfo150.txt", "exact")
    assert list(laxer[0].present) == ["wall", "building", "sky", "tree", "road", "grass", "plant"]
    assert [one.key for one in read_label_maps(ade, ade / "objectInfo150.txt", limit=1)[0]] == ["ADE_val_00000001"]


def test_the_class_list_is_found_beside_the_maps_or_above_them(tmp_path: Path, ade: Path) -> None:
    assert find_classes(ade) == ade / "objectInfo150.txt"
    folder = tmp_path / "ADEChallengeData2016" / "annotations" / "validation"
    folder.mkdir(parents=True)
    (tmp_path / "ADEChallengeData2016" / "objectInfo150.txt").write_text("")
    assert find_classes(folder).parent.name == "ADEChallengeData2016"
    other = tmp_path / "a" / "b" / "c"
    other.mkdir(parents=True)
    with pytest.raises(DataError, match="--classes"):
        find_classes(other)


def test_value_0_is_no_class_and_the_last_class_counts(tmp_path: Path, ade: Path) -> None:
    image = Image.new("L", (4, 3))
    image.putpixel((3, 2), 150)
    (one,), _ = read_label_maps(_maps(tmp_path / "m", x=image), ade / "objectInfo150.txt")
    assert list(one.present) == ["flag"]
    assert len(one.absent) == 99


def test_a_palette_map_is_read_by_its_indices(tmp_path: Path, ade: Path) -> None:
    image = Image.new("P", (4, 3), 3)
    image.putpalette([255 - n // 3 for n in range(768)])
    (one,), _ = read_label_maps(_maps(tmp_path / "m", x=image), ade / "objectInfo150.txt")
    assert list(one.present) == ["sky"]


def test_maps_that_cannot_be_used_are_counted_by_reason(tmp_path: Path, ade: Path) -> None:
    good = {name: Image.new("L", (4, 3), 1) for name in "abcd"}
    maps = _maps(tmp_path / "m", **good, colours=Image.new("RGB", (4, 3)), beyond=Image.new("L", (4, 3), 151))
    (maps / "short.png").write_bytes((ade / "ADE_val_00000001.png").read_bytes()[:300])
    shown, skipped = read_label_maps(maps, ade / "objectInfo150.txt")
    assert [one.key for one in shown] == ["a", "b", "c", "d"]
    assert skipped == {
        "label map that is not an 8-bit index image": 1,
        "label map with a value beyond the classes": 1,
        "label map that does not decode": 1,
    }
    for name in "abcd":
        (maps / f"{name}.png").write_bytes(b"")
    with pytest.raises(DataError, match="7 of 7 label maps cannot be used"):
        read_label_maps(maps, ade / "objectInfo150.txt")


def test_photographs_are_paired_with_maps_and_the_rest_is_counted(tmp_path: Path, ade: Path) -> None:
    maps = _maps(tmp_path / "m", **{name: Image.new("L", (4, 3), 1) for name in ("a", "b", "c", "gone")})
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    for name in ("a", "b", "c", "extra"):
        Image.new("RGB", (4, 3) if name != "c" else (5, 3)).save(photographs / f"{name}.jpg")
    shown, _ = read_label_maps(maps, ade / "objectInfo150.txt")
    sound, skipped = check_photographs(shown, maps, photographs)
    assert [one.key for one in sound] == ["a", "b"]
    assert skipped == {
        "image file that is missing": 1,
        "image file of another size than annotated": 1,
        "photograph without a label map": 1,
    }


def test_real_photographs_belong_to_their_maps(ade: Path) -> None:
    shown, _ = read_label_maps(ade, ade / "objectInfo150.txt")
    sound, skipped = check_photographs(shown, ade, ade)
    assert (sound, skipped) == (shown, {})


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "0 classes"),
        ("Idx\tName\n2\twall\n", "line 2 is not class 1"),
        ("Idx\tName\n1\twall\n2\twall\n", "line 3 is not class 2"),
        ("Idx\tName\n1\t , x\n", "line 2"),
        ("Idx,Name\n1,wall\n", "line 2"),
    ],
)
def test_a_file_that_is_no_class_list_is_refused(tmp_path: Path, content: str, told: str) -> None:
    path = tmp_path / "objectInfo150.txt"
    path.write_text(content)
    with pytest.raises(DataError, match=told):
        read_classes(path)


def test_class_names_that_are_not_text_or_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_classes(tmp_path / "none.txt")
    (tmp_path / "bytes.txt").write_bytes(b"Idx\tName\n1\t\xff\n")
    with pytest.raises(DataError, match="utf-8"):
        read_classes(tmp_path / "bytes.txt")


def test_a_list_with_other_names_would_leave_coco_classes_in_and_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "objectInfo150.txt"
    path.write_text("Idx\tName\n1\twall\n2\tbed\n")
    with pytest.raises(DataError, match="it has no class airplane, bench"):
        kept_classes(path, "exact")


def test_a_folder_without_maps_is_refused(tmp_path: Path, ade: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        read_label_maps(tmp_path / "none", ade / "objectInfo150.txt")
    with pytest.raises(DataError, match="holds no PNG"):
        read_label_maps(tmp_path, ade / "objectInfo150.txt")
