"""Which engine answers for a model folder, and work on many batches: in this process, or by actors of Ray Data.

The one file outside training that names Ray. Ray and torch come in when they are needed, not before.
"""

import logging
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from locvlm.config import ExperimentConfig, FamilyConfig, load_config
from locvlm.errors import CheckpointError, ConfigError, LocVLMError, UserError
from locvlm.evaluation.asks import Engine
from locvlm.records import fingerprint, read_json

ENGINES = ("auto", "locvlm", "llava", "transformers", "vllm")

_CONFIG_FILE = "locvlm.yaml"  # what every checkpoint of ours holds
_T = TypeVar("_T")
_R = TypeVar("_R")


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A model in a folder and the engine that runs it. Travels to workers by pickle.

    `places`: a config that says how a model of others is to write places, instead of what is known of its family.
    """

    path: Path
    engine: str
    places: ExperimentConfig | None = None

    def identity(self) -> dict[str, Any]:
        """What decides its answers beside how it is asked: its files, and which engine reads them."""
        return {"model": fingerprint(self.path), "engine": self.engine}

    def describe(self) -> ExperimentConfig | FamilyConfig:
        """How it is asked; reads no weights. Raises CheckpointError, ConfigError as `open`."""
        if self.engine == "locvlm":
            if self.places is not None:
                raise ConfigError(
                    f"opening the model {self.path}: a LocVLM checkpoint says how it writes places; drop --config"
                )
            try:
                return load_config(self.path / _CONFIG_FILE)
            except ConfigError as error:
                raise CheckpointError(f"opening the model {self.path}: {error}") from None
        from locvlm.model.llava import llava_family
        from locvlm.model.stock import stock_family

        family = llava_family(self.path) if self.engine == "llava" else stock_family(self.path)
        if self.places is None:
            return family
        return family.model_copy(update={"coordinates": self.places.coordinates, "loc_pred": "", "rev_loc": ""})

    def receipt(self) -> Any:
        """What training wrote beside the weights; None where there is nothing."""
        path = self.path / "receipt.json"
        return read_json(path) if path.is_file() else None

    def open(self) -> Engine:
        """The model, ready to answer: in bfloat16 on the GPU where there is one, else in float32.

        Raises CheckpointError for a folder that is not a whole model, ConfigError for an engine that cannot run here.
        """
        import torch

        from locvlm.model import load
        from locvlm.model.llava import load_llava
        from locvlm.model.stock import VllmModel, load_stock

        gpu = torch.cuda.is_available()
        device, dtype = torch.device("cuda" if gpu else "cpu"), torch.bfloat16 if gpu else torch.float32
        config = self.describe()
        if isinstance(config, FamilyConfig):
            if self.engine == "vllm":
                return VllmModel(self.path, config)
            return (load_llava if self.engine == "llava" else load_stock)(self.path, config, device, dtype)
        loaded = load(self.path)
        loaded.model.to(device, dtype)
        return loaded


def model_folder(folder: Path, engine: str = "auto", places: ExperimentConfig | None = None) -> ModelFolder:
    """A folder with the engine that `choose_engine` chooses. Raises CheckpointError, ConfigError."""
    return ModelFolder(folder, choose_engine(folder, engine), places)


def choose_engine(folder: Path, name: str = "auto") -> str:
    """The engine for a model folder: locvlm, llava, transformers or vllm. Reads its config.json, nothing more.

    `auto`: locvlm for a checkpoint of ours, llava for LLaVA's own layout (LLaVA, Shikra, Video-ChatGPT); for any other
    folder vllm where it is installed beside a GPU, else transformers. Raises CheckpointError for a folder that is no
    model or one of an unknown kind, ConfigError for an engine that cannot run it.
    """
    if name not in ENGINES:
        raise ConfigError(f"choosing the engine: {name!r} is not one of {', '.join(ENGINES)}")
    if not folder.is_dir():
        raise CheckpointError(
            f"opening the model {folder}: there is no such folder; needed is an output folder of `locvlm train`, or a "
            "model folder in the Hugging Face layout (`hf download <id> --local-dir <folder>`)"
        )
    import torch

    from locvlm.model.sources import is_own_layout
    from locvlm.model.stock import model_type, refuse_unknown

    if model_type(folder) == "locvlm":
        own, kind, advice = (
            "locvlm",
            "a LocVLM checkpoint",
            "use --engine auto, or `locvlm export` it for other engines",
        )
    elif is_own_layout(folder):
        own, kind, advice = "llava", "a model in LLaVA's own layout", "use --engine auto"
    else:
        refuse_unknown(folder)
        own, kind, advice = "", "no LocVLM checkpoint and not in LLaVA's own layout", "use --engine auto"
    if name == "auto":
        has_vllm = find_spec("vllm") is not None and torch.cuda.is_available()
        return own or ("vllm" if has_vllm else "transformers")
    if own != (name if name in ("locvlm", "llava") else ""):
        raise ConfigError(f"opening the model {folder} with the engine {name}: it is {kind}; {advice}")
    return name


def open_engine(folder: Path, name: str = "auto") -> Engine:
    """The model of a folder, ready to answer. Raises CheckpointError, ConfigError as `choose_engine` and `open`."""
    return model_folder(folder, name).open()


def run_batches(
    open_model: Callable[[], Engine],
    work: Callable[[Engine, Sequence[_T]], _R],
    batches: Sequence[Sequence[_T]],
    n_workers: int = 1,
) -> Iterator[tuple[int, _R]]:
    """Yield (number of the batch, `work(model, batch)`) as batches are done, which with several workers is in any
    order. Whatever comes of a batch does not depend on the number of workers.

    Up to one worker: a loop in this process. More: Ray Data actors, each with its own model (and GPU, where the cluster
    has any), on the cluster at RAY_ADDRESS or on a Ray started for it. `open_model`, `work` and the batches travel to
    the actors by pickle. A worker's UserError is raised as such, anything else as LocVLMError.
    """
    if not batches:
        return
    if n_workers > 1:
        yield from _run_on_ray(open_model, work, batches, n_workers)
        return
    model = open_model()
    for number, batch in enumerate(batches):
        yield number, work(model, batch)


def _run_on_ray(
    open_model: Callable[[], Engine],
    work: Callable[[Engine, Sequence[_T]], _R],
    batches: Sequence[Sequence[_T]],
    n_workers: int,
) -> Iterator[tuple[int, _R]]:
    import ray
    import ray.data

    started = not ray.is_initialized()
    if started:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        if not os.access(Path.home(), os.W_OK):
            os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # the token file could not be written
        ray.init(address=os.environ.get("RAY_ADDRESS", "local"), log_to_driver=False, logging_level="warning")
    try:
        need = _need(ray.cluster_resources(), n_workers)
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what goes wrong is raised, below
        ray.data.DataContext.get_current().enable_progress_bars = False
        rows = [{"number": number, "batch": pickle.dumps(batch)} for number, batch in enumerate(batches)]
        # a block a batch: what is done arrives at once, and a kill costs no more than what is under way
        answered = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            _Actor,
            fn_constructor_args=(open_model, work),
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=n_workers),
            **need,
        )
        for table in answered.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            for row in table.to_pylist():
                result = pickle.loads(row["result"])
                if isinstance(result, UserError):
                    raise result
                yield row["number"], result
    except ray.exceptions.RayError as error:
        raise LocVLMError(f"inference on Ray failed: {error}") from error
    finally:
        if started:
            ray.shutdown()


class _Actor:
    """One model at work; a table of batches becomes a table of results."""

    def __init__(self, open_model: Callable[[], Engine], work: Callable[[Engine, Sequence[Any]], Any]) -> None:
        self._open_model, self._work = open_model, work
        self._model: Engine | None = None

    def __call__(self, table: Any) -> Any:
        import pyarrow as pa

        results = [pickle.dumps(self._result(raw)) for raw in table["batch"].to_pylist()]
        return pa.table({"number": table["number"], "result": pa.array(results, pa.large_binary())})

    def _result(self, raw: bytes) -> Any:
        """What `work` gives, or the user's mistake: as a value, since Ray wraps what is raised."""
        try:
            if self._model is None:
                self._model = self._open_model()
            return self._work(self._model, pickle.loads(raw))
        except UserError as error:
            return error


def _need(resources: dict[str, float], n_workers: int) -> dict[str, float]:
    """What each actor asks of the cluster. Raises ConfigError when there is not enough: Ray would wait for ever."""
    kind = "GPU" if resources.get("GPU", 0) else "CPU"
    found = int(resources.get(kind, 0))
    if found < n_workers:
        raise ConfigError(
            f"starting {n_workers} workers: the cluster has {found} {kind}s and each worker needs one; "
            f"set --workers to {found} or less"
        )
    return {"num_gpus": 1} if kind == "GPU" else {"num_cpus": 1}
