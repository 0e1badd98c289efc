"""`python -m workflows.submit`: send the compiled image pipeline to a KFP endpoint.

The same in plain KFP, without any of our code (values are parsed as JSON, so a list is written as one):

    kfp --endpoint URL run create -e locvlm -r RUN -f workflows/image_pipeline.yaml \
        root=/mnt/locvlm/runs/RUN data_root=/mnt/locvlm/data/coco images=/mnt/locvlm/data/coco/images \
        preset=locvlm-b data_md5=HASH code_version=VERSION 'overrides=["coordinates.n_bins=112"]'
"""

import argparse
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from locvlm.errors import LaunchError, LocVLMError
from locvlm.presets import preset
from workflows.compile import PACKAGE
from workflows.image_pipeline import SHARED_PATH
from workflows.provenance import code_version, run_name

EXPERIMENT = "locvlm"


def main(argv: Sequence[str] | None = None) -> int:
    """Submit one run and print where to see it; returns the exit code."""
    args = _parser().parse_args(argv)
    try:
        arguments = _arguments(args)
        run = _submit(args, arguments)
    except LocVLMError as error:
        print(f"submit: {error}", file=sys.stderr)
        return error.exit_code
    print(f"run {run.run_id}\nfolder {arguments['root']}\n{args.endpoint.rstrip('/')}/#/runs/details/{run.run_id}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m workflows.submit",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--endpoint", required=True, metavar="URL", help="KFP's address")
    parser.add_argument("--token", metavar="TOKEN", help="bearer token, where the endpoint asks for one")
    parser.add_argument("--preset", default="locvlm-b", help="default: %(default)s")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data-root", default=f"{SHARED_PATH}/data/coco", metavar="DIR", help="default: %(default)s")
    parser.add_argument("--images", metavar="DIR", help="default: images in the data root")
    parser.add_argument("--captions", default="", metavar="FILE", help="COCO captions file of the training images")
    parser.add_argument("--data-md5", default="", metavar="HASH", help="the data's version, of `locvlm fetch` or DVC")
    parser.add_argument("--dvc-remote", default="", metavar="URL", help="pull that version from here")
    parser.add_argument("--questions", type=int, default=0, metavar="N", help="questions of a task (default: all)")
    parser.add_argument("--runs", default=f"{SHARED_PATH}/runs", metavar="DIR", help="default: %(default)s")
    parser.add_argument("--service-account", default="", help="for the steps, e.g. locvlm-launcher")
    parser.add_argument("--no-cache", action="store_true", help="run every step again")
    return parser


def _arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The pipeline's parameters; a setting that is not legal is an error here, before anything is sent."""
    config = preset(args.preset, [f"seed={args.seed}", *args.overrides])
    if args.dvc_remote and not args.data_md5:
        raise LaunchError("submitting with --dvc-remote: --data-md5, the version to pull, is needed too")
    code = code_version()
    images = args.images or f"{args.data_root}/images"
    parts = [config.fingerprint(), args.data_md5, args.data_root, images, args.captions, code, args.questions]
    return {
        "root": f"{args.runs}/{run_name(config.name, parts)}",
        "data_root": args.data_root,
        "images": images,
        "captions": args.captions,
        "preset": args.preset,
        "overrides": args.overrides,
        "seed": args.seed,
        "n_test": args.questions,
        "runner": "kuberay",
        "data_md5": args.data_md5,
        "dvc_remote": args.dvc_remote,
        "code_version": code,
    }


def _submit(args: argparse.Namespace, arguments: dict[str, Any]) -> Any:
    from kfp.client import client
    from urllib3.exceptions import HTTPError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # "works only with KFP 2.0 and later"
            connection = client.Client(host=args.endpoint, existing_token=args.token)
        return connection.create_run_from_pipeline_package(
            str(PACKAGE),
            arguments=arguments,
            run_name=arguments["root"].rpartition("/")[2],
            experiment_name=EXPERIMENT,
            enable_caching=False if args.no_cache else None,
            service_account=args.service_account or None,
        )
    except client.kfp_server_api.ApiException as refusal:
        raise LaunchError(f"submitting to {args.endpoint}: {refusal.status} {refusal.reason}: {refusal.body}") from None
    except (HTTPError, OSError, ValueError) as fault:
        raise LaunchError(
            f"submitting to {args.endpoint}: {fault}; is this KFP's address, and does it answer?"
        ) from None


if __name__ == "__main__":
    sys.exit(main())
