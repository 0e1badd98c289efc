"""`python -m workflows.run_local`: the whole image pipeline on this machine; what `make demo` does.

Without options it draws scenes, trains the tiny preset in both arms, scores, registers, and writes the report. Started
again after a failure or Ctrl-C it goes on after the steps that are finished.
"""

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from locvlm import tracking
from locvlm.cli.steps import run_step
from locvlm.config import ExperimentConfig
from locvlm.data.fetch import fetch_coco
from locvlm.errors import DataError, LocVLMError
from locvlm.presets import preset
from locvlm.records import fingerprint, read_json, write_json
from workflows.provenance import code_version, run_name

ARMS = {"LocVLM": "locvlm", "baseline": "baseline"}
SHOWN = ("coco-spatial/accuracy", "coco-spatial-icl/accuracy", "presence/accuracy", "localization/mean_iou")


@dataclass(frozen=True, slots=True)
class Data:
    """Where the data lies: `root` has instances_train.json and instances_test.json. `captions` may be ""."""

    root: Path
    images: Path
    captions: str
    md5: str


def main(argv: Sequence[str] | None = None) -> int:
    """Run the pipeline; returns the exit code (2: the user can fix it, 1: we must, 130: stopped)."""
    args = _parser().parse_args(argv)
    began = time.monotonic()
    try:
        with _environment():
            _run(args, began)
    except LocVLMError as error:
        print(f"\n{error}\n\nfinished steps are kept: mend this and run `make demo` again to continue", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\nstopped; finished steps are kept, run `make demo` again to continue", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m workflows.run_local", description=__doc__)
    parser.add_argument("--preset", default="tiny", help="default: %(default)s")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, metavar="FILE", help="your COCO instances JSON (default: drawn scenes)")
    parser.add_argument("--images", type=Path, metavar="DIR", help="with --data: the folder of its images")
    parser.add_argument("--captions", type=Path, metavar="FILE", help="with --data: COCO captions of the same images")
    parser.add_argument("--n-train", type=int, default=6000, metavar="N", help="scenes to train on (%(default)s)")
    parser.add_argument("--n-test", type=int, default=800, metavar="N", help="scenes to ask about (%(default)s)")
    parser.add_argument(
        "--questions", type=int, default=1000, metavar="N", help="questions of a task (default: %(default)s; 0: all)"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--scenes", type=Path, default=Path("data/scenes"), metavar="DIR", help="default: %(default)s")
    return parser


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """What the steps' processes need; restored at the end."""
    before = dict(os.environ)
    programs = str(Path(sys.executable).parent)  # dvc and locvlm, also when the environment is not activated
    os.environ["PATH"] = os.pathsep.join([programs, os.environ.get("PATH", "")])
    os.environ["PYTHONUNBUFFERED"] = "1"
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _run(args: argparse.Namespace, began: float) -> None:
    from workflows.image_pipeline import make_pipeline
    from workflows.local_runner import RunFolder, run_pipeline

    config = preset(args.preset, [f"seed={args.seed}", *args.overrides])
    runs = args.runs.absolute()
    print(f"preparing the data of a {config.name} run", flush=True)
    data = _prepare(args, runs)
    code = code_version()
    parts = [config.fingerprint(), data.md5, str(data.root), str(data.images), data.captions, code, args.questions]
    folder = RunFolder(runs / run_name(config.name, parts))
    print(f"run folder: {_short(folder.root)}", flush=True)
    uri = tracking.initialise(os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{runs / 'mlflow.db'}")
    os.environ["MLFLOW_TRACKING_URI"] = uri
    arguments = {
        "root": str(folder.root),
        "data_root": str(data.root),
        "images": str(data.images),
        "captions": data.captions,
        "preset": args.preset,
        "overrides": args.overrides,
        "seed": args.seed,
        "n_test": args.questions,
        "runner": "local",
        "data_md5": data.md5,
        "code_version": code,
    }
    with _parent_run(folder.root, {"preset": args.preset, "data": data.md5, "code": code}) as run, _ray(config, folder):
        run_pipeline(make_pipeline(retries=0), arguments, folder, sys.stdout)
        _log_results(run, folder.root)
    _summarise(folder.root, uri, time.monotonic() - began)


def _prepare(args: argparse.Namespace, runs: Path) -> Data:
    """Draw scenes or split the user's COCO file; both are left alone when they are there already."""
    log = str(runs / "prepare.log")
    if args.data is None:
        root = args.scenes.absolute()
        sizes = ["--n-train", str(args.n_train), "--n-test", str(args.n_test)]
        _quietly(["data", "scenes", "--output", str(root), "--seed", "0", *sizes], log)
        images = root / "images"
    else:
        if args.images is None:
            raise DataError(f"preparing {args.data}: --images, the folder of its images, is needed too")
        if not args.data.is_file():
            raise DataError(f"preparing {args.data}: there is no such file")
        root = runs / "data" / f"{args.data.name.partition('.')[0]}-{fingerprint(args.data)[7:15]}"
        argv = ["data", "coco", "--annotations", str(args.data), "--images", str(args.images), "--output", str(root)]
        _quietly([*argv, *(["--captions", str(args.captions)] if args.captions else [])], log)
        images = args.images.absolute()
    captions = root / "captions_train.json"
    found = fetch_coco([root / f"instances_{split}.json" for split in ("train", "test")], images)
    return Data(root, images, str(captions) if captions.is_file() else "", found["md5"])


def _quietly(argv: list[str], log: str) -> None:
    """Run one verb in this process; a failure is the verb's own message."""
    from locvlm.cli.steps import exit_code, last_words
    from workflows.local_runner import StepError

    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        try:
            run_step(argv, log)
        except RuntimeError:
            code = exit_code(Path(log))
            raise StepError(
                f"{' '.join(argv[:2])} failed:\n  {last_words(Path(log))}\n  its log: {log}", code or 1
            ) from None


@contextlib.contextmanager
def _parent_run(root: Path, tags: dict[str, str]) -> Iterator[Any]:
    """The MLflow run that the steps' runs are nested under; a continued pipeline continues it."""
    note = root / "run.json"
    known = read_json(note)["mlflow_run_id"] if note.is_file() else ""
    run_id = tracking.open_parent_run(root.name, tags, known)
    write_json(note, {"mlflow_run_id": run_id})
    os.environ["MLFLOW_RUN_ID"] = run_id
    run = tracking.resume_run(run_id)
    try:
        yield run
    except KeyboardInterrupt:
        run.close("KILLED", "stopped; `make demo` continues it")
        raise
    except BaseException as fault:
        run.close("FAILED", str(fault))
        raise
    run.close("FINISHED")


@contextlib.contextmanager
def _ray(config: ExperimentConfig, folder: Any) -> Iterator[None]:
    """One Ray head for all training steps, unless none is left to do or they do without Ray."""
    names = ("align", *ARMS.values())
    is_trained = all((folder.root / "models" / name / "receipt.json").is_file() for name in names)
    if is_trained or not config.cluster.num_workers or os.environ.get("RAY_ADDRESS"):
        yield
        return
    print("starting Ray", flush=True)
    from locvlm.training.ray_train import local_head

    with local_head():
        yield


def _figures(root: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Arm -> `task/figure` -> the figure of metrics.json."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for arm, name in ARMS.items():
        found[arm] = {}
        for path in sorted((root / "predictions" / name).glob("*.metrics.json")):
            content = json.loads(path.read_text(encoding="utf-8"))
            found[arm] |= {f"{content['task']}/{key}": figure for key, figure in content["figures"].items()}
    return found


def _log_results(run: Any, root: Path) -> None:
    for arm, figures in _figures(root).items():
        run.log_metrics({f"{arm}/{key}": figure["value"] for key, figure in figures.items()}, 0)
    run.log_artifact(root / "report" / "report.html", "report")
    run.log_artifact(root / "decision.json", "gate")


def _summarise(root: Path, uri: str, seconds: float) -> None:
    figures = _figures(root)
    shown = [key for key in SHOWN if all(key in known for known in figures.values())]
    widths = [max(len(key), 10) for key in shown]
    print("\n" + " " * 12 + "  ".join(f"{key:>{width}}" for key, width in zip(shown, widths, strict=True)))
    for arm, known in figures.items():
        cells = [f"{known[key]['value']:>{width}.3f}" for key, width in zip(shown, widths, strict=True)]
        print(f"  {arm:<10}" + "  ".join(cells))
    decision = json.loads((root / "decision.json").read_text(encoding="utf-8"))
    alias = "champion" if decision["promoted"] else "challenger (a gate did not hold)"
    print(f"\nmodel:   {decision['name']} version {decision['version']}, alias {alias}")
    for gate in decision["gates"]:
        if not gate["held"]:
            print(f"         {gate['gate']} gate, {gate['figure']}: {gate['reason']}")
    print(f"report:  {root / 'report' / 'report.html'}")
    print(f"MLflow:  make ui   (mlflow ui --backend-store-uri {uri})")
    print(f"time:    {int(seconds // 60)} min {int(seconds % 60)} s")


def _short(path: Path) -> str:
    """A path as a person would type it here."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


if __name__ == "__main__":
    sys.exit(main())
