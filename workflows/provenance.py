"""What a run is made of: the code, the settings and the data, each as a short hash."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGES = ("locvlm", "components", "workflows")


def code_version() -> str:
    """A hash of every file of the packages, so that a changed line is another version, committed or not."""
    digest = hashlib.sha256()
    for package in PACKAGES:
        for path in sorted((REPOSITORY / package).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                digest.update(path.relative_to(REPOSITORY).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def run_name(preset: str, parts: Sequence[object]) -> str:
    """The name of a run's folder: the same settings, data and code give the same name, so that a run can go on."""
    return f"{preset}-{hashlib.sha256(json.dumps(list(parts), default=str).encode()).hexdigest()[:10]}"
