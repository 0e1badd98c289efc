"""Panoptic segmentation models: transformers' Mask2Former, MaskFormer and OneFormer, and SEEM from its own package.

Both give for every image an id map [height, width], 0 where there is no segment, and the name of every segment id, as
`locvlm.data.panoptic.Segmenter` asks. Segments of one stuff category are left apart here.

The masks are put together as the authors of these models do. The post-processing of transformers differs where it
matters for boxes: it gives a pixel that no mask claims to the likeliest query, so that one stray pixel stretches a box;
and when it fuses stuff, a later segment may get an id that is in use.
"""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import yaml
from PIL import Image
from safetensors import SafetensorError
from torch.nn.functional import interpolate
from transformers import (
    AutoConfig,
    AutoModelForUniversalSegmentation,
    AutoTokenizer,
    Mask2FormerImageProcessorPil,
    MaskFormerImageProcessorPil,
    OneFormerImageProcessorPil,
)
from transformers.utils import logging as transformers_logging

from locvlm.errors import CheckpointError

Segmented = tuple[npt.NDArray[np.int32], dict[int, str]]

OVERLAP_THRESHOLD = 0.8  # least share of a mask that is left after the arg-max over queries
MASK_THRESHOLD = 0.5

# The processors of the Pillow backend: the same pixels whether torchvision is installed or not.
_PROCESSORS = {
    "mask2former": Mask2FormerImageProcessorPil,
    "maskformer": MaskFormerImageProcessorPil,
    "oneformer": OneFormerImageProcessorPil,
}
_TASK = "the task is panoptic"
_IMAGES_AT_A_TIME = 4
_SEEM_SHORT_SIDE = 512
_SEEM_INSTALL = (
    "install it: pip install git+https://github.com/UX-Decoder/Segment-Everything-Everywhere-All-At-Once.git@package, "
    "and detectron2; its weights are seem_focall_v1.pt with focall_unicl_lang_v1.yaml"
)

transformers_logging.disable_progress_bar()


@dataclass(frozen=True)
class UniversalSegmenter:
    """A transformers model for universal segmentation. A query below the score `threshold` gives no segment.
    `task_ids` [1, length]: OneFormer's task text, else None."""

    model: Any
    processor: Any
    threshold: float
    task_ids: torch.Tensor | None = None

    @property
    def label_names(self) -> list[str]:
        """Every name that a segment may get, as the checkpoint writes it."""
        return [name for _, name in sorted(self.model.config.id2label.items())]

    @torch.inference_mode()
    def segment(self, images: Sequence[Image.Image]) -> list[Segmented]:
        """The id map [height, width] of every RGB image and the names of its segments."""
        segmented = []
        for start in range(0, len(images), _IMAGES_AT_A_TIME):
            part = list(images[start : start + _IMAGES_AT_A_TIME])
            inputs = self._inputs(part)
            output = self.model(**inputs)
            segmented += [
                self._read(classes.float(), masks.float(), pixel_mask, (image.height, image.width))
                for image, classes, masks, pixel_mask in zip(
                    part, output.class_queries_logits, output.masks_queries_logits, inputs["pixel_mask"], strict=True
                )
            ]
        return segmented

    def _read(
        self, classes: torch.Tensor, masks: torch.Tensor, pixel_mask: torch.Tensor, size: tuple[int, int]
    ) -> Segmented:
        """The logits of the queries of one image: `classes` [n, labels + 1], `masks` [n, h, w] over the whole input, of
        which `pixel_mask` marks the image; `size`: its (height, width)."""
        scores, labels = classes.softmax(-1).max(-1)
        kept = (labels < classes.shape[-1] - 1) & (scores > self.threshold)  # the last label is "no object"
        if not kept.any():
            return np.zeros(size, np.int32), {}
        rows, columns = int(pixel_mask.any(1).sum()), int(pixel_mask.any(0).sum())
        inside = _resized(masks[kept], pixel_mask.shape)[:, :rows, :columns]
        ids, queries = _segments(scores[kept], _resized(inside, size).sigmoid())
        names = [str(self.model.config.id2label[label]) for label in labels[kept][queries].tolist()]
        return ids, dict(enumerate(names, 1))

    def _inputs(self, images: list[Image.Image]) -> dict[str, torch.Tensor]:
        if self.task_ids is None:
            inputs = dict(self.processor(images=images, return_tensors="pt"))
        else:
            inputs = dict(self.processor(images=images, task_inputs=["panoptic"] * len(images), return_tensors="pt"))
            inputs["task_inputs"] = self.task_ids.expand(len(images), -1)
        return {name: value.to(self.model.device) for name, value in inputs.items()}


@dataclass(frozen=True)
class SeemSegmenter:
    """SEEM. `class_names`: its vocabulary, in the order of its category numbers."""

    model: Any
    class_names: Sequence[str]
    device: str

    @property
    def label_names(self) -> list[str]:
        """Every name that a segment may get."""
        return list(self.class_names)

    @torch.inference_mode()
    def segment(self, images: Sequence[Image.Image]) -> list[Segmented]:
        """The id map [height, width] of every RGB image and the names of its segments."""
        segmented = []
        for image in images:
            scale = _SEEM_SHORT_SIDE / min(image.size)
            size = (round(image.width * scale), round(image.height * scale))
            pixels = np.array(image.resize(size, Image.Resampling.BICUBIC))
            tensor = torch.from_numpy(pixels).permute(2, 0, 1).to(self.device)
            # height and width: of the id map, not of the input
            output = self.model.model.evaluate([{"image": tensor, "height": image.height, "width": image.width}])
            id_map, infos = output[-1]["panoptic_seg"]
            names = {int(info["id"]): str(self.class_names[info["category_id"]]) for info in infos}
            segmented.append((id_map.cpu().numpy().astype(np.int32), names))
        return segmented


def load_universal(source: str, threshold: float, device: str = "cpu") -> UniversalSegmenter:
    """The model of a local folder or hub id.

    Raises CheckpointError when the source is missing, cut short, or not Mask2Former, MaskFormer or OneFormer.
    """
    doing = f"loading the segmenter {source}"
    try:
        config = AutoConfig.from_pretrained(source)
        if config.model_type not in _PROCESSORS:
            raise CheckpointError(
                f"{doing}: its model_type is {config.model_type!r}; needed is one of {', '.join(_PROCESSORS)}"
            )
        model, report = AutoModelForUniversalSegmentation.from_pretrained(
            source, config=config, dtype=torch.float32, output_loading_info=True
        )
        task_ids = None
        options = {}
        if config.model_type == "oneformer":
            task_ids = _task_ids(source, config.task_seq_len).to(device)
            options = {"class_info_file": None}  # what it would fetch from the hub serves its training only
        processor = _PROCESSORS[config.model_type].from_pretrained(source, **options)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{doing}: {reason}; needed is the folder or the hub id of a Mask2Former, MaskFormer or OneFormer model, "
            "with its image processor"
        ) from None
    lost = sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])})
    lost = [name for name in lost if name in dict(model.named_parameters())]
    if lost:
        raise CheckpointError(
            f"{doing}: {len(lost)} weights are missing or of another shape ({', '.join(lost[:3])}); copy it again"
        )
    return UniversalSegmenter(model.eval().to(device), processor, threshold, task_ids)


def load_seem(folder: Path, device: str) -> SeemSegmenter:
    """SEEM with the configuration (one .yaml) and the weights (one .pt) in `folder`. Its package needs CUDA.

    Raises CheckpointError when the package is not installed or the folder does not hold the two files.
    """
    doing = f"loading SEEM from {folder}"
    files = {suffix: sorted(folder.glob(f"*{suffix}")) for suffix in (".yaml", ".pt")}
    if any(len(found) != 1 for found in files.values()):
        raise CheckpointError(
            f"{doing}: found {len(files['.yaml'])} .yaml and {len(files['.pt'])} .pt files; needed is one of each, "
            "e.g. focall_unicl_lang_v1.yaml and seem_focall_v1.pt"
        )
    try:
        base, build, constants, catalog = (
            importlib.import_module(name)
            for name in ("seem.modeling.BaseModel", "seem.modeling", "seem.utils.constants", "detectron2.data")
        )
    except ImportError as error:
        raise CheckpointError(f"{doing}: {error}; {_SEEM_INSTALL}") from None
    with open(files[".yaml"][0], encoding="utf-8") as file:
        options = {**yaml.safe_load(file), "device": torch.device(device)}
    model = base.BaseModel(options, build.build_model(options)).from_pretrained(str(files[".pt"][0])).eval().to(device)
    names = list(constants.COCO_PANOPTIC_CLASSES)
    model.model.metadata = catalog.MetadataCatalog.get("coco_2017_train_panoptic")
    for task in ("spatial", "visual", "grounding", "audio"):
        model.model.task_switch[task] = False
    with torch.inference_mode():
        encoder = model.model.sem_seg_head.predictor.lang_encoder
        encoder.get_text_embeddings([*names, "background"], is_eval=True)
    return SeemSegmenter(model, names, device)


def _task_ids(source: str, length: int) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokens = tokenizer([_TASK], padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return torch.as_tensor(tokens["input_ids"] * tokens["attention_mask"])


def _resized(masks: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """[n, h, w] -> [n, *size]."""
    return interpolate(masks[None], size=tuple(size), mode="bilinear", align_corners=False)[0]


def _segments(scores: torch.Tensor, masks: torch.Tensor) -> tuple[npt.NDArray[np.int32], list[int]]:
    """Queries with `scores` [n] and mask probabilities [n, height, width] -> the id map, and the query of id 1, 2 ...

    A pixel belongs to the query with the largest product of score and mask, if that mask claims it; a query of which
    others took too much is no segment.
    """
    winner = (scores[:, None, None] * masks).argmax(0)
    claimed = masks >= MASK_THRESHOLD
    won = torch.bincount(winner.reshape(-1), minlength=len(scores))
    held = claimed.gather(0, winner[None])[0]
    seen = torch.bincount(winner[held], minlength=len(scores)) > 0
    valid = seen & (won >= OVERLAP_THRESHOLD * claimed.sum((1, 2)))
    ids = torch.where(held, (valid.cumsum(0) * valid)[winner], 0)
    return ids.cpu().numpy().astype(np.int32), valid.nonzero()[:, 0].tolist()
