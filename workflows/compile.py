"""`python -m workflows.compile`: write the pipeline packages; a test keeps them in step with the code."""

import argparse
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

from kfp import compiler

from workflows import ablation_pipeline, image_pipeline, retrain_pipeline, video_pipeline
from workflows.steps import TIMEOUTS, Kind

PIPELINES: Mapping[str, Callable[..., Any]] = {
    "image": image_pipeline.make_pipeline,
    "video": video_pipeline.make_pipeline,
    "ablation": ablation_pipeline.make_pipeline,
    "retrain": retrain_pipeline.make_pipeline,
}


def package(name: str) -> Path:
    """Where the package of a pipeline lies."""
    return Path(__file__).with_name(f"{name}_pipeline.yaml")


def compile_package(name: str, path: Path, timeouts: Mapping[Kind, int] = TIMEOUTS) -> None:
    """Compile the pipeline `name` into `path`; `timeouts`: seconds a step of each kind may take."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        compiler.Compiler().compile(PIPELINES[name](timeouts=timeouts), str(path))


def _timeout(text: str) -> tuple[str, int]:
    kind, _, seconds = text.partition("=")
    if kind not in get_args(Kind) or not seconds.isdigit() or int(seconds) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not KIND=SECONDS with a kind of {', '.join(get_args(Kind))}")
    return kind, int(seconds)


def main() -> None:
    """Compile what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m workflows.compile", description=__doc__)
    parser.add_argument("--pipeline", choices=PIPELINES, action="append", help="default: all of them")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: beside the code")
    parser.add_argument(
        "--timeout",
        type=_timeout,
        action="append",
        default=[],
        metavar="KIND=SECONDS",
        help="of light, data, job steps",
    )
    args = parser.parse_args()
    for name in args.pipeline or PIPELINES:
        path = package(name) if args.output is None else args.output / package(name).name
        path.parent.mkdir(parents=True, exist_ok=True)
        compile_package(name, path, {**TIMEOUTS, **dict(args.timeout)})
        print(path)


if __name__ == "__main__":
    main()
