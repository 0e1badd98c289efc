"""The model registry: versions with their lineage and their figures, and the gate that guards the alias `champion`.

A version's figures are the metrics.json files that `locvlm score` wrote, stored with the version's run; the gate reads
nothing else. How two models are compared question by question is handed in (`Compare`), so nothing here scores.
"""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from locvlm.config import GateConfig, load_config
from locvlm.errors import ConfigError, DataError, GateError, TrackingError
from locvlm.records import fingerprint, read_json, write_json
from locvlm.tracking import connect, initialise, reaching, start_stage

CHAMPION = "champion"
CHALLENGER = "challenger"
LARGEST_UPLOAD = 200_000_000  # bytes; the weights of a larger model stay where they are and the version points there

Metrics = Mapping[str, Any]  # the contents of one metrics.json
# (first, second, figure) -> (difference, low, high) of first minus second; DataError when the questions differ
Compare = Callable[[Metrics, Metrics, str], tuple[float, float, float]]


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


@dataclass(frozen=True, slots=True)
class GateResult:
    """One gate: what it asked (`gate`: floor or champion), of which figure, and what the numbers were."""

    gate: str
    figure: str
    held: bool
    reason: str
    numbers: dict[str, float | None]


@dataclass(frozen=True, slots=True)
class Decision:
    """What the gate decided on one version. `champion`: the version that held the alias before ("" for none)."""

    name: str
    version: str
    champion: str
    promoted: bool
    comparison: str
    gates: tuple[GateResult, ...]

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return asdict(self)

    def check(self) -> None:
        """Raise GateError that names the gates that did not hold and their numbers."""
        failed = [gate for gate in self.gates if not gate.held]
        if failed:
            reasons = "\n".join(f"  - {gate.gate} gate, {gate.figure}: {gate.reason}" for gate in failed)
            stays = f"version {self.champion} stays champion" if self.champion else "there is still no champion"
            raise GateError(
                f"promoting {self.name} version {self.version}: {len(failed)} of {len(self.gates)} gates did not hold, "
                f"{stays}\n{reasons}"
            )


def register(model_dir: Path, metrics: Mapping[str, Path], name: str, tags: Mapping[str, str]) -> Registered:
    """Make a version of the model `name` from a checkpoint folder and give it the alias `challenger`.

    `metrics`: task -> its metrics.json, measured with this model. `tags`: the lineage to keep with the version. The
    same model with the same metrics gives the version that is there already, so a retried step registers once. Weights
    up to LARGEST_UPLOAD bytes are stored with the run; larger ones stay in `model_dir`, and the version points there.
    Raises TrackingError when the registry cannot be used, DataError for metrics of another model.
    """
    digest, config = _identify(model_dir)
    contents = {task: read_json(path) for task, path in metrics.items()}
    _refuse_other_model(model_dir, digest, contents)
    measured = fingerprint_of(contents)
    uri = initialise(connect().tracking_uri)
    client = connect(uri)
    with reaching(uri):
        for version in _versions(client, name):
            if version.tags.get("fingerprint") == digest and version.tags.get("metrics") == measured:
                client.set_registered_model_alias(name, CHALLENGER, version.version)
                weights = version.tags.get("weights", "")
                return Registered(name, str(version.version), version.run_id, version.source, weights, digest, False)
    weights = model_dir.absolute().as_uri()
    is_small = sum(path.stat().st_size for path in _files(model_dir)) <= LARGEST_UPLOAD
    every_tag = {
        **{f"figure/{key}": _shown(figure) for key, figure in figures_of(contents).items()},
        **tags,
        "fingerprint": digest,
        "metrics": measured,
        "weights": "with the version" if is_small else weights,
        "gate": config.gate.model_dump_json(),
        "config": config.fingerprint(),
        "places": f"{config.coordinates.representation}-{config.coordinates.n_bins}-{config.geometry.kind}",
    }
    with start_stage("register", "", {"model": name, "fingerprint": digest}, tags) as run:
        for path in _files(model_dir):
            if is_small or path.suffix in (".json", ".yaml", ".jsonl"):
                run.log_artifact(path, "model")
        with tempfile.TemporaryDirectory() as folder:
            for task, content in contents.items():
                copy = Path(folder) / f"{task}.json"
                write_json(copy, content)
                run.log_artifact(copy, "metrics")
        run.log_metrics({key: figure["value"] for key, figure in figures_of(contents).items()}, 0)
        with reaching(uri):
            if not _exists(client, name):
                client.create_registered_model(name)
            source = f"runs:/{run.run_id}/model"
            made = client.create_model_version(name, source, run.run_id, every_tag)
            client.set_registered_model_alias(name, CHALLENGER, made.version)
    return Registered(name, str(made.version), run.run_id, source, every_tag["weights"], digest, True)


def promote(name: str, version: str, compare: Compare) -> Decision:
    """Hold a version against its gates and, if all hold, move the alias `champion` to it.

    The gates are those of the version's own config (GateConfig). Floor: the low end of the interval of every
    `must_beat_floor` figure lies above what an answer without looking would score. Champion: `primary` is not worse
    than the champion's by more than `tolerance`; where both answered the same questions, the interval of the paired
    difference must reach -tolerance, else the two intervals must overlap within it. Without a champion the first
    version that beats its floors gets the alias. The decision is stored with the version's run either way.
    Raises TrackingError when the registry cannot be used or has no such version.
    """
    uri = initialise(connect().tracking_uri)
    client = connect(uri)
    with reaching(uri):
        found = client.get_model_version(name, version)
        champion = _champion(client, name)
    metrics = _stored_metrics(client, uri, found)
    gate = GateConfig.model_validate_json(found.tags.get("gate", "{}"))
    gates = [_beats_floor(figure, metrics) for figure in gate.must_beat_floor]
    comparison = "no champion"
    if champion is not None and str(champion.version) == str(found.version):
        comparison = "is champion already"
    elif champion is None:
        gates.append(_is_measured(gate.primary, metrics))
    else:
        held, comparison = _against(gate, metrics, _stored_metrics(client, uri, champion), compare)
        gates.append(held)
    before = str(champion.version) if champion is not None else ""
    promoted = all(result.held for result in gates)
    decision = Decision(name, str(found.version), before, promoted, comparison, tuple(gates))
    with reaching(uri), tempfile.TemporaryDirectory() as folder:
        if promoted:
            client.set_registered_model_alias(name, CHAMPION, found.version)
        client.set_model_version_tag(name, found.version, "gates", "held" if promoted else "did not hold")
        path = Path(folder) / "decision.json"
        write_json(path, decision.to_dict())
        client.log_artifact(found.run_id, str(path), "gate")
    return decision


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


def _files(model_dir: Path) -> list[Path]:
    return sorted(path for path in model_dir.iterdir() if path.is_file())


def _exists(client: Any, name: str) -> bool:
    return bool(client.search_registered_models(filter_string=f"name = '{name}'", max_results=1))


def _versions(client: Any, name: str) -> list[Any]:
    return list(client.search_model_versions(f"name = '{name}'", order_by=["version_number DESC"], max_results=1000))


def _champion(client: Any, name: str) -> Any:
    """The version that holds the alias, or None."""
    number = client.get_registered_model(name).aliases.get(CHAMPION)
    return None if number is None else client.get_model_version(name, number)


def _stored_metrics(client: Any, uri: str, version: Any) -> dict[str, Metrics]:
    with tempfile.TemporaryDirectory() as folder:
        with reaching(uri):
            path = Path(client.download_artifacts(version.run_id, "metrics", folder))
        return {file.stem: read_json(file) for file in sorted(path.glob("*.json"))}


def _figure(key: str, metrics: Mapping[str, Metrics]) -> dict[str, Any] | None:
    return figures_of(metrics).get(key)


def _shown(figure: Mapping[str, Any]) -> str:
    between = "" if figure.get("low") is None else f" [{figure['low']:.3f}, {figure['high']:.3f}]"
    floor = "" if figure.get("floor") is None else f", floor {figure['floor']:.3f}"
    return f"{figure['value']:.3f}{between}, n {figure['n']}{floor}"


def _numbers(figure: Mapping[str, Any], prefix: str = "") -> dict[str, float | None]:
    return {f"{prefix}{key}": figure.get(key) for key in ("value", "low", "high", "floor", "n")}


def _not_measured(gate: str, key: str, metrics: Mapping[str, Metrics], whose: str = "") -> GateResult:
    known = ", ".join(sorted(figures_of(metrics))) or "none"
    return GateResult(gate, key, False, f"{whose}this figure was not measured; there are: {known}", {})


def _beats_floor(key: str, metrics: Mapping[str, Metrics]) -> GateResult:
    figure = _figure(key, metrics)
    if figure is None:
        return _not_measured("floor", key, metrics)
    numbers = _numbers(figure)
    if figure.get("floor") is None or figure.get("low") is None:
        return GateResult("floor", key, False, f"no floor or no interval is known for it: {_shown(figure)}", numbers)
    held = figure["low"] > figure["floor"]
    reason = f"{_shown(figure)}: the low end is {'' if held else 'not '}above the floor"
    return GateResult("floor", key, held, reason, numbers)


def _is_measured(key: str, metrics: Mapping[str, Metrics]) -> GateResult:
    figure = _figure(key, metrics)
    if figure is None:
        return _not_measured("champion", key, metrics)
    return GateResult("champion", key, True, "there is no champion to compare with", _numbers(figure))


def _against(
    gate: GateConfig, metrics: Mapping[str, Metrics], champion: Mapping[str, Metrics], compare: Compare
) -> tuple[GateResult, str]:
    key = gate.primary
    ours, theirs = _figure(key, metrics), _figure(key, champion)
    if ours is None or theirs is None:
        whose = "of the champion " if theirs is None and ours is not None else ""
        return _not_measured("champion", key, champion if whose else metrics, whose), "none"
    numbers = _numbers(ours) | _numbers(theirs, "champion_")
    task, _, name = key.rpartition("/")
    try:
        difference, low, high = compare(metrics[task], champion[task], name)
    except DataError as fault:
        how = f"intervals, because the two cannot be paired: {fault}"
        if ours.get("high") is None or theirs.get("low") is None:
            return GateResult("champion", key, False, "no interval is known for it", numbers), how
        held = ours["high"] >= theirs["low"] - gate.tolerance
        reason = (
            f"{_shown(ours)} against the champion's {_shown(theirs)}; the intervals {'' if held else 'do not '}overlap"
        )
    else:
        how = "paired, on the same questions"
        held = high >= -gate.tolerance
        numbers |= {"difference": difference, "difference_low": low, "difference_high": high}
        told = f"difference {difference:+.3f} [{low:+.3f}, {high:+.3f}]"
        reason = f"{_shown(ours)} against the champion's {_shown(theirs)}; {told}"
    return GateResult("champion", key, held, f"{reason}, tolerance {gate.tolerance:g}", numbers), how
