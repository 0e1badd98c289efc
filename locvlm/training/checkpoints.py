"""Training checkpoints in a local folder: `step-000200/`, written in the background under a temporary name, the newest
two kept."""

import shutil
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

from locvlm.errors import LocVLMError, UserError
from locvlm.training.loop import Point


class SaveError(UserError):
    """A checkpoint could not be written; the one before it is whole."""


class FolderCheckpoints:
    """Checkpoints of a run without Ray. `keep`: how many of the newest stay."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep
        self._thread: threading.Thread | None = None
        self._fault: LocVLMError | None = None

    def latest(self) -> Path | None:
        """The newest whole checkpoint, or None."""
        found = sorted(self.folder.glob("step-*"))
        return found[-1] if found else None

    def save(self, step: int, write: Callable[[Path], None], point: Point) -> None:
        """Start writing `step-N`, once the one before is written. Raises SaveError when that one failed."""
        self.finish()
        self._thread = threading.Thread(target=self._save, args=(step, write), name=f"checkpoint-{step}")
        self._thread.start()

    def finish(self) -> None:
        """Wait for the last `save`. Raises SaveError when it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._fault is not None:
            fault, self._fault = self._fault, None
            raise fault

    def preempted(self) -> bool:
        """Never: nobody tells a lone process."""
        return False

    def _save(self, step: int, write: Callable[[Path], None]) -> None:
        try:
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
        except (OSError, RuntimeError) as error:  # torch.save says RuntimeError when the disk is full
            self._fault = save_error(step, self.folder, error)


def save_error(step: int, place: Path | str, error: Exception) -> SaveError:
    """The error of a checkpoint that could not be written."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    if isinstance(error, RuntimeError) and Path(place).exists():  # torch tells only the byte where it broke off
        reason = f"the file was cut short ({reason}), with {shutil.disk_usage(place).free / 1e6:.1f} MB free there"
    return SaveError(
        f"saving the checkpoint of step {step} in {place}: {reason}; the checkpoint before it is whole: make room or "
        "bring the storage back, and run the same command again"
    )
