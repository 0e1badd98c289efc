"""A checkpoint as an MLflow model, so that `mlflow models serve` and `mlflow.pyfunc.load_model` open a version."""

import shutil
import tempfile
from pathlib import Path

from locvlm import __version__
from locvlm.errors import TrackingError

# Copied into the version by MLflow, never imported here: it belongs to a layer above.
CODE = Path(__file__).resolve().parent.parent / "serving" / "pyfunc.py"
_SMALL_FILES = (".json", ".yaml", ".jsonl")


def package(model_dir: Path, into: Path, weights: str, digest: str) -> None:
    """Write the MLflow model `into` a new folder: the whole checkpoint, or its small files and `weights`, the address
    of the folder that holds the rest. `digest`: the checkpoint's fingerprint, which that folder must still have when it
    is opened. Raises TrackingError when it cannot be written.
    """
    try:
        _package(model_dir, into, weights, digest)
    except OSError as fault:
        raise TrackingError(f"packing the model {model_dir} in {into}: {fault.strerror or fault}") from fault


def _package(model_dir: Path, into: Path, weights: str, digest: str) -> None:
    from mlflow import pyfunc

    with tempfile.TemporaryDirectory() as folder:
        checkpoint = model_dir
        if weights:
            checkpoint = Path(folder) / "checkpoint"
            checkpoint.mkdir()
            for path in model_dir.iterdir():
                if path.is_file() and path.suffix in _SMALL_FILES:
                    shutil.copyfile(path, checkpoint / path.name)
        pyfunc.save_model(
            str(into),
            python_model=str(CODE),
            artifacts={"checkpoint": str(checkpoint.absolute())},
            model_config={"weights": weights, "fingerprint": digest},
            pip_requirements=[f"locvlm=={__version__}"],
        )
