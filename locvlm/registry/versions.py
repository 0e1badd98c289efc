"""Versions of a model: how one is made of a checkpoint folder, and how the others here find it again."""

import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from locvlm.config import load_config
from locvlm.errors import ConfigError, DataError, TrackingError
from locvlm.records import fingerprint, read_json, write_json
from locvlm.registry.package import package
from locvlm.tracking import connect, initialise, reaching, start_stage, tag_run

CHAMPION = "champion"
CHALLENGER = "challenger"
LARGEST_UPLOAD = 200_000_000  # bytes; the weights of a larger model stay where they are and the version points there

Metrics = Mapping[str, Any]  # the contents of one metrics.json


@dataclass(frozen=True, slots=True)
class Registered:
    """A model version. `source` is where the registry finds its files, `weights` where the weights lie."""

    name: str
    version: str
    run_id: str
    source: str
    weights: str
    fingerprint: str
    is_new: bool

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, for a receipt."""
        return asdict(self)


def register(model_dir: Path, metrics: Mapping[str, Path], name: str, tags: Mapping[str, str]) -> Registered:
    """Make a version of the model `name` from a checkpoint folder and give it the alias `challenger`.

    `metrics`: task -> its metrics.json, measured with this model. `tags`: the lineage to keep with the version. The
    same model with the same metrics gives the version that is there already, with the tags of now, so a retried step
    registers once. Weights up to LARGEST_UPLOAD bytes are stored with the run; larger ones stay in `model_dir`, and the
    version points there. Either way the version is an MLflow model (`package`).
    Raises TrackingError when the registry cannot be used, DataError for metrics of another model.
    """
    digest, config = _identify(model_dir)
    contents = {task: read_json(path) for task, path in metrics.items()}
    _refuse_other_model(model_dir, digest, contents)
    measured = fingerprint_of(contents)
    uri = initialise(connect().tracking_uri)
    client = connect(uri)
    with reaching(uri):
        for version in versions_of(client, name):
            if version.tags.get("fingerprint") == digest and version.tags.get("metrics") == measured:
                client.set_registered_model_alias(name, CHALLENGER, version.version)
                _retag(client, version, tags)
                weights = version.tags.get("weights", "")
                return Registered(name, str(version.version), version.run_id, version.source, weights, digest, False)
    weights = model_dir.absolute().as_uri()
    is_small = sum(path.stat().st_size for path in model_dir.rglob("*") if path.is_file()) <= LARGEST_UPLOAD
    every_tag = {
        **{f"figure/{key}": shown(figure) for key, figure in figures_of(contents).items()},
        **tags,
        "fingerprint": digest,
        "metrics": measured,
        "weights": "with the version" if is_small else weights,
        "gate": config.gate.model_dump_json(),
        "config": config.fingerprint(),
        "places": f"{config.coordinates.representation}-{config.coordinates.n_bins}-{config.geometry.kind}",
    }
    with start_stage(f"register {model_dir.name}", "", {"model": name, "fingerprint": digest}, tags) as run:
        with tempfile.TemporaryDirectory() as folder:
            packaged = Path(folder) / "model"
            package(model_dir, packaged, "" if is_small else weights, digest)
            run.log_artifact(packaged, "model")
            for task, content in contents.items():
                copy = Path(folder) / f"{task}.json"
                write_json(copy, content)
                run.log_artifact(copy, "metrics")
        run.log_metrics({key: figure["value"] for key, figure in figures_of(contents).items()}, 0)
        with reaching(uri):
            if not exists(client, name):
                client.create_registered_model(name)
            source = f"runs:/{run.run_id}/model"
            made = client.create_model_version(name, source, run.run_id, every_tag)
            client.set_registered_model_alias(name, CHALLENGER, made.version)
        tag_run(run.run_id, {"model": f"{name} version {made.version}"})
    return Registered(name, str(made.version), run.run_id, source, every_tag["weights"], digest, True)


def figures_of(metrics: Mapping[str, Metrics]) -> dict[str, dict[str, Any]]:
    """Task -> metrics.json, as `task/figure` -> {"value", "n", "low", "high", "floor", ...}."""
    return {
        f"{task}/{name}": figure for task, content in metrics.items() for name, figure in content["figures"].items()
    }


def fingerprint_of(metrics: Mapping[str, Metrics]) -> str:
    """A hash of everything that was measured."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "metrics.json"
        write_json(path, metrics)
        return fingerprint(path)


def _retag(client: Any, version: Any, tags: Mapping[str, str]) -> None:
    """Give a version the tags of now: other code, say, has come to the same model. Its first lineage is kept beside."""
    changed = {key: value for key, value in tags.items() if version.tags.get(key) != value}
    if "lineage" in changed and "lineage" in version.tags:
        changed["lineage.before"] = version.tags["lineage"]
    for key, value in changed.items():
        client.set_model_version_tag(version.name, version.version, key, value)


def _identify(model_dir: Path) -> tuple[str, Any]:
    if not (model_dir / "locvlm.yaml").is_file():
        raise TrackingError(
            f"registering {model_dir}: there is no locvlm.yaml in it, so it is not a checkpoint of LocVLM; "
            "give the output folder of `locvlm train`"
        )
    try:
        return fingerprint(model_dir), load_config(model_dir / "locvlm.yaml")
    except ConfigError as fault:
        raise TrackingError(f"registering {model_dir}: {fault}") from None


def _refuse_other_model(model_dir: Path, digest: str, metrics: Mapping[str, Metrics]) -> None:
    for task, content in metrics.items():
        if not isinstance(content, dict) or not isinstance(content.get("figures"), dict):
            raise DataError(
                f"registering {model_dir}: the file given for {task} is not a metrics.json of `locvlm score`"
            )
        measured = (content.get("model") or {}).get("fingerprint")
        if measured not in (None, digest):
            raise DataError(
                f"registering {model_dir}: the {task} figures were measured with another model ({measured}, this "
                f"one is {digest}); predict and score with this model"
            )


def exists(client: Any, name: str) -> bool:
    """Whether the registry has the model `name`."""
    return bool(client.search_registered_models(filter_string=f"name = '{name}'", max_results=1))


def versions_of(client: Any, name: str) -> list[Any]:
    """All versions of a model, the newest first."""
    return list(client.search_model_versions(f"name = '{name}'", order_by=["version_number DESC"], max_results=1000))


def champion_of(client: Any, name: str) -> Any:
    """The version that holds the alias, or None."""
    number = client.get_registered_model(name).aliases.get(CHAMPION)
    return None if number is None else client.get_model_version(name, number)


def stored_metrics(client: Any, uri: str, version: Any) -> dict[str, Metrics]:
    """Task -> the metrics.json that were registered with a version. Raises TrackingError."""
    with tempfile.TemporaryDirectory() as folder:
        with reaching(uri):
            path = Path(client.download_artifacts(version.run_id, "metrics", folder))
        return {file.stem: read_json(file) for file in sorted(path.glob("*.json"))}


def shown(figure: Mapping[str, Any]) -> str:
    """A figure as people read it: value, interval, number of questions, floor."""
    between = "" if figure.get("low") is None else f" [{figure['low']:.3f}, {figure['high']:.3f}]"
    floor = "" if figure.get("floor") is None else f", floor {figure['floor']:.3f}"
    return f"{figure['value']:.3f}{between}, n {figure['n']}{floor}"
