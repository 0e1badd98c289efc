"""Training checkpoints in a local folder: `step-000200/`, written under a temporary name, the newest two kept."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from locvlm.training.loop import Point


class FolderCheckpoints:
    """Checkpoints of a run without Ray. `keep`: how many of the newest stay."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep

    def latest(self) -> Path | None:
        """The newest whole checkpoint, or None."""
        found = sorted(self.folder.glob("step-*"))
        return found[-1] if found else None

    def save(self, step: int, write: Callable[[Path], None], point: Point) -> None:
        """Write `step-N`, then remove the older ones."""
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".step-", dir=self.folder))
        try:
            write(temporary)
            temporary.rename(self.folder / f"step-{step:09d}")
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        for old in sorted(self.folder.glob("step-*"))[: -self.keep]:
            shutil.rmtree(old)
