"""`locvlm launch`: run another verb on the cluster as a RayJob and follow it to its end."""

import argparse
import os
from pathlib import Path
from typing import Any

from locvlm import __version__
from locvlm.errors import LaunchError
from locvlm.records import write_json
from locvlm.tracking import LINEAGE, RAY_JOB

FORWARDED = (  # the pipeline's run: without it every worker opens one of its own
    "MLFLOW_RUN_ID",
    "MLFLOW_EXPERIMENT_ID",
    "MLFLOW_WORKSPACE",
    LINEAGE,
)


def add_verbs(verbs: "argparse._SubParsersAction[Any]") -> None:
    """Register `launch`."""
    parser = verbs.add_parser(
        "launch",
        help="run a verb on the cluster as a RayJob and follow it",
        description="Create a KubeRay RayJob that runs `locvlm <verb> ...`, show its log, wait for its end. The same "
        "--name with the same command follows the job that is there already; one that failed is started again. "
        "Ctrl-C and SIGTERM delete the job.",
    )
    parser.add_argument("--name", required=True, help="the job's name: lower-case letters, digits, '-', at most 47")
    parser.add_argument("--namespace", help="namespace of the job (default: the template's, locvlm)")
    parser.add_argument("--image", default=f"locvlm:{__version__}", help="image of the Ray pods (default: %(default)s)")
    parser.add_argument("--queue", help="Kueue LocalQueue; '' leaves the queue out (default: the template's, locvlm)")
    parser.add_argument("--priority", metavar="NAME", help="Kueue WorkloadPriorityClass (default: the template's)")
    parser.add_argument("--workers", type=int, metavar="N", help="GPU worker pods (default: the template's)")
    parser.add_argument(
        "--gpus-per-worker",
        type=int,
        metavar="N",
        help="GPUs of each worker pod; its cpu and memory follow (default: the template's)",
    )
    parser.add_argument(
        "--entrypoint-gpus",
        type=int,
        metavar="N",
        help="GPUs of the verb's own process: 1 for predict or caption, 0 for train, whose Ray workers hold them",
    )
    parser.add_argument(
        "--deadline-minutes",
        type=int,
        metavar="N",
        help="delete the job when it has not ended by then, the wait in the queue included (default: the template's)",
    )
    parser.add_argument("--poll-seconds", type=float, default=10.0, metavar="S", help="pause between looks at the job")
    parser.add_argument("--template", type=Path, help="the RayJob to fill (default: k8s/ray-job.yaml)")
    parser.add_argument(
        "--site",
        type=Path,
        metavar="FILE",
        help="what this cluster's jobs need beside the template, merged into it (default: the ConfigMap locvlm-ray-job "
        "that the overlay made in the cluster; with --dry-run nothing)",
    )
    parser.add_argument("--receipt", type=Path, metavar="FILE", help="write how the job ended as JSON, if it succeeded")
    parser.add_argument("--dry-run", action="store_true", help="print the filled RayJob as YAML and stop")
    parser.add_argument("command", nargs="+", metavar="-- VERB ...", help="the locvlm verb to run, with its arguments")
    parser.set_defaults(run=_launch)


def _launch(args: argparse.Namespace) -> None:
    import yaml

    from locvlm.launch import (
        JobSettings,
        connect,
        default_template,
        launch,
        render_ray_job,
        site_part,
        validate_ray_job,
    )

    _check_command(args.command)
    for option in ("workers", "gpus_per_worker", "deadline_minutes", "poll_seconds"):
        value = getattr(args, option)
        if value is not None and value <= 0:
            raise LaunchError(f"launching {args.name}: --{option.replace('_', '-')} is {value}, it must be above 0")
    template = _read(args.template or default_template())
    site = _read(args.site) if args.site is not None else ""
    settings = JobSettings(
        namespace=args.namespace,
        queue=args.queue,
        priority=args.priority,
        workers=args.workers,
        gpus_per_worker=args.gpus_per_worker,
        entrypoint_gpus=args.entrypoint_gpus,
        deadline_minutes=args.deadline_minutes,
        environment={**{name: os.environ[name] for name in FORWARDED if os.environ.get(name)}, RAY_JOB: args.name},
        lineage=os.environ.get(LINEAGE, ""),
    )
    command = ["locvlm", *args.command]
    job = render_ray_job(template, args.name, args.image, command, settings, site)
    if args.dry_run:
        validate_ray_job(job)
        print(yaml.safe_dump(job, sort_keys=False), end="")
        return
    api = connect()
    if args.site is None:
        site = site_part(api, job["metadata"].get("namespace", "default"), args.poll_seconds)
        job = render_ray_job(template, args.name, args.image, command, settings, site)
    finished = launch(job, api, poll_seconds=args.poll_seconds)
    if args.receipt is not None:
        write_json(args.receipt, finished.to_dict())


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as fault:
        raise LaunchError(f"reading the job template {path}: {fault}") from None


def _check_command(command: list[str]) -> None:
    """Parse the inner command here: a mistake is told now, not after a wait for GPUs (argparse exits with 2)."""
    from locvlm.cli import build_parser

    if command[0] == "launch":
        raise LaunchError("launching a launch: give the verb that is to run on the cluster after --")
    build_parser().parse_args(command)
