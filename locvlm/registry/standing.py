"""What the registry knows of a model made from certain inputs: whether there is anything to train on."""

from collections.abc import Mapping
from dataclasses import dataclass

from locvlm.registry.versions import champion_of, exists, versions_of
from locvlm.tracking import connect, initialise, reaching


@dataclass(frozen=True, slots=True)
class Standing:
    """What the registry knows of a model made from certain inputs.

    `champion`: the version with that alias ("" for none); `changed`: input -> (the champion's, the one asked about),
    where they differ; `judged`: the newest version made from exactly these inputs that a gate has decided on ("" for
    none), and whether its gates `held`.
    """

    champion: str
    changed: dict[str, tuple[str, str]]
    judged: str = ""
    held: bool = False


def standing(name: str, inputs: Mapping[str, str]) -> Standing:
    """Compare `inputs` (tag -> value, such as data, code and config) with those of the versions of the model `name`.

    Raises TrackingError when the registry cannot be used.
    """
    uri = initialise(connect().tracking_uri)
    client = connect(uri)
    with reaching(uri):
        if not exists(client, name):
            return Standing("", {})
        champion = champion_of(client, name)
        versions = versions_of(client, name)
    tags = {} if champion is None else champion.tags
    changed = {key: (tags.get(key, ""), value) for key, value in inputs.items() if tags.get(key) != value}
    before = "" if champion is None else str(champion.version)
    for version in versions:
        if "gates" in version.tags and all(version.tags.get(key) == value for key, value in inputs.items()):
            return Standing(before, changed, str(version.version), version.tags["gates"] == "held")
    return Standing(before, changed)
