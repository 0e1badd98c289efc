"""Pseudo-captions by a model (paper, section 4.1): one for every object that its category name alone picks out.

An interrupted run continues: what is finished lies in FILE.partial.jsonl, one line a batch of whole images, until the
last caption is there; then FILE and FILE's .meta.json appear. FILE holds one JSON object an object, by annotation id:

    id, image_id, image, category     of the annotation
    raw                               the model's answer
    caption                           the answer normalised; "" when it failed or was dropped
    failure                           why there is no answer (then `raw` is "")
    place, iou                        round trip: where the model says the caption is, its overlap with the true box
    dropped, dropped_caption          round trip: why the caption was not kept, and what it was
"""

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from locvlm import __version__
from locvlm.config import EvaluationConfig, ExperimentConfig, load_config
from locvlm.coordinates import LocationFormat, make_location_format
from locvlm.data.captions import CaptionRequest, caption_requests, normalise_caption
from locvlm.data.coco import read_instances, refuse_if_most_skipped
from locvlm.data.columns import CrowdRule
from locvlm.errors import ConfigError, DataError
from locvlm.evaluation.asks import Ask, Engine, Unanswered, ask_all, fill
from locvlm.evaluation.inference import choose_engine, open_engine, run_batches
from locvlm.evaluation.predict import append_rows, is_done, partial_path, read_partial
from locvlm.evaluation.progress import progress
from locvlm.evaluation.score import meta_path
from locvlm.geometry import box_iou, make_geometry
from locvlm.pixels import ImageSource, open_images
from locvlm.prompts import CAPTION_PROMPT, IMAGE, STOP, loc_question
from locvlm.records import atomic_write, fingerprint, write_json, write_jsonl

log = logging.getLogger(__name__)

MISSING = "object on an image that is missing"
UNREADABLE = "object on an image that does not decode"
EMPTY = "object of which the model said nothing"
MARKED = f"object of which the model said {IMAGE} or {STOP}"
NO_PLACE = "round trip: the model named no box"
ELSEWHERE = "round trip: the model looked elsewhere"

_DOING = "captioning"
_ROUND_TRIP_TEMPLATE = 0  # of LOC_PROMPTS; always the same, so that a caption is judged by itself


@dataclass(frozen=True, slots=True)
class CaptionJob:
    """What is captioned, by whom and how. Answers are greedy: captions are data and should come out the same again.

    `round_trip`: keep a caption only if the model, asked where it is, answers a box whose intersection over union with
    the true one is at least this.
    """

    annotations: Path
    images: Path
    model: Path
    output: Path
    engine: str = "auto"
    n_workers: int = 1
    batch_size: int = 32
    max_new_tokens: int = 64
    round_trip: float | None = None
    crowd: CrowdRule = "counts"
    limit: int | None = None
    overwrite: bool = False

    @property
    def decoding(self) -> EvaluationConfig:
        """Greedy; a batch of whole images may be larger than `batch_size` by what its last image adds."""
        return EvaluationConfig(temperature=0.0, max_new_tokens=self.max_new_tokens, batch_size=self.batch_size)


@dataclass(frozen=True, slots=True)
class CaptionReport:
    """What a finished run came to. `skipped`, `failed`, `dropped`: reason -> number of objects."""

    images: int
    objects: int
    captions: int
    skipped: dict[str, int]
    failed: dict[str, int]
    dropped: dict[str, int]


def write_captions(job: CaptionJob, open_model: Callable[[Path, str], Engine] = open_engine) -> CaptionReport | None:
    """Caption the objects of a COCO file into `job.output`; None, and no model is opened, when that was done before.

    The file is the same, byte for byte, whatever the number of workers and however often the run was interrupted.
    Raises DataError when there is nothing to caption, when the output holds something else, or when more than half of
    the objects fail; ConfigError when a round trip is asked of a model that does not say how it writes boxes.
    """
    engine = choose_engine(job.model, job.engine)
    location = None if job.round_trip is None else _boxes_of(job.model, engine)
    source = open_images(job.images.resolve())  # a worker may stand in another folder
    identity = _identity(job, engine)
    if is_done(_DOING, job.output, identity, job.overwrite):
        return None
    requests, skipped = _requests(job, source)
    work = CaptionWork(source, job.decoding, location, job.round_trip or 0.0)
    rows, failed = _Run(job, identity, requests, work, partial(open_model, job.model.resolve(), engine)).run()
    return _finish(job, identity, engine, requests, rows, skipped, failed)


def image_batches(requests: Sequence[CaptionRequest], size: int) -> list[list[CaptionRequest]]:
    """The requests, which come image by image, cut into batches of whole images: at most `size` requests, or one image.

    A batch is what a worker does at a time and what is kept when the run is killed.
    """
    images = groupby(requests, key=lambda request: request.image_id)
    return fill([list(requests_of_image) for _, requests_of_image in images], size)


@dataclass(frozen=True, slots=True)
class CaptionWork:
    """What a worker does with a batch of requests. Travels to it by pickle.

    `location`: how the model writes boxes, for a round trip that needs an overlap of `least_iou`; None: no round trip.
    """

    images: ImageSource
    decoding: EvaluationConfig
    location: LocationFormat | None = None
    least_iou: float = 0.0

    def __call__(self, engine: Engine, batch: Sequence[CaptionRequest]) -> list[dict[str, Any]]:
        """One row a request, in order, as the module's docstring has it."""
        asks = [Ask(str(request.id), self.images, request.image, request.prompt) for request in batch]
        answers = ask_all(engine, asks, self.decoding)
        rows = [_row(request, answer) for request, answer in zip(batch, answers, strict=True)]
        if self.location is not None:
            self._go_back(engine, self.location, batch, rows)
        return rows

    def _go_back(
        self,
        engine: Engine,
        location: LocationFormat,
        batch: Sequence[CaptionRequest],
        rows: Sequence[dict[str, Any]],
    ) -> None:
        """Ask where each caption is, and take back those that the model does not find."""
        captioned = [(request, row) for request, row in zip(batch, rows, strict=True) if row["caption"]]
        asks = []
        for request, row in captioned:
            question = loc_question(_ROUND_TRIP_TEMPLATE, row["caption"], location.repr_text)
            asks.append(Ask(f"{request.id}-place", self.images, request.image, question))
        places = ask_all(engine, asks, self.decoding)
        for (request, row), answer in zip(captioned, places, strict=True):
            place = "" if isinstance(answer, Unanswered) else answer
            box = location.decode(place, request.width, request.height)
            row["place"] = place
            row["iou"] = None if box is None or len(box) != 4 else box_iou(box, request.box_xyxy)
            if row["iou"] is None or row["iou"] < self.least_iou:
                row["dropped"] = NO_PLACE if row["iou"] is None else ELSEWHERE
                row["dropped_caption"] = row["caption"]
                row["caption"] = ""


class _Run:
    """One job under way."""

    def __init__(
        self,
        job: CaptionJob,
        identity: dict[str, Any],
        requests: Sequence[CaptionRequest],
        work: CaptionWork,
        open_model: Callable[[], Engine],
    ) -> None:
        self._job, self._identity, self._requests = job, identity, requests
        self._work, self._open_model = work, open_model
        self._partial = partial_path(job.output)
        self._failed: Counter[str] = Counter()

    def run(self) -> tuple[dict[int, dict[str, Any]], Counter[str]]:
        """The rows by annotation id, and why how many objects have no caption."""
        done = self._resume()
        batches = image_batches(self._requests, self._job.batch_size)
        todo = [[request for request in batch if request.id not in done] for batch in batches]
        todo = [batch for batch in todo if batch]
        self._count(done.values())
        with progress(_DOING, len(self._requests)) as advance, open(self._partial, "a", encoding="utf-8") as file:
            advance(len(done))
            for number, rows in run_batches(self._open_model, self._work, todo, self._job.n_workers):
                # an image that could not be read is tried again when the command is
                append_rows(file, [{"rows": [row for row in rows if row.get("failure") != UNREADABLE]}])
                done |= {row["id"]: row for row in rows}
                self._count(rows)
                advance(len(todo[number]))
        return done, self._failed

    def _resume(self) -> dict[int, dict[str, Any]]:
        """The rows of an interrupted run of the same job; a torn last line is dropped."""
        lines = read_partial(self._partial, self._identity, self._job.overwrite)
        wanted = {request.id for request in self._requests}
        done = {row["id"]: row for line in lines for row in line["rows"] if row["id"] in wanted}
        if done:
            log.info("captioning: continuing after %d of %d objects", len(done), len(self._requests))
        with atomic_write(self._partial) as file:
            file.write(json.dumps({"identity": self._identity}) + "\n")
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        return done

    def _count(self, rows: Iterable[Mapping[str, Any]]) -> None:
        self._failed.update(row["failure"] for row in rows if "failure" in row)
        refuse_if_most_skipped(self._job.images, "objects to caption", self._failed, len(self._requests))


def _row(request: CaptionRequest, answer: str | Unanswered) -> dict[str, Any]:
    raw = None if isinstance(answer, Unanswered) else answer
    caption = "" if raw is None else normalise_caption(raw, request.category)
    row = {
        "id": request.id,
        "image_id": request.image_id,
        "image": request.image,
        "category": request.category,
        "raw": raw or "",
        "caption": caption,
    }
    if raw is None:
        row["failure"] = UNREADABLE
    elif not caption:
        row["failure"] = EMPTY
    elif IMAGE in caption or STOP in caption:
        row |= {"caption": "", "failure": MARKED}
    return row


def _requests(job: CaptionJob, source: ImageSource) -> tuple[list[CaptionRequest], Counter[str]]:
    """What is to be captioned, and what cannot be, by reason."""
    instances = read_instances(job.annotations)
    if job.limit is not None:
        instances.images = instances.images[: job.limit]
    requests = caption_requests(instances, job.crowd)
    if not requests:
        raise DataError(
            f"captioning {job.annotations}: none of its {len(instances.images)} images has an object that its category "
            "name alone picks out; needed is at least one"
        )
    names = dict.fromkeys(request.image for request in requests)
    there = {name for name in names if source.has(name)}
    if not there:
        raise DataError(
            f"captioning: {job.images} holds none of the {len(names)} images that are to be described (the first is "
            f"{requests[0].image}); give the folder that their file names are relative to"
        )
    asked = [request for request in requests if request.image in there]
    missing = len(requests) - len(asked)
    return asked, instances.skipped + Counter({MISSING: missing})


def _finish(
    job: CaptionJob,
    identity: dict[str, Any],
    engine: str,
    requests: Sequence[CaptionRequest],
    rows: dict[int, dict[str, Any]],
    skipped: Counter[str],
    failed: Counter[str],
) -> CaptionReport:
    dropped = Counter(row["dropped"] for row in rows.values() if "dropped" in row)
    report = CaptionReport(
        images=len({request.image_id for request in requests}),
        objects=len(requests),
        captions=sum(bool(row["caption"]) for row in rows.values()),
        skipped=dict(sorted(skipped.items())),
        failed=dict(sorted(failed.items())),
        dropped=dict(sorted(dropped.items())),
    )
    write_jsonl(job.output, (rows[key] for key in sorted(rows)))
    meta = {
        "identity": identity,
        "counts": {"images": report.images, "objects": report.objects, "captions": report.captions},
        "skipped": report.skipped,
        "failed": report.failed,
        "dropped": report.dropped,
        "engine": engine,
        "prompt": CAPTION_PROMPT,
        "decoding": job.decoding.model_dump(mode="json"),
        "locvlm": __version__,
    }
    write_json(meta_path(job.output), meta)
    partial_path(job.output).unlink()
    return report


def _identity(job: CaptionJob, engine: str) -> dict[str, Any]:
    """What decides every caption; equal identities give equal files."""
    if not job.annotations.is_file():
        raise DataError(f"captioning: there is no annotation file {job.annotations}")
    return {
        "annotations": fingerprint(job.annotations),
        "model": fingerprint(job.model),
        "engine": engine,
        "crowd": job.crowd,
        "limit": job.limit,
        "batch_size": job.batch_size,  # what shares a batch may touch the last bits of a number
        "max_new_tokens": job.max_new_tokens,
        "round_trip": job.round_trip,
    }


def _boxes_of(model: Path, engine: str) -> LocationFormat:
    """How a checkpoint writes boxes. Raises ConfigError when nothing says so."""
    config: ExperimentConfig | None = load_config(model / "locvlm.yaml") if engine == "locvlm" else None
    if config is None or config.coordinates.location != "bbox":
        found = "nothing in it says how it writes places" if config is None else "it writes points, not boxes"
        raise ConfigError(
            f"captioning with a round trip by {model}: {found}; give a LocVLM checkpoint that writes boxes, or drop "
            "--round-trip"
        )
    return make_location_format(config.coordinates, make_geometry(config.geometry))
