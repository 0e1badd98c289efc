"""`python -m workflows.run_local`: the whole image pipeline on this machine; what `make demo` does.

Without options it draws scenes, trains the tiny preset in both arms, scores, registers, and writes the report. Started
again after a failure or Ctrl-C it goes on after the steps that are finished. With --pipeline ablation the arms are
those of the paper's Tables 2 and 11, and nothing is registered.

With --runner kuberay the steps that train or ask a model are RayJobs on the cluster of the kubeconfig, all others run
here; --runs and the data have to be on a volume that the cluster has at the same path.
"""

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from locvlm import tracking
from locvlm.cli.steps import run_step
from locvlm.config import ExperimentConfig
from locvlm.data.fetch import fetch_coco
from locvlm.errors import ConfigError, DataError, LocVLMError
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
    parser.add_argument("--pipeline", choices=("image", "ablation"), default="image", help="default: %(default)s")
    parser.add_argument("--arms", nargs="+", metavar="NAME", help="ablation: only these (default: all image arms)")
    parser.add_argument("--preset", default="tiny", help="default: %(default)s")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, metavar="FILE", help="your COCO instances JSON (default: drawn scenes)")
    parser.add_argument("--images", type=Path, metavar="DIR", help="with --data: the folder of its images")
    parser.add_argument(
        "--captions",
        type=Path,
        metavar="FILE",
        help="with --data: COCO captions of the same images; with --dvc-remote: its path in it",
    )
    parser.add_argument("--dvc-remote", metavar="URL", help="pull the data from here: a folder or s3://bucket/prefix")
    parser.add_argument(
        "--data-md5",
        metavar="HASH",
        help="with --dvc-remote: the version to pull, a folder as `locvlm data scenes` or `data coco` makes it",
    )
    parser.add_argument("--n-train", type=int, default=6000, metavar="N", help="scenes to train on (%(default)s)")
    parser.add_argument("--n-test", type=int, default=800, metavar="N", help="scenes to ask about (%(default)s)")
    parser.add_argument(
        "--questions", type=int, default=1000, metavar="N", help="questions of a task (default: %(default)s; 0: all)"
    )
    parser.add_argument("--runner", choices=("local", "kuberay"), default="local", help="default: %(default)s")
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
    from workflows.local_runner import RunFolder, run_pipeline

    pipeline, arms = _pipeline(args)
    config = preset(args.preset, [f"seed={args.seed}", *args.overrides])
    runs = args.runs.absolute()
    print(f"preparing the data of a {config.name} run", flush=True)
    data = _prepare(args, runs)
    code = code_version()
    parts = [config.fingerprint(), data.md5, str(data.root), str(data.images), data.captions, code, args.questions]
    if args.pipeline != "image":
        parts += [args.pipeline, *arms.values()]
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
        "runner": args.runner,
        "data_md5": data.md5,
        "dvc_remote": args.dvc_remote or "",
        "code_version": code,
    }
    with (
        _parent_run(folder.root, {"preset": args.preset, "data": data.md5, "code": code}) as run,
        _ray(config, folder, arms) if args.runner == "local" else contextlib.nullcontext(),
    ):
        run_pipeline(pipeline, arguments, folder, sys.stdout)
        _log_decision(run, folder.root)
    _summarise(folder.root, arms, uri, time.monotonic() - began)


def _pipeline(args: argparse.Namespace) -> tuple[Any, dict[str, str]]:
    """The pipeline, and the title and name of its arms."""
    from workflows import ablation_pipeline, image_pipeline

    if args.pipeline == "image":
        if args.arms:
            raise ConfigError("running the image pipeline: --arms is for --pipeline ablation")
        return image_pipeline.make_pipeline(retries=0), ARMS
    known = {arm.name: arm for arm in ablation_pipeline.ARMS}
    unknown = sorted(set(args.arms or ()) - set(known))
    if unknown:
        raise ConfigError(f"running the ablation: there is no arm {', '.join(unknown)}; there are {', '.join(known)}")
    arms = [known[name] for name in dict.fromkeys(args.arms or known)]
    pipeline = ablation_pipeline.make_pipeline(retries=0, arms=arms, video_arms=())
    return pipeline, {arm.title: arm.name for arm in arms}


def _prepare(args: argparse.Namespace, runs: Path) -> Data:
    """Draw scenes or split the user's COCO file; both are left alone when they are there already. A version in a DVC
    remote is pulled by the pipeline."""
    if args.dvc_remote:
        if not args.data_md5 or args.data is not None:
            raise DataError(f"pulling data from {args.dvc_remote}: --data-md5, the version, is needed, and no --data")
        root = runs / "data" / args.data_md5.removesuffix(".dir")
        return Data(root, root / "images", str(root / args.captions) if args.captions else "", args.data_md5)
    log = str(runs / "prepare.log")
    if args.data is None:
        root = args.scenes.absolute()
        sizes = ["--n-train", str(args.n_train), "--n-test", str(args.n_test)]
        _quietly(["data", "scenes", "--output", str(root), "--seed", "0", "--shards", *sizes], log)
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
def _ray(config: ExperimentConfig, folder: Any, arms: Mapping[str, str]) -> Iterator[None]:
    """One Ray head for all training steps, unless none is left to do or they do without Ray."""
    names = ("align", *arms.values())
    is_trained = all((folder.root / "models" / name / "receipt.json").is_file() for name in names)
    if is_trained or not config.cluster.num_workers or os.environ.get("RAY_ADDRESS"):
        yield
        return
    print("starting Ray", flush=True)
    from locvlm.training.ray_train import local_head

    with local_head():
        yield


def _figures(root: Path, arms: Mapping[str, str]) -> dict[str, dict[str, dict[str, Any]]]:
    """Arm -> `task/figure` -> the figure of metrics.json."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for arm, name in arms.items():
        found[arm] = {}
        for path in sorted((root / "predictions" / name).glob("*.metrics.json")):
            content = json.loads(path.read_text(encoding="utf-8"))
            found[arm] |= {f"{content['task']}/{key}": figure for key, figure in content["figures"].items()}
    return found


def _log_decision(run: Any, root: Path) -> None:
    if (root / "decision.json").is_file():
        run.log_artifact(root / "decision.json", "gate")


def _summarise(root: Path, arms: Mapping[str, str], uri: str, seconds: float) -> None:
    figures = _figures(root, arms)
    margin = max(10, *(len(arm) for arm in arms))
    shown = [key for key in SHOWN if all(key in known for known in figures.values())]
    widths = [max(len(key), 10) for key in shown]
    print("\n" + " " * (margin + 2) + "  ".join(f"{key:>{width}}" for key, width in zip(shown, widths, strict=True)))
    for arm, known in figures.items():
        cells = [f"{known[key]['value']:>{width}.3f}" for key, width in zip(shown, widths, strict=True)]
        print(f"  {arm:<{margin}}" + "  ".join(cells))
    print()
    if (root / "decision.json").is_file():
        _tell_decision(json.loads((root / "decision.json").read_text(encoding="utf-8")))
    print(f"report:  {root / 'report' / 'report.html'}")
    print(f"MLflow:  make ui   (mlflow ui --backend-store-uri {uri})")
    print(f"time:    {int(seconds // 60)} min {int(seconds % 60)} s")


def _tell_decision(decision: Mapping[str, Any]) -> None:
    alias = "champion" if decision["promoted"] else "challenger (a gate did not hold)"
    print(f"model:   {decision['name']} version {decision['version']}, alias {alias}")
    for gate in decision["gates"]:
        if not gate["held"]:
            print(f"         {gate['gate']} gate, {gate['figure']}: {gate['reason']}")


def _short(path: Path) -> str:
    """A path as a person would type it here."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


if __name__ == "__main__":
    sys.exit(main())
