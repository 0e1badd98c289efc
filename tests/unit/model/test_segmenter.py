"""Panoptic segmenters: real transformers models with random weights, and SEEM's package stood in for."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Mask2FormerImageProcessorPil

from locvlm.data.panoptic import Label, check_label_names, clean_category, segment_boxes
from locvlm.errors import CheckpointError
from locvlm.model.segmenter import UniversalSegmenter, load_seem, load_universal
from tests.segmenters import LABELS, save_segmenter

KINDS = ("mask2former", "maskformer", "oneformer")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: save_segmenter(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}


def pictures(n: int) -> list[Image.Image]:
    noise = np.random.default_rng(3).integers(0, 256, (n, 12, 17, 3), dtype=np.uint8)
    return [Image.fromarray(one).resize((120, 80)) for one in noise]


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_model_segments_images_in_their_own_size(folders: dict[str, Path], kind: str) -> None:
    segmenter = load_universal(str(folders[kind]), 0.8)
    check_label_names(segmenter.label_names, kind)
    found = segmenter.segment(pictures(5))
    assert len(found) == 5
    for ids, names in found:
        assert (ids.shape, ids.dtype) == ((80, 120), np.dtype(np.int32))
        assert set(names.values()) <= set(LABELS)
        assert set(np.unique(ids).tolist()) - {0} <= set(names)
    assert any(names for _, names in found)
    again = load_universal(str(folders[kind]), 0.8).segment(pictures(5))
    assert all((a[0] == b[0]).all() and a[1] == b[1] for a, b in zip(found, again, strict=True))


class Painted(torch.nn.Module):
    """Answers with the given rectangles: a query each, mask logits at a quarter of the 80 x 80 image."""

    device = torch.device("cpu")
    name_or_path = "painted"

    def __init__(self, *rectangles: tuple[str, int, int, int, int], scores: Sequence[float] | None = None) -> None:
        super().__init__()
        self.config = SimpleNamespace(model_type="maskformer", id2label=dict(enumerate(LABELS)))
        self.classes = torch.zeros(1, len(rectangles), len(LABELS) + 1)
        self.masks = torch.full((1, len(rectangles), 20, 20), -20.0)
        for k, (label, x1, y1, x2, y2) in enumerate(rectangles):
            self.classes[0, k, LABELS.index(label)] = 20.0 if scores is None else scores[k]
            self.masks[0, k, y1 // 4 : y2 // 4, x1 // 4 : x2 // 4] = 20.0

    def forward(self, pixel_values: torch.Tensor, pixel_mask: torch.Tensor) -> Any:
        n = len(pixel_values)
        masks = self.masks.repeat_interleave(4, 2).repeat_interleave(4, 3)
        return SimpleNamespace(
            class_queries_logits=self.classes.expand(n, -1, -1), masks_queries_logits=masks.expand(n, -1, -1, -1)
        )


def painted(*rectangles: tuple[str, int, int, int, int], **options: Any) -> UniversalSegmenter:
    processor = Mask2FormerImageProcessorPil(size={"height": 80, "width": 80}, size_divisor=16)
    return UniversalSegmenter(Painted(*rectangles, **options), processor, 0.8)


def boxes(segmenter: UniversalSegmenter, image: Image.Image) -> list[tuple[str, tuple[float, ...], int]]:
    ((ids, names),) = segmenter.segment([image])
    labels = {key: Label(clean_category(name)) for key, name in names.items()}
    return [(s.category, s.box_xyxy, s.area) for s in segment_boxes(ids, labels)]


def test_rectangles_come_out_where_they_are() -> None:
    """transformers' own post-processing gives the first chair all that no mask claims, 4000 pixels more, and, told to
    fuse the sky, the second chair the id of the dog."""
    segmenter = painted(
        ("chair", 0, 0, 20, 20),
        ("sky-merged", 20, 0, 40, 20),
        ("dog", 40, 0, 60, 20),
        ("sky-merged", 60, 0, 80, 20),
        ("chair", 0, 40, 20, 80),
    )
    assert boxes(segmenter, Image.new("RGB", (80, 80))) == [
        ("chair", (0, 0, 20, 20), 400),
        ("sky", (20, 0, 80, 20), 800),
        ("dog", (40, 0, 60, 20), 400),
        ("chair", (0, 40, 20, 80), 800),
    ]


def test_where_two_masks_claim_a_pixel_the_surer_query_wins_and_one_that_loses_too_much_is_dropped() -> None:
    blank = Image.new("RGB", (80, 80))
    mostly_hidden = painted(("dog", 0, 0, 40, 40), ("cat", 0, 0, 40, 52), scores=(21, 20))  # 480 of 2080 are left
    assert boxes(mostly_hidden, blank) == [("dog", (0, 0, 40, 40), 1600)]
    partly_hidden = painted(("dog", 0, 0, 40, 8), ("cat", 0, 0, 40, 52), scores=(21, 20))
    assert boxes(partly_hidden, blank) == [("dog", (0, 0, 40, 8), 320), ("cat", (0, 8, 40, 52), 1760)]


def test_padding_by_the_processor_does_not_shift_a_box() -> None:
    """The image fills the upper left two thirds of the input; masks are over the whole of it."""
    processor = Mask2FormerImageProcessorPil(size={"height": 64, "width": 64}, pad_size={"height": 96, "width": 96})
    segmenter = UniversalSegmenter(Painted(("dog", 0, 20, 20, 40)), processor, 0.8)
    ((name, box, _),) = boxes(segmenter, Image.new("RGB", (120, 240)))
    assert (name, box) == ("dog", (0, 90, 45, 180))


def test_an_uncertain_query_and_an_empty_image_give_no_segment() -> None:
    blank = Image.new("RGB", (80, 80))
    ((ids, names),) = painted(("dog", 0, 0, 40, 40), scores=[5.0]).segment([blank])  # 148 of 282 of the probability
    assert names == {}
    assert ids.max() <= 0
    assert painted(("dog", 0, 0, 40, 40)).segment([]) == []


def test_a_model_of_another_vocabulary_is_refused_with_examples() -> None:
    with pytest.raises(CheckpointError, match=r"1 unknown \(armchair\), 1 missing \(chair\)") as fault:
        check_label_names([name.replace("chair", "armchair") for name in LABELS], "ade")
    assert "ade" in str(fault.value)
    with pytest.raises(CheckpointError, match="133 missing"):
        check_label_names(["LABEL_0", "LABEL_1"], "unnamed")


@pytest.mark.parametrize("broken", ["none", "no_config", "no_weights", "half_weights", "no_processor", "other_kind"])
def test_a_folder_that_is_no_segmenter_gives_one_error(tmp_path: Path, folders: dict[str, Path], broken: str) -> None:
    folder = tmp_path / "model"
    if broken != "none":
        folder.mkdir()
        for file in folders["mask2former"].iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
    match broken:
        case "no_config":
            (folder / "config.json").unlink()
        case "no_weights":
            (folder / "model.safetensors").unlink()
        case "half_weights":
            data = (folder / "model.safetensors").read_bytes()
            (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
        case "no_processor":
            (folder / "preprocessor_config.json").unlink()
        case "other_kind":
            (folder / "config.json").write_text(json.dumps({"model_type": "clip"}))
    with pytest.raises(CheckpointError, match="loading the segmenter") as fault:
        load_universal(str(folder), 0.8)
    assert "Mask2Former" in str(fault.value) or "mask2former" in str(fault.value)
    assert "\n" not in str(fault.value)


def test_a_checkpoint_without_some_weights_is_refused_instead_of_filled_at_random(
    tmp_path: Path, folders: dict[str, Path]
) -> None:
    segmenter = load_universal(str(folders["mask2former"]), 0.8)
    state = {name: value for name, value in segmenter.model.state_dict().items() if "class_predictor" not in name}
    segmenter.model.save_pretrained(tmp_path, state_dict=state)
    segmenter.processor.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"2 weights are missing .*class_predictor\.bias"):
        load_universal(str(tmp_path), 0.8)


SEEM = {
    "seem/__init__.py": "",
    "seem/utils/__init__.py": "",
    "seem/utils/constants.py": f"COCO_PANOPTIC_CLASSES = {LABELS!r}",
    "seem/modeling/__init__.py": """
import torch

class Network(torch.nn.Module):
    def __init__(self, options):
        super().__init__()
        self.options, self.task_switch, self.metadata = options, {"spatial": True, "grounding": True}, None
        self.sem_seg_head = self.predictor = self.lang_encoder = self
        object.__setattr__(self, "vocabulary", None)
    def get_text_embeddings(self, names, is_eval):
        self.vocabulary = names
    def evaluate(self, batch):
        (one,) = batch
        assert not any(self.task_switch.values()) and self.metadata and len(self.vocabulary) == 134
        assert min(one["image"].shape[1:]) == 512 and one["image"].shape[0] == 3
        ids = torch.zeros(one["height"], one["width"], dtype=torch.int32)
        ids[10:30, 20:60] = 1
        return [{"panoptic_seg": (ids, [{"id": 1, "isthing": True, "category_id": 16}])}]

def build_model(options):
    assert options["MODEL"]["NAME"] == "seem_model_v1"
    network = Network.__new__(Network)
    torch.nn.Module.__init__(network)
    network.__dict__.update(options=options, task_switch={"spatial": True}, metadata=None, vocabulary=None)
    for name in ("sem_seg_head", "predictor", "lang_encoder"):
        network.__dict__[name] = network
    return network
""",
    "seem/modeling/BaseModel.py": """
import torch

class BaseModel(torch.nn.Module):
    def __init__(self, opt, module):
        super().__init__()
        self.opt, self.model = opt, module
    def from_pretrained(self, path):
        assert torch.load(path, map_location=self.opt["device"])["ok"]
        return self
""",
    "detectron2/__init__.py": "",
    "detectron2/data.py": """
class MetadataCatalog:
    @staticmethod
    def get(name):
        return name
""",
}


@pytest.fixture
def seem_folder(tmp_path: Path) -> Path:
    (tmp_path / "focall_unicl_lang_v1.yaml").write_text("MODEL: {NAME: seem_model_v1}\n")
    torch.save({"ok": torch.ones(1)}, tmp_path / "seem_focall_v1.pt")
    return tmp_path


def test_seem_is_called_as_its_own_demo_calls_it(
    seem_folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package cannot be installed here; this one has its names and its output, as read from its source."""
    packages = tmp_path_factory.mktemp("packages")
    for name, text in SEEM.items():
        path = packages / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(packages)
    try:
        segmenter = load_seem(seem_folder, "cpu")
        check_label_names(segmenter.label_names, "seem")
        ((ids, names),) = segmenter.segment([Image.new("RGB", (160, 90))])
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] in ("seem", "detectron2")]:
            del sys.modules[name]
    (segment,) = segment_boxes(ids, {key: Label(name) for key, name in names.items()})
    assert (segment.category, segment.box_xyxy) == ("dog", (20, 10, 60, 30))


def test_without_its_package_or_files_seem_says_what_to_install_or_copy(seem_folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"No module named 'seem'; install it: pip install git\+https"):
        load_seem(seem_folder, "cpu")
    (seem_folder / "seem_focall_v1.pt").unlink()
    with pytest.raises(CheckpointError, match=r"1 \.yaml and 0 \.pt files; needed is one of each"):
        load_seem(seem_folder, "cpu")
