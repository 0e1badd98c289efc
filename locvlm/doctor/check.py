"""One check and its outcome."""

from dataclasses import asdict, dataclass
from typing import Literal

# failed: a run would not get through; warning: it would, but worse, or nobody could look
State = Literal["ok", "warning", "failed", "not applicable"]


@dataclass(frozen=True, slots=True)
class Check:
    """What was looked at, how it stands, what was found, and what to do about it ("" where it is ok)."""

    name: str
    state: State
    found: str
    mend: str = ""

    def to_dict(self) -> dict[str, str]:
        """The JSON form."""
        return asdict(self)
