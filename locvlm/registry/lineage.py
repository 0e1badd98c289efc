"""Where a version comes from, and which versions came of something: both directions of the same tags.

A version carries the id of its pipeline run (`lineage`) and what it was made of; every MLflow run of that pipeline run
carries the same id, and those of a RayJob its name.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from locvlm.errors import TrackingError
from locvlm.registry.versions import exists, versions_of
from locvlm.tracking import connect, initialise, reaching

# what `find` takes -> the tags of a version that hold it
OF_VERSION = {
    "lineage": ("lineage", "lineage.before"),
    "data": ("data",),
    "commit": ("git",),
    "code": ("code",),
    "config": ("config",),
    "image": ("image",),
    "kfp_run": ("kfp.run",),
    "run": (),
    "job": (),
}
ABBREVIATED = ("data", "commit", "image")  # the beginning is enough: of a hash; the name of an image without its digest


@dataclass(frozen=True, slots=True)
class TrackedRun:
    """A run of MLflow. `ray_job`: the RayJob that it ran in ("" for none)."""

    id: str
    name: str
    status: str
    ray_job: str
    is_parent: bool


@dataclass(frozen=True, slots=True)
class Origin:
    """What a version is made of; "" for what is not known. `made_by`: its tags as `locvlm register` wrote them."""

    name: str
    version: str
    aliases: tuple[str, ...]
    lineage: str
    data: str
    commit: str
    code: str
    image: str
    config: str
    weights: str
    kfp_runs: tuple[str, ...]
    ray_jobs: tuple[str, ...]
    runs: tuple[TrackedRun, ...]
    made_by: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return asdict(self)


def trace(name: str, version: str) -> Origin:
    """The origin of a version of the model `name`, given by its number or by an alias such as `champion`.

    Raises TrackingError when there is no such version or the registry cannot be used.
    """
    uri = initialise(connect().tracking_uri)
    client = connect(uri)
    with reaching(uri):
        if not exists(client, name):
            raise TrackingError(f"tracing {name} version {version}: the registry has no model of this name")
        aliases = {alias: str(number) for alias, number in client.get_registered_model(name).aliases.items()}
        versions = {str(found.version): found for found in versions_of(client, name)}
        found = versions.get(aliases.get(version, version))
        if found is None:
            known = ", ".join([*sorted(versions, key=int), *sorted(aliases)])
            raise TrackingError(f"tracing {name} version {version}: there is none; there are {known}")
        runs = _runs_of(client, found)
    tags = found.tags
    kfp = dict.fromkeys(run.data.tags.get("kfp.run", "") for run in runs) | dict.fromkeys([tags.get("kfp.run", "")])
    jobs = dict.fromkeys(run.data.tags.get("ray.job", "") for run in runs)
    return Origin(
        name=name,
        version=str(found.version),
        aliases=tuple(sorted(alias for alias, number in aliases.items() if number == str(found.version))),
        lineage=tags.get("lineage", ""),
        data=tags.get("data", ""),
        commit=tags.get("git", ""),
        code=tags.get("code", ""),
        image=tags.get("image", ""),
        config=tags.get("config", ""),
        weights=tags.get("weights", ""),
        kfp_runs=tuple(run for run in kfp if run),
        ray_jobs=tuple(job for job in jobs if job),
        runs=tuple(_tracked(run) for run in runs),
        made_by={key: value for key, value in sorted(tags.items()) if not key.startswith("figure/")},
    )


def find(what: str, value: str, name: str = "") -> list[tuple[str, str]]:
    """The versions, as (model, version), that came of `value`; `what`: one of OF_VERSION. Without `name`: of any model.

    The beginning of a data or commit hash is enough. Raises TrackingError when the registry cannot be used.
    """
    uri = initialise(connect().tracking_uri)
    client = connect(uri)
    with reaching(uri):
        names = [name] if name else [model.name for model in client.search_registered_models(max_results=1000)]
        versions = [version for one in names for version in versions_of(client, one)]
        lineages = _lineages(client, what, value)
    found = []
    for version in versions:
        own = [version.tags[key] for key in OF_VERSION[what] if key in version.tags]
        is_own = any(one == value or (what in ABBREVIATED and one.startswith(value)) for one in own)
        is_run = what == "run" and version.run_id == value
        if is_own or is_run or version.tags.get("lineage") in lineages:
            found.append((version.name, str(version.version)))
    return sorted(found, key=lambda one: (one[0], int(one[1])))


def _runs_of(client: Any, version: Any) -> list[Any]:
    """All runs of the version's lineage, the oldest first; without a lineage the one that registered it."""
    lineage = version.tags.get("lineage")
    if lineage:
        return _search(client, f"tags.lineage = '{lineage}'")
    return [client.get_run(version.run_id)] if version.run_id else []


def _lineages(client: Any, what: str, value: str) -> set[str]:
    """The lineages of which a run is, or is tagged with, `value`."""
    if what == "run":
        runs: Iterable[Any] = _search(client, f"attributes.run_id = '{value}'")
    elif what in ("job", "kfp_run"):
        runs = _search(client, f"tags.`{'ray.job' if what == 'job' else 'kfp.run'}` = '{value}'")
    else:
        return set()
    return {run.data.tags["lineage"] for run in runs if "lineage" in run.data.tags}


def _search(client: Any, condition: str) -> list[Any]:
    experiments = [one.experiment_id for one in client.search_experiments(max_results=1000)]
    return list(client.search_runs(experiments, condition, max_results=1000, order_by=["attributes.start_time ASC"]))


def _tracked(run: Any) -> TrackedRun:
    tags = run.data.tags
    is_parent = "mlflow.parentRunId" not in tags
    return TrackedRun(run.info.run_id, run.info.run_name, run.info.status, tags.get("ray.job", ""), is_parent)
