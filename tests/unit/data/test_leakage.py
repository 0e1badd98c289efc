import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from locvlm.data.coco import read_instances
from locvlm.data.conversations import write_conversations
from locvlm.data.leakage import exclusions, overlap, read_images, read_visual_genome
from locvlm.data.names import COCO, NAME, VISUAL_GENOME, coco_image_id, image_key, is_picture
from locvlm.errors import DataError
from locvlm.records import Conversation, Turn


def _save(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value))
    return path


@pytest.mark.parametrize(
    ("name", "image_id"),
    [
        ("COCO_train2014_000000000042.jpg", 42),
        ("COCO_val2014_000000581282", 581282),
        ("coco/train2017/000000000042.jpg", 42),
        ("000000000042.png", 42),
        ("train2014/COCO_train2014_000000000042_17", 42),
        ("COCO_test2015_000000000001.jpg", 1),
        ("000000042.jpg", None),
        ("0000000000042.jpg", None),
        ("000000000042_1.jpg", None),
        ("GCC_train_000000000042.jpg", None),
        ("42.jpg", None),
        ("000000000042/frame.jpg", None),
        ("", None),
        ("..", None),
        ("\u0660" * 12 + ".jpg", None),
    ],
)
def test_a_coco_id_is_read_from_names_of_coco_images_only(name: str, image_id: int | None) -> None:
    assert coco_image_id(name) == image_id


def test_other_images_go_by_visual_genome_id_or_file_name() -> None:
    assert image_key("vg/VG_100K_2/2384803.jpg") == (VISUAL_GENOME, 2384803)
    assert image_key("gqa/images/2384803.jpg") == (VISUAL_GENOME, 2384803)
    assert image_key("gqa/images/n161313.jpg") == (NAME, "n161313")
    assert image_key("2384803.jpg") == (NAME, "2384803")
    assert image_key("00001/000019465.jpg") == image_key("000019465.png") == (NAME, "000019465")
    assert image_key("v_abc.def") == (NAME, "v_abc.def")
    assert image_key("v_abc.mp4") == image_key("v_abc") == (NAME, "v_abc")
    assert is_picture("a/b.JPG")
    assert not is_picture("manifest.json")


@pytest.mark.parametrize(
    ("name", "n", "kind"),
    [
        ("coco_annotations/coco128_instances_train2017.json", 128, COCO),
        ("coco_annotations/coco_mini_captions_train2017.json", 80, COCO),
        ("coco_annotations/caps_boxes_coco2014_val_80.jsonl", 80, COCO),
        ("coco_panoptic/panoptic_train2017.json", 100, COCO),
        ("coco_panoptic/panoptic_train2017", 100, COCO),
        ("coco_images/train2017", 37, COCO),
        ("refcoco/refcoco_testA.json", 750, COCO),
        ("refcoco/refcocog_val.json", 1300, COCO),
        ("refcoco/refer_format_refcocog_umd_tiny/refs(umd).p", 15, COCO),
        ("pope/coco_pope_random.json", 500, COCO),
        ("vqa/vqav2_sample53_questions.json", 13, COCO),
        ("vqa/vqav2_sample53_annotations.json", 13, COCO),
        ("llava_instruct/videochat_llava_complex_reasoning_2k_first700.json", 700, COCO),
        ("llava_instruct/coco2014_val_qa90_questions.jsonl", 30, COCO),
        ("gqa/gqa_questions_official_format9.json", 7, VISUAL_GENOME),
        ("gqa/gqa_train_balanced_first25.json", 25, VISUAL_GENOME),
        ("gqa/llava_gqa_testdev_balanced_part1.jsonl", 398, NAME),
        ("llava_pretrain/images", 70, NAME),
        ("video_qa/activitynetqa_test_q.json", 800, NAME),
        ("videos", 10, NAME),
        ("ade20k", 2, NAME),
    ],
)
def test_the_images_of_every_real_file_are_found(realdata: Path, name: str, n: int, kind: str) -> None:
    found = read_images(realdata / name)
    assert (len(found.keys), {known for known, _ in found.keys}) == (n, {kind})
    assert not found.skipped


@pytest.mark.parametrize("name", ["pope/expected_pope.json", "vqa/okvqa_predictions_pica_vinvl.json"])
def test_real_files_that_name_no_image_are_refused(realdata: Path, name: str) -> None:
    with pytest.raises(DataError, match="record that names no image"):
        read_images(realdata / name)


def test_the_two_coco_samples_share_43_images(realdata: Path) -> None:
    folder = realdata / "coco_annotations"
    first = read_images(folder / "coco128_instances_train2017.json")
    second = read_images(folder / "instances_val2014_100.json")
    told = overlap(first, second).to_dict()
    ids = {i.id for i in read_instances(folder / "coco128_instances_train2017.json").images}
    ids &= {i.id for i in read_instances(folder / "instances_val2014_100.json").images}
    assert told["images"] == {COCO: sorted(ids), VISUAL_GENOME: [], NAME: []}
    assert (told["shared"], told["first"]["images"], told["second"]["images"]) == (43, 128, 100)
    assert (told["first"]["fraction_shared"], told["second"]["fraction_shared"]) == (round(43 / 128, 6), 0.43)


def test_data_sets_of_ours_are_compared_with_benchmarks(tmp_path: Path) -> None:
    turns = (Turn("text", question="q", answer="a"),)
    names = ["coco/train2017/000000000042.jpg", "000000000007.jpg", "scene_3.png"]
    write_conversations(tmp_path / "c", [Conversation(n, n, 8, 8, "text", turns) for n in names])
    (tmp_path / "q").mkdir()
    rows = [{"id": n, "image": f"COCO_val2014_{n:012d}.jpg"} for n in (42, 9)] + [
        {"id": 3, "image": "other/scene_3.png"}
    ]
    (tmp_path / "q" / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for second in (tmp_path / "q", tmp_path / "q" / "questions.jsonl"):
        found = overlap(read_images(tmp_path / "c"), read_images(second))
        assert found.shared == {(COCO, 42), (NAME, "scene_3")}
        assert found.to_dict()["images"] == {COCO: [42], VISUAL_GENOME: [], NAME: ["scene_3"]}
    assert read_images(tmp_path / "c" / "conversations.arrow").keys == read_images(tmp_path / "c").keys


def test_drawn_scenes_are_no_coco_images_though_they_are_numbered(tmp_path: Path) -> None:
    images = [{"id": 42, "file_name": "scene_000042.png", "width": 8, "height": 8}]
    scenes = _save(tmp_path / "i.json", {"images": images, "annotations": [], "categories": []})
    assert read_images(scenes).keys == {(NAME, "scene_000042")}
    questions = [{"image_id": 42, "question_id": 1, "question": "?"}]
    abstract = _save(tmp_path / "q.json", {"data_type": "abstract_v002", "questions": questions})
    assert read_images(abstract).keys == {(NAME, "abstract_v002-42")}
    photographs = _save(tmp_path / "p.json", {"data_type": "mscoco", "questions": questions})
    assert read_images(photographs).keys == {(COCO, 42)}


def test_visual_genome_images_that_are_cocos_are_recognised(tmp_path: Path) -> None:
    data = [{"image_id": 7, "coco_id": 42, "url": "u"}, {"image_id": 8, "coco_id": None}, {"image_id": 9}]
    mapping = read_visual_genome(_save(tmp_path / "image_data.json", data))
    assert mapping == {7: 42}
    gqa = _save(tmp_path / "gqa.json", {"1": {"imageId": "7"}, "2": {"imageId": "8"}, "3": {"imageId": "n5"}})
    assert read_images(gqa).keys == {(VISUAL_GENOME, 7), (VISUAL_GENOME, 8), (NAME, "n5")}
    assert read_images(gqa, mapping).keys == {(COCO, 42), (VISUAL_GENOME, 8), (NAME, "n5")}
    with pytest.raises(DataError, match=r"image_data\.json of Visual Genome"):
        read_visual_genome(gqa)


def test_records_without_an_image_are_counted(tmp_path: Path) -> None:
    rows: list[Any] = [{"image": "a.jpg"}] * 3 + [{"image": 5}, {"image": " "}, 7]
    found = read_images(_save(tmp_path / "c.json", rows))
    assert found.keys == {(NAME, "a")}
    assert found.skipped == {"record that names no image": 3}
    for value in ({}, [{}], {"images": [], "annotations": []}):
        with pytest.raises(DataError):
            read_images(_save(tmp_path / "c.json", value))
    with pytest.raises(DataError, match="names none"):
        read_images(tmp_path.parent / tmp_path.name)  # a folder without images


def test_exclusions_add_up_the_images_of_the_benchmarks(realdata: Path) -> None:
    refcoco = realdata / "refcoco"
    found = exclusions(
        {
            "refcoco": [refcoco / "refcoco_testA.json", refcoco / "refcoco+_testA.json"],
            "pope": [realdata / "pope" / "coco_pope_random.json"],
            "vqav2": [realdata / "vqa" / "vqav2_sample53_questions.json"],
        }
    )
    assert [(one.benchmark, one.images, len(one.ids), one.new) for one in found] == [
        ("refcoco", 750, 750, 750),
        ("refcoco", 750, 750, 0),
        ("pope", 500, 500, 500),
        ("vqav2", 13, 13, 13),
    ]


def test_of_an_official_refcoco_file_the_training_split_stays(realdata: Path, tmp_path: Path) -> None:
    path = realdata / "refcoco" / "refer_format_refcocog_umd_tiny" / "refs(umd).p"
    refs = pickle.loads(path.read_bytes())  # checked plain by the tests of the reader
    by_split: dict[str, set[int]] = {}
    for ref in refs:
        by_split.setdefault(ref["split"], set()).add(ref["image_id"])
    (found,) = exclusions({"refcoco": [path]})
    assert found.ids == by_split["val"] | by_split["test"]
    (found,) = exclusions({"refcoco": [path]}, splits=["train"])
    assert found.ids == by_split["train"]
    with pytest.raises(DataError, match="no split testB, its splits are test, train, val"):
        exclusions({"refcoco": [path]}, splits=["val", "testB"])
    only_train = tmp_path / "refs.p"
    only_train.write_bytes(pickle.dumps([ref for ref in refs if ref["split"] == "train"]))
    with pytest.raises(DataError, match="no split but train"):
        exclusions({"refcoco": [only_train]})


def test_gqa_needs_visual_genomes_own_list(realdata: Path, tmp_path: Path) -> None:
    questions = realdata / "gqa" / "gqa_questions_official_format9.json"
    prompts = realdata / "gqa" / "llava_gqa_testdev_balanced_part1.jsonl"
    with pytest.raises(DataError, match="--visual-genome"):
        exclusions({"gqa": [questions]})
    data = [{"image_id": 2320168, "coco_id": 42}, {"image_id": 2410046, "coco_id": None}]
    mapping = read_visual_genome(_save(tmp_path / "image_data.json", data))
    found = exclusions({"gqa": [questions, prompts]}, mapping)
    assert [(one.ids, one.images, one.without) for one in found] == [({42}, 7, 6), (frozenset(), 398, 398)]
    bare = _save(tmp_path / "llava.json", [{"image": "2320168.jpg"}])
    assert exclusions({"gqa": [bare]}, mapping)[0].ids == {42}


def test_a_benchmark_file_without_coco_images_is_refused(realdata: Path) -> None:
    with pytest.raises(DataError, match="none of its 800 images is one of COCO"):
        exclusions({"pope": [realdata / "video_qa" / "activitynetqa_test_q.json"]})
