"""`locvlm report`: one page about any number of models."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from locvlm.cli.story import tell
from locvlm.errors import ConfigError

if TYPE_CHECKING:
    from locvlm.evaluation.arms import Arm


def add_verbs(verbs: "argparse._SubParsersAction[Any]") -> None:
    """Register report."""
    parser = verbs.add_parser(
        "report",
        help="one HTML page: models side by side, the paper's tables, pictures, curves",
        description="Write report.html (one file, no outside reference) and report.md. The folder of an arm holds any "
        "number of X.metrics.json and, for pictures, X.jsonl beside each. The first arm is compared with the others. "
        "With MLFLOW_TRACKING_URI set, both files are stored with the run MLFLOW_RUN_ID, or with a run of their own.",
    )
    parser.add_argument("--arm", action="append", default=[], metavar="NAME=DIR", help="repeat for each model")
    parser.add_argument(
        "--metrics",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="one metrics.json more for the arm NAME, or for a new one; may be repeated",
    )
    parser.add_argument(
        "--curve", action="append", default=[], metavar="'NAME STAGE'=FILE", help="a curve.jsonl; may be repeated"
    )
    parser.add_argument(
        "--images",
        action="append",
        default=[],
        type=Path,
        metavar="DIR",
        help="folder of images or videos; may be repeated; without it no pictures",
    )
    parser.add_argument("--blur-faces", action="store_true", help="blur the faces in the pictures")
    parser.add_argument(
        "--compare",
        action="append",
        default=[],
        metavar="NAME=NAME",
        help="two arms to compare question by question (default: the first with each of the others)",
    )
    parser.add_argument(
        "--seeds",
        action="append",
        default=[],
        metavar="NAME=ARM,ARM,...",
        help="arms that are one model trained with several seeds: mean and spread",
    )
    parser.add_argument(
        "--label",
        action="append",
        default=[],
        metavar="'NAME KEY'=VALUE",
        help="what an ablation run is, where its config does not say: pseudo_data=yes, revloc=no, location=point, ...; "
        "tables=2,11-objectives,11-data,12: the ablations that it is a row of",
    )
    parser.add_argument(
        "--keywords",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="counts of `locvlm data keywords` for Table 14; may be repeated",
    )
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder of the report")
    parser.add_argument("--title", default="LocVLM: what location objectives buy")
    parser.set_defaults(run=_report)


def _report(args: argparse.Namespace) -> None:
    from locvlm.evaluation.figures import read_curve
    from locvlm.evaluation.paper_tables import read_keywords_file
    from locvlm.evaluation.report import Contents, write_report

    arms = _arms(args)
    names = [arm.name for arm in arms]
    for folder in args.images:
        if not folder.is_dir():
            raise ConfigError(f"reporting: the image folder {folder} does not exist; correct or drop --images")
    if args.blur_faces and not args.images:
        raise ConfigError("reporting: --blur-faces is about pictures; give their folder with --images")
    contents = Contents(
        title=args.title,
        curves=[read_curve(name, path, names) for name, path in _named_paths("--curve", args.curve).items()],
        images=args.images,
        keywords=[read_keywords_file(name, path) for name, path in _named_paths("--keywords", args.keywords).items()],
        pairs=[_split("--compare", pair, "NAME=NAME") for pair in args.compare],
        seeds={
            name: [member.strip() for member in members.split(",")]
            for name, members in (_split("--seeds", group, "NAME=ARM,ARM,...") for group in args.seeds)
        },
        blur_faces=args.blur_faces,
    )
    html, markdown = write_report(arms, args.output, contents)
    track(html, markdown)
    tell(arms)
    print(html)
    print(markdown)


def _arms(args: argparse.Namespace) -> "list[Arm]":
    from locvlm.evaluation.arms import read_arm, with_files, with_labels

    arms: dict[str, Arm] = {name: read_arm(name, folder) for name, folder in _named_paths("--arm", args.arm).items()}
    files: dict[str, list[Path]] = {}
    for value in args.metrics:
        name, path = _split("--metrics", value, "NAME=PATH")
        files.setdefault(name, []).append(Path(path))
    for name, paths in files.items():
        arms[name] = with_files(name, arms.get(name), paths)
    if not arms:
        raise ConfigError("reporting: there is nothing to report on; name a model with --arm or --metrics")
    labels: dict[str, dict[str, str]] = {}
    for value in args.label:
        key, told = _split("--label", value, "'NAME KEY'=VALUE")
        name, _, label = key.rpartition(" ")
        if name not in arms:
            raise ConfigError(
                f"reporting: --label {value!r} is about no arm; it has the form 'NAME KEY'=VALUE with NAME one of "
                f"{', '.join(arms)}"
            )
        labels.setdefault(name, {})[label] = told
    return [with_labels(arm, labels[name]) if name in labels else arm for name, arm in arms.items()]


def track(*paths: Path) -> None:
    """Store the report in MLflow, where the environment names a store."""
    import os

    from locvlm import tracking

    if not tracking.enabled():
        return
    run_id = os.environ.get("MLFLOW_RUN_ID", "")
    if run_id:
        run = tracking.resume_run(run_id)
        for path in paths:
            run.log_artifact(path, "report")
        return
    with tracking.start_stage("report", "", {}, {}) as run:
        for path in paths:
            run.log_artifact(path, "report")


def _split(option: str, value: str, form: str) -> tuple[str, str]:
    name, equals, rest = value.partition("=")
    if not equals or not name.strip() or not rest.strip():
        raise ConfigError(f"reporting: {option} {value!r} is not of the form {form}")
    return name.strip(), rest.strip()


def _named_paths(option: str, values: Sequence[str]) -> dict[str, Path]:
    named: dict[str, Path] = {}
    for value in values:
        name, path = _split(option, value, "NAME=PATH")
        if name in named:
            raise ConfigError(f"reporting: {option} names {name!r} twice; give each its own name")
        named[name] = Path(path)
    return named
