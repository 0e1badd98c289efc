"""`locvlm fetch`, `register`, `promote`, `rollback`: which data a run uses, which model it leaves, who is champion."""

import argparse
import getpass
import os
import socket
import subprocess
from pathlib import Path
from typing import Any

from locvlm.cli.lineage import parse_tags
from locvlm.errors import ConfigError, DataError
from locvlm.records import read_json, write_json
from locvlm.tracking import origin_tags


def add_verbs(verbs: "argparse._SubParsersAction[Any]") -> None:
    """Register fetch, register, promote and rollback."""
    _add_fetch(verbs)
    _add_register(verbs)
    _add_promote(verbs)
    _add_rollback(verbs)


def _add_fetch(verbs: "argparse._SubParsersAction[Any]") -> None:
    parser = verbs.add_parser(
        "fetch",
        help="make sure that data is there, whole, and the version you name",
        description="One of three: --dvc (what a .dvc file pins is brought up to date), --remote with --md5 and --into "
        "(that version is pulled, without Git), or --annotations with --images (the files are checked as they are).",
    )
    parser.add_argument("--dvc", type=Path, metavar="FILE", help="a .dvc file")
    parser.add_argument("--remote", metavar="URL", help="a DVC remote: a folder or s3://bucket/prefix")
    parser.add_argument("--into", type=Path, metavar="DIR", help="with --remote: where the data is to lie")
    parser.add_argument(
        "--annotations", action="append", type=Path, metavar="FILE", help="COCO instances JSON; may be repeated"
    )
    parser.add_argument("--images", type=Path, metavar="DIR", help="with --annotations: the folder of the images")
    parser.add_argument("--md5", metavar="HASH", help="the version that is wanted; anything else is an error")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FILE", help="the receipt: JSON with path and md5"
    )
    parser.set_defaults(run=_fetch)


def _fetch(args: argparse.Namespace) -> None:
    from locvlm.data.fetch import fetch_coco, fetch_dvc, fetch_remote

    if [args.dvc, args.remote, args.annotations].count(None) != 2:
        raise ConfigError("fetching data: give one of --dvc, --remote and --annotations")
    if args.dvc is not None:
        receipt = fetch_dvc(args.dvc)
    elif args.remote is not None:
        if args.md5 is None or args.into is None:
            raise ConfigError("fetching data with --remote: --md5 (which version) and --into (where to) are needed")
        receipt = fetch_remote(args.md5, args.remote, args.into)
    else:
        if args.images is None:
            raise ConfigError("fetching data with --annotations: --images, the folder of the images, is needed")
        receipt = fetch_coco(args.annotations, args.images)
    if args.md5 not in (None, receipt["md5"]):
        raise DataError(
            f"fetching data: {receipt['path']} is version {receipt['md5']}, wanted was {args.md5}; bring the wanted "
            "version there, or name the one that is there"
        )
    write_json(args.output, receipt)
    print(f"data: {receipt['path']}, md5 {receipt['md5']}")


def _add_register(verbs: "argparse._SubParsersAction[Any]") -> None:
    parser = verbs.add_parser("register", help="make a version of a model in the registry, with its figures")
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="output folder of `locvlm train`")
    parser.add_argument(
        "--metrics", type=Path, nargs="+", action="extend", required=True, metavar="FILE", help="of `locvlm score`"
    )
    parser.add_argument("--name", default="locvlm", help="the registered model (%(default)s)")
    parser.add_argument(
        "--tag",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="lineage to keep with the version, e.g. data=...",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the receipt: JSON with the version")
    parser.set_defaults(run=_register)


def _register(args: argparse.Namespace) -> None:
    from locvlm.evaluation.score import read_metrics
    from locvlm.registry import register

    metrics: dict[str, Path] = {}
    for path in args.metrics:
        task = str(read_metrics(path)["task"])
        if task in metrics:
            raise ConfigError(f"registering {args.model}: {metrics[task]} and {path} are both of the task {task}")
        metrics[task] = path
    registered = register(args.model, metrics, args.name, _lineage(args.model, args.tag))
    write_json(args.output, registered.to_dict())
    told = "" if registered.is_new else " (it was there already)"
    print(f"{registered.name} version {registered.version}, alias challenger{told}")


def _lineage(model_dir: Path, given: list[str]) -> dict[str, str]:
    """The tags given, the Git commit, and what the model's receipt says of its making."""
    tags = {}
    commit = _git_commit()
    if commit:
        tags["git"] = commit
    receipt = model_dir / "receipt.json"
    if receipt.is_file():
        content = read_json(receipt)
        for key in ("stage", "parent", "steps", "tokens", "job"):
            if key in content:
                tags[f"train.{key}"] = str(content[key])
        for name, digest in dict(content.get("data", {})).items():
            tags[f"train.data.{name}"] = str(digest)
    return {**tags, **origin_tags(), **parse_tags(f"registering {model_dir}", given)}


def _git_commit() -> str:
    """The commit of the code that runs, with `-dirty` where files differ from it; in an image, what it was built of."""
    if built_of := os.environ.get("LOCVLM_GIT_COMMIT", ""):
        return built_of
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _add_promote(verbs: "argparse._SubParsersAction[Any]") -> None:
    parser = verbs.add_parser(
        "promote",
        help="move the alias `champion` to a version if its gates hold",
        description="The gates are those of the version's own config, section gate. With a champion the low end of the "
        "interval of the paired difference must lie at -gate.tolerance (0) or above. Exit code 2 when a gate fails.",
    )
    parser.add_argument("--name", default="locvlm", help="the registered model (%(default)s)")
    parser.add_argument("--version", required=True, help="the version to promote")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the decision as JSON")
    parser.add_argument("--report-only", action="store_true", help="exit 0 when a gate does not hold as well")
    parser.set_defaults(run=_promote)


def _promote(args: argparse.Namespace) -> None:
    from locvlm.errors import GateError
    from locvlm.evaluation.metrics import paired_difference
    from locvlm.registry import promote

    decision = promote(args.name, args.version, paired_difference)
    write_json(args.output, decision.to_dict())
    try:
        decision.check()
    except GateError as refusal:
        if not args.report_only:
            raise
        print(refusal)
        return
    for gate in decision.gates:
        print(f"{gate.gate} gate, {gate.figure}: {gate.reason}")
    print(f"{decision.name} version {decision.version} is champion")


def _add_rollback(verbs: "argparse._SubParsersAction[Any]") -> None:
    parser = verbs.add_parser(
        "rollback",
        help="make the champion before this one champion again",
        description="Moves the alias `champion` back and writes down who did it and why; again: one champion further "
        "back. Whatever loads models:/NAME@champion gets the other version from then on.",
    )
    parser.add_argument("--name", default="locvlm", help="the registered model (%(default)s)")
    parser.add_argument("--to", default="", metavar="VERSION", help="this version (default: the champion before)")
    parser.add_argument("--reason", required=True, metavar="TEXT", help="why, for whoever looks later")
    parser.add_argument("--by", default="", metavar="WHO", help="default: the account and machine that runs this")
    parser.set_defaults(run=_rollback)


def _rollback(args: argparse.Namespace) -> None:
    from locvlm.registry import rollback

    change = rollback(args.name, args.reason, args.by or _account(), args.to)
    print(f"{args.name} version {change.version} is champion again, in place of version {change.before}")
    print(f"written down: {change.at}, {change.by}: {change.reason}")


def _account() -> str:
    try:
        return f"{getpass.getuser()}@{socket.gethostname()}"
    except (KeyError, OSError):  # a user id without an entry, as in a container
        return socket.gethostname()
