"""`locvlm begin` and `locvlm lineage`: the id that a pipeline run has everywhere, and what hangs on it."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from locvlm.errors import ConfigError, TrackingError

if TYPE_CHECKING:
    from locvlm.registry import Origin

# option -> what it is of; each is a way back from what was made of it to the versions
WAYS = {
    "lineage": ("ID", "a lineage id"),
    "data": ("MD5", "a data version (DVC's md5; its beginning is enough)"),
    "commit": ("SHA", "a Git commit (its beginning is enough)"),
    "code": ("VERSION", "a code version"),
    "config": ("HASH", "a configuration"),
    "image": ("NAME", "an image, with or without its digest"),
    "kfp-run": ("ID", "a run of KFP"),
    "job": ("NAME", "a RayJob"),
    "run": ("ID", "a run of MLflow"),
}


def add_verbs(verbs: "argparse._SubParsersAction[Any]") -> None:
    """Register begin and lineage."""
    begin = verbs.add_parser(
        "begin",
        help="give a run folder its lineage id, the first step of every pipeline",
        description="Writes lineage.json into the run's folder and opens the run that its stages are nested under in "
        "MLflow (or joins that of KFP's MLflow integration). A run that has an id goes on with it.",
    )
    begin.add_argument("--root", type=Path, required=True, metavar="DIR", help="the run's folder")
    begin.add_argument("--kfp-run", default="", metavar="ID", help="the run of KFP that begins or goes on")
    begin.add_argument("--tag", action="append", default=[], metavar="KEY=VALUE", help="what the run is made of")
    begin.set_defaults(run=_begin)

    lineage = verbs.add_parser(
        "lineage",
        help="what a model version was made of and by, or which versions were made of something",
        description="With a version: data, code, image, configuration, KFP run, RayJobs and MLflow runs. With one of "
        "the options instead: the versions that came of it.",
    )
    lineage.add_argument("version", nargs="?", default="", metavar="VERSION", help="its number, or an alias: champion")
    lineage.add_argument("--name", default="", help="the registered model (default: locvlm; with an option: all)")
    for option, (metavar, words) in WAYS.items():
        dest = f"of_{option}"  # `run` is taken by every verb's own function
        lineage.add_argument(
            f"--{option}", dest=dest, default="", metavar=metavar, help=f"the versions made of {words}"
        )
    lineage.add_argument("--json", action="store_true", help="as JSON")
    lineage.set_defaults(run=_lineage)


def parse_tags(doing: str, entries: list[str]) -> dict[str, str]:
    """KEY=VALUE entries. Raises ConfigError for any other form."""
    tags = {}
    for entry in entries:
        key, equals, value = entry.partition("=")
        if not equals or not key:
            raise ConfigError(f"{doing}: --tag {entry!r} is not of the form KEY=VALUE")
        tags[key] = value
    return tags


def _begin(args: argparse.Namespace) -> None:
    from locvlm.identity import begin

    known = begin(args.root, args.kfp_run, parse_tags(f"beginning {args.root}", args.tag))
    print(f"lineage {known.lineage}, begun {known.began}")
    if known.mlflow_run:
        print(f"MLflow run {known.mlflow_run}{'' if known.ours else ', opened by others'}")


def _lineage(args: argparse.Namespace) -> None:
    from locvlm.registry import find, trace

    given = {key: value for key in WAYS if (value := getattr(args, f"of_{key}"))}
    if len(given) + bool(args.version) != 1:
        options = ", ".join(f"--{key}" for key in WAYS)
        raise ConfigError(f"looking up a lineage: give a version (a number or an alias) or one of {options}")
    if args.version:
        origin = trace(args.name or "locvlm", args.version)
        print(json.dumps(origin.to_dict(), indent=2) if args.json else told(origin))
        return
    ((way, value),) = given.items()
    found = find(way.replace("-", "_"), value, args.name)
    if not found:
        raise TrackingError(
            f"looking up a lineage: no version of {args.name or 'any model'} was made of --{way} {value}; "
            "`locvlm lineage VERSION` shows what a version was made of"
        )
    if args.json:
        print(json.dumps([{"name": name, "version": version} for name, version in found], indent=2))
        return
    for name, version in found:
        print(f"{name} version {version}")


def told(origin: "Origin") -> str:
    """The origin of a version as lines for a person."""
    aliases = f" ({', '.join(origin.aliases)})" if origin.aliases else ""
    made = {key.removeprefix("train."): value for key, value in origin.made_by.items() if key.startswith("train.")}
    rows = [
        ("lineage", origin.lineage),
        ("data", origin.data),
        ("Git commit", origin.commit),
        ("code", origin.code),
        ("image", origin.image),
        ("config", origin.config),
        ("weights", origin.weights),
        ("trained", ", ".join(f"{key} {value}" for key, value in made.items())),
        *(("KFP run", run) for run in origin.kfp_runs),
        *(("RayJob", job) for job in origin.ray_jobs),
        *(("MLflow run", _run(run)) for run in origin.runs),
        ("gates", origin.made_by.get("gates", "not asked yet")),
        ("rolled back", origin.made_by.get("rolled_back", "")),
    ]
    lines = [f"{origin.name} version {origin.version}{aliases}"]
    optional = ("KFP run", "RayJob", "rolled back")
    lines += [f"  {key:12}{value or 'unknown'}" for key, value in rows if value or key not in optional]
    return "\n".join(lines)


def _run(run: Any) -> str:
    where = f", in {run.ray_job}" if run.ray_job else ""
    return f"{run.id}  {run.name}, {run.status.lower()}{where}{', the whole pipeline' if run.is_parent else ''}"
