"""`locvlm due` and `locvlm release`: whether a model has to be trained again, and by which of several runs."""

import argparse
import hashlib
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from locvlm.cli.configuration import add_config_options, read_config
from locvlm.records import write_json

if TYPE_CHECKING:
    from locvlm.registry import Standing


def add_verbs(verbs: "argparse._SubParsersAction[Any]") -> None:
    """Register due and release."""
    due = verbs.add_parser(
        "due",
        help="say whether the champion was made from the newest data, this code and this configuration",
        description="Find the newest data version and compare it, the code and the configuration with what the "
        "versions in the registry were made from. Where something changed, claim the run that would train on it: of "
        "several that ask at once, one gets it.",
    )
    due.add_argument("--dvc", required=True, metavar="FILE", help="the .dvc file that pins the newest data")
    due.add_argument(
        "--repository", default="", metavar="URL", help="Git repository that --dvc lies in (default: none)"
    )
    due.add_argument("--revision", default="", metavar="REV", help="of --repository (default: its default branch)")
    due.add_argument("--code", required=True, metavar="VERSION", help="the version of the code that would train")
    due.add_argument("--name", default="locvlm", help="the registered model (%(default)s)")
    _add_claim_options(due)
    due.add_argument(
        "--claim-hours",
        type=float,
        default=6.0,
        metavar="N",
        help="hours after which a claim is void that no step renews (%(default)s)",
    )
    due.add_argument("--output", type=Path, required=True, metavar="FILE", help="the answer as JSON")
    add_config_options(due)
    due.set_defaults(run=_due)

    release = verbs.add_parser("release", help="give back what a run of `locvlm due` has claimed")
    _add_claim_options(release)
    release.set_defaults(run=_release)


def _add_claim_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--runs", type=Path, required=True, metavar="DIR", help="the folder that run folders lie in")
    parser.add_argument("--owner", required=True, metavar="ID", help="the id of the pipeline run that asks")


def _due(args: argparse.Namespace) -> None:
    from locvlm.claims import SUFFIX, take
    from locvlm.data.fetch import newest_version
    from locvlm.registry import standing

    config = read_config(args)
    inputs = {
        "data": newest_version(args.dvc, args.repository, args.revision),
        "code": args.code,
        "config": config.fingerprint(),
    }
    found = standing(args.name, inputs)
    is_due, why = _judge(args.name, inputs, found)
    # equal inputs, equal folder: a run that was broken off goes on there, and no other writes into it
    run = f"{config.name}-{hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:10]}"
    if is_due:
        claim = take(args.runs, run, args.owner, args.claim_hours)
        if claim.owner != args.owner:
            since = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(claim.since))
            place = args.runs / f"{run}{SUFFIX}"
            is_due = False
            why = (
                f"nothing to do: the run {claim.owner} has been at it since {since} ({why}); if it is dead, remove "
                f"{place} or wait {args.claim_hours:g} hours from then"
            )
    write_json(
        args.output,
        {"due": is_due, "why": why, "run": run, "champion": found.champion, "inputs": inputs, "owner": args.owner},
    )
    print(why)


def _judge(name: str, inputs: dict[str, str], found: "Standing") -> tuple[bool, str]:
    """Whether to train, and why or why not."""
    told = ", ".join(f"{key} {value}" for key, value in inputs.items())
    if found.champion and not found.changed:
        return False, f"nothing to do: {name} version {found.champion}, the champion, was made from {told}"
    if found.judged:
        gates = "its gates held, and another version was made champion since"
        if not found.held:
            gates = "its gates did not hold"
        stays = f"version {found.champion} stays champion" if found.champion else "there is still no champion"
        return False, f"nothing to do: {name} version {found.judged} was made from {told}; {gates}; {stays}"
    if not found.champion:
        return True, f"training {name}: there is no champion yet; {told}"
    changes = "; ".join(f"{key} {old or 'unknown'} -> {new}" for key, (old, new) in found.changed.items())
    return True, f"training {name}: changed since version {found.champion}, the champion: {changes}"


def _release(args: argparse.Namespace) -> None:
    from locvlm.claims import give_back

    given = give_back(args.runs, args.owner)
    print(f"given back: {', '.join(given) or 'nothing was claimed'}")
