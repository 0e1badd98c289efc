"""A curve on disk: one JSON object a line, each with its `step`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from locvlm.errors import UserError
from locvlm.records import atomic_write


class CurveError(UserError):
    """A point could not be written down; the points before it are whole."""


class Curve:
    """A file of points by step. After a resume the points that are trained again replace the old ones."""

    def __init__(self, path: Path) -> None:
        self.path = path
        points = read_curve(path)
        self.last = int(points[-1]["step"]) if points else 0
        self._is_torn = path.is_file() and path.read_text()[-1:] not in ("", "\n")  # a full disk cut a line short

    def add(self, point: Mapping[str, float]) -> None:
        """Append a point, dropping what lies at or after its step. Raises CurveError when there is no room for it."""
        step = int(point["step"])
        try:
            if step <= self.last or self._is_torn:
                kept = [old for old in read_curve(self.path) if old["step"] < step]
                with atomic_write(self.path) as file:
                    file.writelines(json.dumps(old) + "\n" for old in kept)
                self._is_torn = False
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a") as file:
                file.write(json.dumps(dict(point)) + "\n")
        except OSError as fault:
            raise CurveError(
                f"writing step {step} into {self.path}: {fault.strerror or fault}; the points and the checkpoint "
                "before it are whole: make room or bring the storage back, and run the same command again"
            ) from None
        self.last = step


def read_curve(path: Path) -> list[dict[str, Any]]:
    """The points that are whole; none where there is no file. The last line may be half written."""
    if not path.is_file():
        return []
    lines = path.read_text().split("\n")[:-1]
    return [json.loads(line) for line in lines]
