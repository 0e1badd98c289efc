"""One stage of training, the same for every way of running it: what goes in, what comes out, what makes it resume.

The output folder appears whole, at the end. Until then a run lives in `.<output>.training` beside it.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from locvlm.config import ExperimentConfig, StageConfig, resolve
from locvlm.coordinates import make_location_format
from locvlm.data.conversations import STRUCTURED, ConversationFile, open_conversations
from locvlm.data.dataset import TrainingData
from locvlm.data.instruct import Renderer
from locvlm.errors import ConfigError, DataError
from locvlm.geometry import make_geometry
from locvlm.model.checkpoint import save, start
from locvlm.model.stages import set_trainable
from locvlm.records import fingerprint, read_json, write_json
from locvlm.training.engine import TorchEngine
from locvlm.training.loop import Checkpoints, Point, share, train

log = logging.getLogger(__name__)

StageName = Literal["align", "instruct", "video"]


@dataclass(frozen=True, slots=True)
class Job:
    """All that a stage needs to know; crosses to the workers as a plain dict.

    `data`: source name -> dataset folder or LLaVA JSON file; `parent`: checkpoint to start from, or None for the
    foundation of the config.
    """

    stage: StageName
    config: ExperimentConfig
    data: dict[str, Path]
    images: Path
    output: Path
    parent: Path | None = None

    @property
    def settings(self) -> StageConfig:
        """The config section of the stage. Raises ConfigError when the preset has no such stage."""
        found: StageConfig | None = getattr(self.config.stages, self.stage)
        if found is None:
            raise ConfigError(
                f"training stage {self.stage!r}: the configuration {self.config.name!r} has no such stage"
            )
        return found

    @property
    def folder(self) -> Path:
        """Where the run keeps its checkpoints and curve until it is finished."""
        return self.output.parent / f".{self.output.name}.training"

    @property
    def fingerprint(self) -> str:
        """Equal for runs that would train the same: config, data, parent."""
        parts = [self.stage, self.config.fingerprint()]
        parts += [f"{name}={fingerprint_of(path)}" for name, path in sorted(self.data.items())]
        parts.append(fingerprint(self.parent / "model.safetensors") if self.parent else "")
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the way to a worker."""
        return {
            "stage": self.stage,
            "config": self.config.model_dump(mode="json"),
            "data": {name: str(path) for name, path in self.data.items()},
            "images": str(self.images),
            "output": str(self.output),
            "parent": str(self.parent) if self.parent else None,
        }

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> "Job":
        """Back from `to_dict`; the config is validated again on arrival."""
        return cls(
            stage=value["stage"],
            config=resolve(value["config"]),
            data={name: Path(path) for name, path in value["data"].items()},
            images=Path(value["images"]),
            output=Path(value["output"]),
            parent=Path(value["parent"]) if value["parent"] else None,
        )


def check(job: Job, n_workers: int) -> None:
    """Find the user's mistakes before anything is started: missing data, a source that was built for other places, a
    batch that does not divide. Raises UserError."""
    settings = job.settings
    share(settings, 0, max(1, n_workers))
    if not job.images.is_dir():
        raise DataError(f"training {job.stage}: the image folder {job.images} does not exist; check --images")
    for name, path in job.data.items():
        _refuse_other_places(name, open_conversations(path), job.config)
    missing = sorted({entry.source for entry in settings.mixture} - set(job.data))
    if missing:
        raise ConfigError(
            f"training {job.stage}: the mixture names the source(s) {', '.join(missing)}, but --data gave "
            f"{', '.join(sorted(job.data)) or 'none'}; add --data {missing[0]}=PATH or change the stage's mixture"
        )


def run(
    job: Job,
    checkpoints: Checkpoints,
    device: torch.device,
    beat: Callable[[Point], None] = lambda point: None,
    *,
    show_progress: bool = False,
) -> None:
    """Train the stage in this process (one of `world` where a process group exists); rank 0 writes the output."""
    settings, config = job.settings, job.config
    loaded = start(config, job.parent)
    set_trainable(loaded.model, settings.trainable)
    geometry = make_geometry(config.geometry)
    data = TrainingData(
        settings,
        {name: open_conversations(path) for name, path in job.data.items()},
        job.images,
        Renderer(make_location_format(config.coordinates, geometry), config.prompts, config.seed),
        loaded.encoder,
        geometry,
        config.model.language.max_length,
        config.seed,
    )
    engine = TorchEngine(loaded.model, settings, device)
    curve = Curve(job.folder / "curve.jsonl") if engine.rank == 0 else None

    def on_point(point: Point) -> None:
        if curve is not None:
            curve.add(point)
        beat(point)

    last = train(
        settings,
        data,
        engine,
        checkpoints,
        loaded.encoder.pad_id,
        checkpoint_every=config.cluster.checkpoint_every,
        log_every=config.cluster.log_every,
        on_point=on_point,
        show_progress=show_progress,
    )
    if engine.rank == 0:
        _finish(job, loaded, last, engine.world)


class Curve:
    """`curve.jsonl`: one line a point. After a resume the points that are trained again replace the old ones."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.last = _last_step(path)

    def add(self, point: Point) -> None:
        """Append a point, dropping what lies at or after its step."""
        if point.step <= self.last:
            kept = [line for line in self.path.read_text().splitlines() if json.loads(line)["step"] < point.step]
            self.path.write_text("".join(line + "\n" for line in kept))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a") as file:
            file.write(json.dumps(asdict(point)) + "\n")
        self.last = point.step


def begin(job: Job, *, resume: bool = False) -> bool:
    """Make the run folder ready; False when the output is finished already.

    An unfinished run of the same job goes on where it stopped. Raises ConfigError when the output or the unfinished run
    belongs to another job, or when `resume` was asked for and there is nothing to resume.
    """
    wanted = job.fingerprint
    receipt, marker = job.output / "receipt.json", job.folder / "job.json"
    if job.output.exists():
        found = read_json(receipt).get("job") if receipt.is_file() else "no finished training"
        if found == wanted:
            return False
        raise ConfigError(
            f"training into {job.output}: the folder exists and holds another run ({found}; this one is {wanted}); "
            "give another --output or remove it"
        )
    if marker.is_file():
        found = read_json(marker).get("job")
        if found != wanted:
            raise ConfigError(
                f"training into {job.output}: an unfinished run of another configuration, other data or another parent "
                f"lies in {job.folder} ({found}; this one is {wanted}); remove that folder or give another --output"
            )
        log.info("continuing the run in %s", job.folder)
    elif resume:
        raise ConfigError(f"resuming {job.output}: there is no unfinished run in {job.folder}; leave --resume out")
    write_json(marker, {"job": wanted})
    return True


def _finish(job: Job, loaded: Any, last: Point, world: int) -> None:
    receipt = {
        "stage": job.stage,
        "model": job.output.name,
        "job": job.fingerprint,
        "config": job.config.fingerprint(),
        "parent": str(job.parent) if job.parent else job.config.model.foundation,
        "data": {name: fingerprint_of(path) for name, path in job.data.items()},
        "workers": world,
        "steps": last.step,
        "loss": last.loss,
        "tokens": last.tokens,
        "targets": last.targets,
        "conversations": last.conversations,
        "seconds": last.seconds,
    }

    def complete(folder: Path) -> None:
        shutil.copy(job.folder / "curve.jsonl", folder / "curve.jsonl")
        write_json(folder / "receipt.json", {**receipt, "fingerprint": fingerprint(folder / "model.safetensors")})

    save(loaded, job.output, complete=complete)


def _refuse_other_places(name: str, file: ConversationFile, config: ExperimentConfig) -> None:
    manifest = file.manifest or {}
    if not any(manifest.get("counts", {}).get(objective) for objective in STRUCTURED):
        return  # literal text: it names no places of ours
    for section in ("coordinates", "geometry"):
        theirs, ours = manifest.get(section), getattr(config, section).model_dump(mode="json")
        if theirs and theirs != ours:
            raise DataError(
                f"training on {name} ({file.path}): its {section} differ from the config's\n  data:   {theirs}\n"
                f"  config: {ours}\nbuild the data again with this config, or use the config it was built with"
            )


def fingerprint_of(path: Path) -> str:
    """The fingerprint of a dataset folder (its manifest, which holds those of its sources) or of a file."""
    manifest = path / "manifest.json"
    return fingerprint(manifest if manifest.is_file() else path)


def _last_step(path: Path) -> int:
    if not path.is_file():
        return 0
    lines = path.read_text().splitlines()
    return int(json.loads(lines[-1])["step"]) if lines else 0
