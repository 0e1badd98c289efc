"""The gate that guards the alias `champion`.

It reads the figures that were registered with the two versions and nothing else. How two models are compared question
by question is handed in (`Compare`), so nothing here scores.
"""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from locvlm.config import GateConfig
from locvlm.errors import DataError, GateError
from locvlm.records import write_json
from locvlm.registry.champion import PROMOTED, Change, crown
from locvlm.registry.versions import Metrics, champion_of, figures_of, shown, stored_metrics
from locvlm.tracking import connect, initialise, reaching

# (first, second, figure) -> (difference, low, high) of first minus second; DataError when the questions differ
Compare = Callable[[Metrics, Metrics, str], tuple[float, float, float]]


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


def promote(name: str, version: str, compare: Compare) -> Decision:
    """Hold a version against its gates and, if all hold, move the alias `champion` to it.

    The gates are those of the version's own config (GateConfig). Floor: the low end of the interval of every
    `must_beat_floor` figure lies above what an answer without looking would score. Champion: the low end of the
    interval of `primary`'s paired difference to the champion lies at -`tolerance` or above, so a wide interval does not
    pass; where the two answered different questions, the low end of our own interval lies at the champion's value less
    `tolerance` or above; figures of different judges are not compared, so the gate does not hold. Without a champion
    the first version that beats its floors gets the alias. The decision is stored with the version's run either way.
    Raises TrackingError when the registry cannot be used or has no such version.
    """
    uri = initialise(connect().tracking_uri)
    client = connect(uri)
    with reaching(uri):
        found = client.get_model_version(name, version)
        champion = champion_of(client, name)
    metrics = stored_metrics(client, uri, found)
    gate = GateConfig.model_validate_json(found.tags.get("gate", "{}"))
    gates = [_beats_floor(figure, metrics) for figure in gate.must_beat_floor]
    comparison = "no champion"
    if champion is not None and str(champion.version) == str(found.version):
        comparison = "is champion already"
    elif champion is None:
        gates.append(_is_measured(gate.primary, metrics))
    else:
        held, comparison = _against(gate, metrics, stored_metrics(client, uri, champion), compare)
        gates.append(held)
    before = str(champion.version) if champion is not None else ""
    promoted = all(result.held for result in gates)
    decision = Decision(name, str(found.version), before, promoted, comparison, tuple(gates))
    with reaching(uri), tempfile.TemporaryDirectory() as folder:
        if promoted and before != str(found.version):
            crown(client, name, Change(str(found.version), before, PROMOTED, by="the gate", reason=comparison))
        client.set_model_version_tag(name, found.version, "gates", "held" if promoted else "did not hold")
        path = Path(folder) / "decision.json"
        write_json(path, decision.to_dict())
        client.log_artifact(found.run_id, str(path), "gate")
    return decision


def _figure(key: str, metrics: Mapping[str, Metrics]) -> dict[str, Any] | None:
    return figures_of(metrics).get(key)


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
        return GateResult("floor", key, False, f"no floor or no interval is known for it: {shown(figure)}", numbers)
    held = figure["low"] > figure["floor"]
    reason = f"{shown(figure)}: the low end is {'' if held else 'not '}above the floor"
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
    beside = f"{shown(ours)} against the champion's {shown(theirs)}"
    try:
        difference, low, high = compare(metrics[task], champion[task], name)
    except DataError as fault:
        how = f"not paired: {fault}"
        held, told = _unpaired(gate, ours, theirs, (metrics[task].get("judge"), champion[task].get("judge")))
    else:
        how = "paired, on the same questions"
        held = low >= -gate.tolerance
        numbers |= {"difference": difference, "difference_low": low, "difference_high": high}
        told = f"paired difference {difference:+.3f} [{low:+.3f}, {high:+.3f}], its low end is "
        told += f"{'not below' if held else 'below'} {0 - gate.tolerance:g}"
    return GateResult("champion", key, held, f"{beside}; {told}", numbers), how


def _unpaired(
    gate: GateConfig, ours: Mapping[str, Any], theirs: Mapping[str, Any], judges: tuple[Any, Any]
) -> tuple[bool, str]:
    """Whether ours holds against a champion that answered other questions, and why."""
    if judges[0] != judges[1]:
        return False, f"told right from wrong by different judges ({judges[0]}, {judges[1]}): score both with one"
    if ours.get("low") is None:
        return False, "the questions differ and no interval is known for it"
    least = theirs["value"] - gate.tolerance
    held = ours["low"] >= least
    return (
        held,
        f"the questions differ, and the low end of its interval is {'not below' if held else 'below'} {least:.3f}",
    )
