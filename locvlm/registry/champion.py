"""Who is champion, who was, and the way back.

Every change of the alias is a tag of the registered model of its own (`champion/TIME` -> JSON), so nothing is rewritten
and two that write at once lose nothing.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from locvlm.errors import TrackingError
from locvlm.registry.versions import CHAMPION, champion_of, exists, versions_of
from locvlm.tracking import connect, initialise, reaching

PROMOTED, ROLLED_BACK = "promoted", "rolled back"
PREFIX = "champion/"  # of the tags that hold the history
LONGEST_REASON = 1000  # characters; a tag holds 5000


@dataclass(frozen=True, slots=True)
class Change:
    """`version` became champion in place of `before` ("" for none). `at`: UTC; `how`: PROMOTED or ROLLED_BACK."""

    version: str
    before: str
    how: str
    by: str
    reason: str
    at: str = ""

    def to_dict(self) -> dict[str, str]:
        """The JSON form."""
        return asdict(self)


def crown(client: Any, name: str, change: Change) -> Change:
    """Move the alias and write the change down; returns it with its time. The caller translates MLflow's errors."""
    at = datetime.now(UTC).isoformat(timespec="microseconds").removesuffix("+00:00") + "Z"
    content = {key: value for key, value in change.to_dict().items() if key != "at"}
    client.set_registered_model_tag(name, f"{PREFIX}{at}", json.dumps(content))
    client.set_registered_model_alias(name, CHAMPION, change.version)
    return Change(at=at, **content)


def history(client: Any, name: str) -> list[Change]:
    """All changes of the champion, the oldest first. Tags that are not ours are left out."""
    changes = []
    for key, value in sorted(client.get_registered_model(name).tags.items()):
        if key.startswith(PREFIX):
            try:
                changes.append(Change(at=key.removeprefix(PREFIX), **json.loads(value)))
            except (ValueError, TypeError):
                continue
    return changes


def rollback(name: str, reason: str, by: str, to: str = "") -> Change:
    """Make the champion before this one champion again, or the version `to`, and write down who and why.

    After a rollback another one goes one champion further back. `to` must have been champion or have held its gates.
    Raises TrackingError when there is nothing to go back to, or `to` is no version that may be champion.
    """
    uri = initialise(connect().tracking_uri)
    client = connect(uri)
    doing = f"rolling {name} back"
    with reaching(uri):
        if not exists(client, name):
            raise TrackingError(f"{doing}: the registry has no model of this name")
        champion, changes, versions = champion_of(client, name), history(client, name), versions_of(client, name)
    if champion is None:
        raise TrackingError(f"{doing}: it has no champion; `locvlm promote` makes one")
    now = str(champion.version)
    target = to or _previous(now, changes)
    if not target:
        raise TrackingError(
            f"{doing}: no champion is known before version {now}; name a version with --to "
            f"(there are {_listed(versions)})"
        )
    _check_target(doing, target, now, versions, {change.version for change in changes})
    with reaching(uri):
        change = crown(client, name, Change(target, now, ROLLED_BACK, by, reason[:LONGEST_REASON]))
        client.set_model_version_tag(name, now, "rolled_back", f"{change.at} by {by}: {change.reason}")
    return change


def _previous(now: str, changes: Sequence[Change]) -> str:
    """The champion before `now`, rollbacks undone; "" when none is known."""
    line: list[str] = []
    for change in changes:
        if change.how == ROLLED_BACK and change.version in line:
            del line[line.index(change.version) + 1 :]
        elif not line or line[-1] != change.version:
            line += [change.before, change.version] if change.before and not line else [change.version]
    if now in line:
        del line[len(line) - 1 - line[::-1].index(now) :]
    return line[-1] if line else ""


def _check_target(doing: str, target: str, now: str, versions: Sequence[Any], champions: set[str]) -> None:
    found = [version for version in versions if str(version.version) == target]
    if not found:
        raise TrackingError(f"{doing} to version {target}: there is none; there are {_listed(versions)}")
    if target == now:
        raise TrackingError(f"{doing} to version {target}: it is champion already")
    if target not in champions and found[0].tags.get("gates") != "held":
        said = found[0].tags.get("gates", "were never asked")
        raise TrackingError(
            f"{doing} to version {target}: it never was champion, and its gates {said}; a version becomes champion by "
            "`locvlm promote`"
        )


def _listed(versions: Sequence[Any]) -> str:
    return ", ".join(sorted((str(version.version) for version in versions), key=int))
