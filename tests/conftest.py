"""What every test may rely on: a clean environment, the real samples, the API schemas."""

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("LOCVLM_SHARED", REPOSITORY.parent / "shared"))

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable of the caller decides a result."""
    for name in list(os.environ):
        if name.startswith(("MLFLOW_", "LOCVLM_", "KF_PIPELINES")):
            monkeypatch.delenv(name)


def _shared(name: str) -> Path:
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"no folder {name} beside the repository (set LOCVLM_SHARED to the folder that holds it)")
    return folder


@pytest.fixture(scope="session")
def realdata() -> Path:
    """Small pieces of real COCO, RefCOCO, VQA ... data with expected figures; not part of the project."""
    return _shared("realdata")


@pytest.fixture(scope="session")
def schemas() -> Path:
    """KubeRay and Kueue CRDs and KFP's OpenAPI file; not part of the project."""
    return _shared("schemas")
