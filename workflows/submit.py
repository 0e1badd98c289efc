"""`python -m workflows.submit`: send a compiled pipeline to a KFP endpoint, once or on a schedule.

The same in plain KFP, without any of our code (values are parsed as JSON, so a list is written as one):

    kfp --endpoint URL run create -e locvlm -r RUN -f workflows/image_pipeline.yaml \
        root=/mnt/locvlm/runs/RUN data_root=/mnt/locvlm/data/coco images=/mnt/locvlm/data/coco/images \
        preset=locvlm-b data_md5=HASH code_version=VERSION 'overrides=["coordinates.n_bins=112"]'

That command has no option for the account of the steps: KFP's default one must then be bound to the role
locvlm-launcher too.

With --schedule it is the retraining pipeline that goes there: at each time of the cron expression it looks whether
data, code or configuration changed since the champion, and trains if so. One run at a time; times that were missed
while the cluster was away are not made up for. A schedule of the same preset and model that is there already is
replaced: that is how new code comes into it.
"""

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from locvlm.config import ExperimentConfig
from locvlm.errors import LaunchError, LocVLMError
from locvlm.presets import preset
from workflows.compile import PIPELINES, package
from workflows.provenance import code_version, run_name
from workflows.steps import SHARED_PATH

EXPERIMENT = "locvlm"
SERVICE_ACCOUNT = "locvlm-launcher"
CRON_FIELDS = 6  # KFP's cron begins with seconds; the five of everybody else get a 0 in front


def main(argv: Sequence[str] | None = None) -> int:
    """Submit one run, or make one schedule, and print where to see it; returns the exit code."""
    args = _parser().parse_args(argv)
    try:
        name = _pipeline(args)
        path = args.package or package(name)
        arguments = _arguments(args, name, _parameters(path))
        with _reaching(args.endpoint):
            connection = _connect(args)
            (_schedule if args.schedule else _submit)(args, connection, path, arguments)
    except LocVLMError as error:
        print(f"submit: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m workflows.submit",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    endpoint = os.environ.get("KF_PIPELINES_ENDPOINT", "")
    parser.add_argument("--endpoint", default=endpoint, metavar="URL", help="KFP's address (KF_PIPELINES_ENDPOINT)")
    parser.add_argument("--token", metavar="TOKEN", help="bearer token, where the endpoint asks for one")
    parser.add_argument("--pipeline", choices=PIPELINES, help="default: image; with --schedule: retrain")
    parser.add_argument("--schedule", metavar="CRON", help="when to retrain, in UTC: '0 3 * * *' is every night at 3")
    parser.add_argument("--package", type=Path, metavar="FILE", help="other than the one beside the code")
    parser.add_argument("--preset", default="locvlm-b", help="default: %(default)s")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data-root", metavar="DIR", help=f"default: {SHARED_PATH}/data/coco")
    parser.add_argument("--images", metavar="DIR", help="default: images in the data root")
    parser.add_argument("--captions", metavar="FILE", help="COCO captions file of the training images")
    parser.add_argument("--data-md5", metavar="HASH", help="the data's version, of `locvlm fetch` or DVC")
    parser.add_argument("--dvc-remote", metavar="URL", help="pull that version from here")
    parser.add_argument("--dvc-file", metavar="FILE", help="retrain: the .dvc file that pins the newest data")
    parser.add_argument("--questions", type=int, default=0, metavar="N", help="questions of a task (default: all)")
    parser.add_argument("--runs", default=f"{SHARED_PATH}/runs", metavar="DIR", help="default: %(default)s")
    parser.add_argument(
        "--argument",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help='any other parameter of the pipeline, e.g. memory=32Gi or \'node_selector={"pool": "cpu"}\'',
    )
    parser.add_argument(
        "--service-account",
        default=SERVICE_ACCOUNT,
        metavar="NAME",
        help="of the steps: the one of k8s/base/rbac.yaml (%(default)s); '' leaves it to KFP",
    )
    parser.add_argument("--no-cache", action="store_true", help="run every step again")
    return parser


def _pipeline(args: argparse.Namespace) -> str:
    name = str(args.pipeline or ("retrain" if args.schedule else "image"))
    if not args.endpoint:
        raise LaunchError("submitting: KFP's address is needed; give --endpoint or set KF_PIPELINES_ENDPOINT")
    if args.schedule and name != "retrain":
        raise LaunchError(
            f"scheduling the {name} pipeline: it would train the same again and again; only retrain looks first "
            "whether anything changed"
        )
    if args.schedule:
        args.schedule = _cron(args.schedule)
    if args.dvc_remote and not args.data_md5 and name != "retrain":
        raise LaunchError("submitting with --dvc-remote: --data-md5, the version to pull, is needed too")
    return name


def _parameters(path: Path) -> dict[str, Any]:
    """The parameters of a package: name -> what its spec says. Raises LaunchError."""
    try:
        # libyaml: the ablation package is half a megabyte
        spec = next(yaml.load_all(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader)))
        return dict(spec["root"]["inputDefinitions"]["parameters"])
    except (OSError, UnicodeDecodeError, yaml.YAMLError, StopIteration, KeyError, TypeError) as fault:
        raise LaunchError(
            f"reading the package {path}: {type(fault).__name__} {fault}; `python -m workflows.compile` writes one"
        ) from None


def _arguments(args: argparse.Namespace, name: str, parameters: dict[str, Any]) -> dict[str, Any]:
    """The pipeline's arguments; what is not legal is an error here, before anything is sent."""
    config = preset(args.preset, [f"seed={args.seed}", *args.overrides])
    own = dict(_argument(entry, parameters) for entry in args.argument)
    if name != "retrain" and args.data_root is None:
        args.data_root = f"{SHARED_PATH}/data/coco"
    if name != "retrain" and args.images is None:
        args.images = f"{args.data_root}/images"
    options = ("data_root", "images", "captions", "data_md5", "dvc_remote", "dvc_file")
    given = {key: getattr(args, key) for key in options if getattr(args, key) is not None} | own
    fixed = {"preset": args.preset, "seed": args.seed, "n_test": args.questions, "runner": "kuberay"}
    fixed["code_version"] = code_version()
    if args.overrides:
        fixed["overrides"] = args.overrides
    if name == "retrain":
        fixed["runs"] = args.runs
    else:
        fixed["root"] = f"{args.runs}/{_run_name(name, config, given, fixed)}"
    arguments = {**fixed, **given}
    unknown = sorted(set(arguments) - set(parameters))
    if unknown:
        raise LaunchError(
            f"submitting the {name} pipeline: it has no {', '.join(unknown)}; it has {_listed(parameters)}"
        )
    missing = sorted(key for key, spec in parameters.items() if not spec.get("isOptional") and key not in arguments)
    if missing:
        raise LaunchError(
            f"submitting the {name} pipeline: it needs {', '.join(missing)}; give each with --argument NAME=VALUE"
        )
    return arguments


def _run_name(name: str, config: ExperimentConfig, given: dict[str, Any], fixed: dict[str, Any]) -> str:
    """Equal for runs that would make the same, so that one that was broken off goes on in its folder."""
    parts = [name, config.fingerprint(), fixed["code_version"], fixed["n_test"], *sorted(given.items())]
    return run_name(config.name, parts)


def _argument(entry: str, parameters: dict[str, Any]) -> tuple[str, Any]:
    name, equals, text = entry.partition("=")
    if not equals or name not in parameters:
        raise LaunchError(f"reading --argument {entry!r}: the form is NAME=VALUE, with one of {_listed(parameters)}")
    kind = parameters[name]["parameterType"]
    if kind == "STRING":
        return name, text
    kinds: dict[str, Any] = {
        "LIST": list,
        "STRUCT": dict,
        "BOOLEAN": bool,
        "NUMBER_INTEGER": int,
        "NUMBER_DOUBLE": (int, float),
    }
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, kinds[kind]):
        raise LaunchError(f"reading --argument {entry!r}: the value has to be JSON of the kind {kind}")
    return name, value


def _listed(parameters: dict[str, Any]) -> str:
    return ", ".join(sorted(parameters))


@contextmanager
def _reaching(endpoint: str) -> Iterator[None]:
    """What the client raises becomes a LaunchError that names the endpoint."""
    from kfp.client import client
    from urllib3.exceptions import HTTPError

    try:
        yield
    except client.kfp_server_api.ApiException as refusal:
        raise LaunchError(f"submitting to {endpoint}: {refusal.status} {refusal.reason}: {refusal.body}") from None
    except (HTTPError, OSError, ValueError) as fault:
        raise LaunchError(f"submitting to {endpoint}: {fault}; is this KFP's address, and does it answer?") from None


def _connect(args: argparse.Namespace) -> Any:
    from kfp.client import client

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # "works only with KFP 2.0 and later"
        return client.Client(host=args.endpoint, existing_token=args.token)


def _submit(args: argparse.Namespace, connection: Any, path: Path, arguments: dict[str, Any]) -> None:
    place = arguments.get("root", args.runs)
    run = connection.create_run_from_pipeline_package(
        str(path),
        arguments=arguments,
        run_name=f"retrain-{args.preset}" if "root" not in arguments else place.rpartition("/")[2],
        experiment_name=EXPERIMENT,
        enable_caching=False if args.no_cache else None,
        service_account=args.service_account or None,
    )
    print(f"run {run.run_id}\nfolder {place}\n{args.endpoint.rstrip('/')}/#/runs/details/{run.run_id}")


def _schedule(args: argparse.Namespace, connection: Any, path: Path, arguments: dict[str, Any]) -> None:
    """Make the schedule, then remove those of the same name: at no time is there none, and a failure leaves the old."""
    experiment = connection.create_experiment(EXPERIMENT).experiment_id  # the one that is there, if it is
    name = f"retrain-{arguments.get('registry_name', 'locvlm')}-{args.preset}"
    before = [old for old in _every(connection.list_recurring_runs, experiment) if old.display_name == name]
    made = connection.create_recurring_run(
        experiment,
        name,
        cron_expression=args.schedule,
        max_concurrency=1,
        no_catchup=True,
        params=arguments,
        pipeline_package_path=str(path),
        enable_caching=False if args.no_cache else None,
        service_account=args.service_account or None,
    )
    for old in before:
        connection.delete_recurring_run(old.recurring_run_id)
    print(
        f"schedule {made.recurring_run_id}: {name}, {args.schedule} (UTC, seconds first), one run at a time, "
        "missed times are not made up for"
    )
    if before:
        print(f"it replaces {', '.join(old.recurring_run_id for old in before)}")
    print(f"{args.endpoint.rstrip('/')}/#/recurringrun/details/{made.recurring_run_id}")


def _every(read: Callable[..., Any], experiment: str) -> list[Any]:
    """All schedules of the experiment, page by page."""
    found: list[Any] = []
    token = ""
    while True:
        page = read(page_token=token, page_size=100, experiment_id=experiment)
        found += page.recurring_runs or []
        token = page.next_page_token or ""
        if not token:
            return found


def _cron(text: str) -> str:
    fields = text.split()
    if len(fields) == CRON_FIELDS - 1:
        fields = ["0", *fields]
    if len(fields) != CRON_FIELDS:
        raise LaunchError(
            f"scheduling at {text!r}: found {len(fields)} fields, needed are five (minute hour day month weekday) or "
            "six (seconds first)"
        )
    return " ".join(fields)


if __name__ == "__main__":
    sys.exit(main())
