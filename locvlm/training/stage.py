"""One stage of training, the same for every way of running it: what goes in, what comes out, what makes it resume.

The output folder appears whole, at the end. Until then a run lives in `.<output>.training` beside it.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from locvlm.config import ClusterConfig, ExperimentConfig, StageConfig, resolve
from locvlm.coordinates import make_location_format
from locvlm.data.conversations import STRUCTURED, ConversationFile, open_conversations
from locvlm.data.dataset import TrainingData
from locvlm.data.instruct import Renderer
from locvlm.errors import CheckpointError, ConfigError, DataError
from locvlm.geometry import make_geometry
from locvlm.model.checkpoint import refuse_other_parent, save, start
from locvlm.model.lora import LORA_FOLDER, check_lora, is_lora, write_lora
from locvlm.model.stages import set_trainable
from locvlm.model.variants import LocVLM
from locvlm.pixels import ImageSource, open_images
from locvlm.records import fingerprint, read_json, write_json
from locvlm.training.curve import Curve
from locvlm.training.engine import Engine, TorchEngine
from locvlm.training.loop import Checkpoints, Point, share, train
from locvlm.training.validation import ASKED, BEST_NAME, HeldOut, Validation, open_held_out, read_best

log = logging.getLogger(__name__)

MEMO = "mlflow.json"  # in the run's folder: its MLflow run, so that it goes on there as well
ATTEMPTS_NAME = "attempts.jsonl"  # a line for each time that the run was begun or gone on with

StageName = Literal["align", "instruct", "video"]


@dataclass(frozen=True, slots=True)
class Job:
    """All that a stage needs to know; crosses to the workers as a plain dict.

    `data`: source name -> dataset folder or LLaVA JSON file; `images`: the image folder (or shards) of all sources, or
    source name -> its own; `parent`: checkpoint to start from, or None for the foundation of the config; `validation`:
    name -> held-out set, see `locvlm.training.validation`.
    """

    stage: StageName
    config: ExperimentConfig
    data: dict[str, Path]
    images: Path | dict[str, Path]
    output: Path
    parent: Path | None = None
    validation: dict[str, Path] = field(default_factory=dict)

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
    def image_folders(self) -> dict[str, Path]:
        """Source or held-out set -> the folder of its images. Raises ConfigError when one has none."""
        names = {**self.data, **self.validation}
        if isinstance(self.images, Path):
            return dict.fromkeys(names, self.images)
        missing = sorted(set(names) - set(self.images))
        if missing:
            raise ConfigError(
                f"training {self.stage}: there are no images for the source {missing[0]}; add --images "
                f"{missing[0]}=DIR, or --images DIR for all sources that have none of their own"
            )
        return {name: self.images[name] for name in names}

    @property
    def folder(self) -> Path:
        """Where the run keeps its checkpoints and curve until it is finished."""
        return self.output.parent / f".{self.output.name}.training"

    @property
    def fingerprint(self) -> str:
        """Equal for runs that would train the same: config, data, parent, held-out data (it may choose the weights)."""
        parts = [self.stage, self.config.fingerprint()]
        parts += [f"{name}={fingerprint_of(path)}" for name, path in sorted(self.data.items())]
        parts.append(_weights_fingerprint(self.parent) if self.parent else "")
        parts += [f"held out {name}={fingerprint_of(path)}" for name, path in sorted(self.validation.items())]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the way to a worker."""
        return {
            "stage": self.stage,
            "config": self.config.model_dump(mode="json"),
            "data": {name: str(path) for name, path in self.data.items()},
            "images": (
                str(self.images)
                if isinstance(self.images, Path)
                else {name: str(path) for name, path in self.images.items()}
            ),
            "output": str(self.output),
            "parent": str(self.parent) if self.parent else None,
            "validation": {name: str(path) for name, path in self.validation.items()},
        }

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> "Job":
        """Back from `to_dict`; the config is validated again on arrival."""
        return cls(
            stage=value["stage"],
            config=resolve(value["config"]),
            data={name: Path(path) for name, path in value["data"].items()},
            images=(
                Path(value["images"])
                if isinstance(value["images"], str)
                else {name: Path(path) for name, path in value["images"].items()}
            ),
            output=Path(value["output"]),
            parent=Path(value["parent"]) if value["parent"] else None,
            validation={name: Path(path) for name, path in value["validation"].items()},
        )


def check(job: Job, n_workers: int) -> None:
    """Find the user's mistakes before anything is started: missing data, a source that was built for other places, a
    parent that was trained otherwise, a batch that does not divide. Raises UserError."""
    settings, least = job.settings, job.config.cluster.min_workers
    if n_workers and least > n_workers:
        raise ConfigError(
            f"training {job.stage}: cluster.min_workers is {least} and there are to be {n_workers} workers at most; "
            f"give --workers {least} or more, or a smaller cluster.min_workers"
        )
    share(settings, 0, max(1, n_workers), elastic=least > 0)
    if job.parent is not None:
        refuse_other_parent(job.parent, job.config)
    if job.config.model.lora is not None and "language" in settings.trainable:
        check_lora(job.config.model.lora)
    stores = _open_stores(job.image_folders)
    for name, path in job.data.items():
        _refuse_other_places(f"training on {name}", open_conversations(path), job.config)
    _check_validation(job, _open_held_out(job, stores))
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
    set_trainable(loaded.model, settings.trainable, config.model.lora, config.seed)
    stores = _open_stores(job.image_folders)
    geometry = make_geometry(config.geometry)
    data = TrainingData(
        settings,
        {name: open_conversations(path) for name, path in job.data.items()},
        stores,
        Renderer(make_location_format(config.coordinates, geometry), config.prompts, config.seed),
        loaded.encoder,
        geometry,
        config.model.language.max_length,
        config.seed,
        config.video,
    )
    engine = make_engine(loaded.model, settings, config.cluster, device)
    curve = Curve(job.folder / "curve.jsonl") if engine.rank == 0 else None

    def on_point(point: Point) -> None:
        if curve is not None:
            curve.add(asdict(point))
        beat(point)

    def on_begin(step: int) -> None:
        if engine.rank == 0:
            _note_attempt(job, step, engine.world)

    held_out = _open_held_out(job, stores)
    last = train(
        settings,
        data,
        engine,
        checkpoints,
        loaded.encoder.pad_id,
        config.cluster,
        on_begin=on_begin,
        on_point=on_point,
        validate=Validation(held_out, settings, loaded, engine, job.folder) if held_out else None,
        show_progress=show_progress,
    )
    weights = engine.trained_weights()
    if engine.rank == 0:
        _finish(job, weights, last, engine)


def _note_attempt(job: Job, step: int, world: int) -> None:
    """`step`: the one that the attempt goes on from; `workers`: how many it has."""
    job.folder.mkdir(parents=True, exist_ok=True)
    with open(job.folder / ATTEMPTS_NAME, "a") as file:
        file.write(json.dumps({"step": step, "workers": world}) + "\n")


def make_engine(model: LocVLM, stage: StageConfig, cluster: ClusterConfig, device: torch.device) -> Engine:
    """The engine that the config names."""
    if cluster.recompute:
        model.enable_recompute()
    packed = stage.conversations_per_image > 1
    if packed and (cluster.attention == "flex" or (cluster.attention == "auto" and device.type == "cuda")):
        if device.type != "cuda":
            raise ConfigError(
                "preparing the model: cluster.attention is flex, which has no backward pass on a CPU; set it to auto"
            )
        model.model.language_model.set_attn_implementation("flex_attention")
    if cluster.engine == "ddp":
        return TorchEngine(model, stage, device)
    from locvlm.training.zero import ZeroEngine  # importing deepspeed takes seconds

    return ZeroEngine(model, stage, cluster, device)


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
        has_begun = any(path.name not in (marker.name, MEMO, ATTEMPTS_NAME) for path in job.folder.iterdir())
        if found != wanted and has_begun:
            raise ConfigError(
                f"training into {job.output}: an unfinished run of another configuration, other data or another parent "
                f"lies in {job.folder} ({found}; this one is {wanted}); remove that folder or give another --output"
            )
        if has_begun:
            log.info("continuing the run in %s", job.folder)
        elif found != wanted:
            for name in (MEMO, ATTEMPTS_NAME):
                (job.folder / name).unlink(missing_ok=True)
    elif resume:
        raise ConfigError(f"resuming {job.output}: there is no unfinished run in {job.folder}; leave --resume out")
    write_json(marker, {"job": wanted})
    return True


def clear(job: Job) -> None:
    """Remove the folder of a finished run; its memo last, so that a second call never opens a second MLflow run."""
    for path in job.folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != MEMO:
            path.unlink()
    shutil.rmtree(job.folder)


def _finish(job: Job, weights: Mapping[str, torch.Tensor], last: Point, engine: Engine) -> None:
    """Write the output: the model as the stage began with it, and the weights that were trained; or those of the best
    step, where the config keeps them. LoRA updates stay apart from the weights that they change."""
    kept: dict[str, Any] = {"figure": "last", "step": last.step}
    if (job.folder / BEST_NAME).is_file():
        weights, kept = read_best(job.folder / BEST_NAME)
    loaded = start(job.config, job.parent)
    loaded.model.load_state_dict({name: value for name, value in weights.items() if not is_lora(name)}, strict=False)
    updates = {name: value for name, value in weights.items() if is_lora(name)}
    receipt = {
        "stage": job.stage,
        "model": job.output.name,
        "job": job.fingerprint,
        "config": job.config.fingerprint(),
        "parent": str(job.parent) if job.parent else job.config.model.foundation,
        "data": {name: fingerprint_of(path) for name, path in job.data.items()},
        "workers": engine.world,
        "precision": engine.precision,
        "attempts": len((job.folder / ATTEMPTS_NAME).read_text().splitlines()),
        "steps": last.step,
        "kept": kept,
        "lora": bool(updates),
        "loss": last.loss,
        "tokens": last.tokens,
        "targets": last.targets,
        "conversations": last.conversations,
        "seconds": last.seconds,
    }

    def complete(folder: Path) -> None:
        for curve in job.folder.glob("*.jsonl"):
            shutil.copy(curve, folder / curve.name)
        if job.config.model.lora is not None and updates:
            write_lora(folder / LORA_FOLDER, job.config.model.lora, updates)
        write_json(folder / "receipt.json", {**receipt, "fingerprint": _weights_fingerprint(folder)})

    save(loaded, job.output, complete=complete)


def _open_stores(folders: dict[str, Path]) -> dict[str, ImageSource]:
    """Each folder opened once, so that sources that share it share its images."""
    opened = {folder: open_images(folder) for folder in dict.fromkeys(folders.values())}
    return {name: opened[folder] for name, folder in folders.items()}


def _open_held_out(job: Job, stores: Mapping[str, ImageSource]) -> list[HeldOut]:
    return [open_held_out(name, path, stores[name], job.config) for name, path in job.validation.items()]


def _check_validation(job: Job, sets: Sequence[HeldOut]) -> None:
    for one in sets:
        if one.conversations is not None:
            _refuse_other_places(f"validating on {one.name}", one.conversations, job.config)
    keep = job.config.cluster.keep_best
    known = sorted(set().union(*(one.figures for one in sets)))
    if job.config.cluster.engine == "zero3":
        known = [figure for figure in known if figure not in ASKED]
    if keep != "last" and keep not in known:
        raise ConfigError(
            f"training {job.stage}: cluster.keep_best is {keep}, and the held-out data gives "
            f"{', '.join(known) or 'no figure'} (cluster.engine {job.config.cluster.engine}); add a set that gives it "
            "with --validate, or set cluster.keep_best=last"
        )


def _refuse_other_places(doing: str, file: ConversationFile, config: ExperimentConfig) -> None:
    manifest = file.manifest or {}
    if not any(manifest.get("counts", {}).get(objective) for objective in STRUCTURED):
        return  # literal text: it names no places of ours
    for section in ("coordinates", "geometry"):
        theirs, ours = manifest.get(section), getattr(config, section).model_dump(mode="json")
        if theirs and theirs != ours:
            raise DataError(
                f"{doing} ({file.path}): its {section} differ from the config's\n  data:   {theirs}\n"
                f"  config: {ours}\nbuild the data again with this config, or use the config it was built with"
            )


def _weights_fingerprint(folder: Path) -> str:
    """Of all the weights of a model folder: its own, LoRA updates, those of a LLaVA checkpoint in several files."""
    files = sorted(path for kind in ("*.safetensors", "*.bin") for path in folder.rglob(kind))
    if not files:
        raise CheckpointError(f"reading the model {folder}: there are no weights in it; copy or train it again")
    if len(files) == 1:
        return fingerprint(files[0])
    parts = "\n".join(f"{path.relative_to(folder)}={fingerprint(path)}" for path in files)
    return f"sha256:{hashlib.sha256(parts.encode()).hexdigest()}"


def fingerprint_of(path: Path) -> str:
    """The fingerprint of a dataset folder (its manifest, which holds those of its sources) or of a file."""
    manifest = path / "manifest.json"
    return fingerprint(manifest if manifest.is_file() else path)
