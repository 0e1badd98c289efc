"""A version's checkpoint, wherever it lies: with the version, or where the version points."""

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

from locvlm.errors import TrackingError
from locvlm.records import fingerprint
from locvlm.tracking import connect, reaching

_URI = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>[0-9]+))")


@dataclass(frozen=True, slots=True)
class StoredCheckpoint:
    """A version's checkpoint in a folder of this machine."""

    name: str
    version: str
    folder: Path


def fetch_checkpoint(uri: str, into: Path) -> StoredCheckpoint:
    """The checkpoint of `models:/NAME@ALIAS` or `models:/NAME/VERSION`; files that lie with the version are downloaded
    into `into`. Raises TrackingError: no such version, the registry or the weights cannot be reached, or the weights
    are no longer those that were registered."""
    match = _URI.fullmatch(uri)
    if match is None:
        raise TrackingError(f"opening the model {uri!r}: needed is models:/NAME@ALIAS or models:/NAME/VERSION")
    client = connect()
    where = client.tracking_uri
    with reaching(where):
        name, alias = match["name"], match["alias"]
        found = (
            client.get_model_version_by_alias(name, alias)
            if alias
            else client.get_model_version(name, match["version"])
        )
    into.mkdir(parents=True, exist_ok=True)
    pointer = found.tags.get("weights", "")
    if pointer.startswith("file:"):
        return StoredCheckpoint(name, str(found.version), pointed_at(pointer, found.tags.get("fingerprint", ""), uri))
    with reaching(where), tempfile.TemporaryDirectory(dir=into) as folder:
        model = Path(client.download_artifacts(found.run_id, "model", folder))
        configs = [*model.rglob("locvlm.yaml")]
        if len(configs) != 1:
            raise TrackingError(f"opening the model {uri}: its version holds no checkpoint; register the model again")
        configs[0].parent.rename(into / "checkpoint")
    return StoredCheckpoint(name, str(found.version), into / "checkpoint")


def pointed_at(pointer: str, digest: str, whose: str) -> Path:
    """The folder of a file: address, checked to hold what was registered as `digest`. Raises TrackingError."""
    folder = Path(url2pathname(unquote(urlsplit(pointer).path)))
    if not folder.is_dir():
        raise TrackingError(
            f"opening the model {whose}: its weights were left in {folder}, which is not there; mount what holds it, "
            "or register the model again"
        )
    if fingerprint(folder) != digest:
        raise TrackingError(
            f"opening the model {whose}: {folder} no longer holds what was registered ({digest}); bring that back, or "
            "register the model again"
        )
    return folder
