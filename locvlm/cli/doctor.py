"""`locvlm doctor`: is everything there that a run needs, before it costs money?"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from locvlm.cli.configuration import add_config_options, read_config
from locvlm.errors import UserError

if TYPE_CHECKING:
    from locvlm.doctor import Check

IN_CLUSTER = "mlflow.locvlm.svc:5000"  # as k8s/ray-job.yaml has it
MARKS = {"ok": "ok", "warning": "WARNING", "failed": "FAILED", "not applicable": "-"}


def add_verbs(verbs: "argparse._SubParsersAction[Any]") -> None:
    """Register doctor."""
    parser = verbs.add_parser(
        "doctor",
        help="check a machine or a cluster before anything costs money",
        description="This machine always; a storage, a data version, KFP, the cluster and workers if you name them. "
        "MLflow is the one of MLFLOW_TRACKING_URI. Exit code 2 when a check failed. Nothing is changed, but for one "
        "small object that is written to each storage and deleted.",
    )
    add_config_options(parser)
    parser.add_argument("--folder", type=Path, default=Path(), metavar="DIR", help="where runs will write (here)")
    parser.add_argument("--gpu-type", default="", metavar="NAME", help="what the GPUs must be, such as A100")
    parser.add_argument(
        "--storage", action="append", default=[], metavar="PLACE", help="a folder or s3://bucket/prefix; repeatable"
    )
    parser.add_argument("--dvc", metavar="FILE", help="a .dvc file: has its remote the version that it pins?")
    parser.add_argument("--dvc-remote", default="", metavar="URL", help="other than the default one of its workspace")
    parser.add_argument(
        "--mlflow-host",
        default="",
        metavar="HOST:PORT",
        help=f"the name by which jobs reach MLflow, to be let through (with --cluster: {IN_CLUSTER})",
    )
    kfp = os.environ.get("KF_PIPELINES_ENDPOINT", "")
    parser.add_argument("--kfp", default=kfp, metavar="URL", help="KFP's address (KF_PIPELINES_ENDPOINT)")
    parser.add_argument("--cluster", action="store_true", help="look at the cluster of the kubeconfig's context too")
    parser.add_argument("--namespace", help="of the jobs (default: the template's, locvlm)")
    parser.add_argument("--queue", help="their LocalQueue (default: the template's, locvlm)")
    parser.add_argument("--job-workers", type=int, metavar="N", help="worker pods of a job (default: the template's)")
    parser.add_argument("--gpus-per-worker", type=int, metavar="N", help="of each such pod (default: the template's)")
    parser.add_argument(
        "--workers", type=int, default=0, metavar="N", help="sum a number over N Ray workers (NCCL on GPUs, else gloo)"
    )
    parser.add_argument("--json", action="store_true", help="the checks as JSON")
    parser.set_defaults(run=_doctor)


def _doctor(args: argparse.Namespace) -> None:
    checks = []
    for check in _checks(args):
        checks.append(check)
        if not args.json:
            _tell(check)
    failed = [check.name for check in checks if check.state == "failed"]
    if args.json:
        print(json.dumps({"ok": not failed, "checks": [check.to_dict() for check in checks]}, indent=2))
    if failed:
        raise UserError(f"{len(failed)} of {len(checks)} checks failed: {', '.join(failed)}; mend these first")
    warnings = sum(check.state == "warning" for check in checks)
    print(f"nothing is in the way of a run ({warnings} warnings)", file=sys.stderr)


def _checks(args: argparse.Namespace) -> "Iterator[Check]":
    from locvlm import doctor

    config = read_config(args)
    yield from doctor.check_machine(config, args.folder, args.gpu_type, trains_here=not args.cluster)
    for place in args.storage:
        yield doctor.check_storage(place)
    if args.dvc:
        yield doctor.check_data(args.dvc, args.dvc_remote)
    host = args.mlflow_host or (IN_CLUSTER if args.cluster else "")
    yield from doctor.check_mlflow(os.environ.get("MLFLOW_TRACKING_URI", ""), host)
    yield doctor.check_kfp(args.kfp)
    if args.cluster:
        from locvlm.launch import JobSettings, default_template

        settings = JobSettings(
            namespace=args.namespace,
            queue=args.queue,
            workers=args.job_workers,
            gpus_per_worker=args.gpus_per_worker,
        )
        template = default_template().read_text(encoding="utf-8")
        yield from doctor.check_cluster(config, template, settings, args.gpu_type)
    yield doctor.check_workers(args.workers)


def _tell(check: "Check") -> None:
    print(f"{MARKS[check.state]:8}{check.name}: {check.found}", flush=True)
    if check.mend:
        print(f"{'':8}-> {check.mend}", flush=True)
