"""`locvlm evaluate`: a model on every benchmark that is on disk, and the paper's tables with its figures below."""

import argparse
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from locvlm.cli.asking import TASK_NAMES, add_judge_options, add_model_options, decoding_of, judge_of, model_of
from locvlm.cli.reporting import track
from locvlm.errors import ConfigError, DataError, UserError

if TYPE_CHECKING:
    from locvlm.evaluation.arms import Arm
    from locvlm.evaluation.benchmarks import Benchmark, Search
    from locvlm.evaluation.judges import Judge

log = logging.getLogger(__name__)

_ABSENT, _NO_IMAGES = "not on disk", "its images are not on disk"
_ALL_OR_NONE = "left out by --limit: its server wants all answers"
_SUBMISSION = "result file written; only its server can score it"


def add_verbs(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register evaluate."""
    parser = verbs.add_parser(
        "evaluate",
        help="a model on every benchmark that is on disk, and the paper's tables with its figures",
        description="Find the benchmarks of the paper in a folder by the names that their publishers gave the files, "
        "ask the model, score, and report: OUTPUT/NAME holds answers and figures, OUTPUT/report.html and report.md "
        "show every model evaluated into OUTPUT beside the paper's. What is not on disk is listed with what to put "
        "where. An interrupted call continues when it is run again.",
    )
    parser.add_argument(
        "--benchmarks", required=True, type=Path, metavar="DIR", help="folder of the benchmarks' files, to any depth"
    )
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder of all models' results")
    parser.add_argument("--name", help="of the model in the tables (default: that of its folder)")
    parser.add_argument(
        "--task", action="append", default=[], metavar="NAME", help=f"only this one; may be repeated: {TASK_NAMES}"
    )
    add_model_options(parser)
    add_judge_options(parser)
    parser.add_argument("--blur-faces", action="store_true", help="blur the faces in the report's pictures")
    parser.set_defaults(run=_evaluate)


@dataclass
class _Gaps:
    """Kind of benchmark -> why there is no figure of it, in a few words; benchmark -> what went wrong with it."""

    why: dict[str, str] = field(default_factory=dict)
    faults: dict[str, UserError] = field(default_factory=dict)

    def fault(self, benchmark: "Benchmark", fault: UserError) -> None:
        """The others go on."""
        log.warning("%s: %s", benchmark.name, fault)
        self.faults[benchmark.name] = fault
        self.why[benchmark.kind.name] = f"failed: {str(fault).partition(';')[0].splitlines()[0][:120]}"


def _evaluate(args: argparse.Namespace) -> None:
    from locvlm.evaluation.arms import MISSING, read_missing
    from locvlm.evaluation.benchmarks import find_benchmarks
    from locvlm.evaluation.tasks import task_named
    from locvlm.records import write_json

    for task in args.task:
        task_named(task)
    search = find_benchmarks(args.benchmarks, args.task)
    for line in search.left_out:
        log.info("left out: %s", line)
    name = args.name or _name_of(args.model)
    if name in (".", "..") or "/" in name or "=" in name:
        raise ConfigError(f"evaluating: --name {name!r} becomes a folder and a label; give it letters and digits")
    folder = args.output / name
    judge = judge_of(args, folder / "judge.jsonl")
    gaps = _Gaps(dict.fromkeys(search.missing, _ABSENT))
    wanted = [benchmark for benchmark in search.found if benchmark.is_scored or args.limit is None]
    gaps.why |= {benchmark.kind.name: _ALL_OR_NONE for benchmark in search.found if benchmark not in wanted}
    ready = _with_images(wanted, args.images, gaps)
    _ask(args, ready, folder, gaps)
    for benchmark in ready:
        if benchmark.name not in gaps.faults:
            _score(benchmark, folder, judge, gaps)
    if folder.is_dir():
        asked = {*search.missing, *(benchmark.kind.name for benchmark in search.found)}
        known = read_missing(folder)  # of what --task leaves out now
        write_json(folder / MISSING, {kind: why for kind, why in known.items() if kind not in asked} | gaps.why)
        _report(args, name)
    _tell_missing(args.benchmarks, search, gaps)
    if gaps.faults:
        told = "".join(f"\n  {failed}: {fault}" for failed, fault in gaps.faults.items())
        raise DataError(f"evaluating {name}: {len(gaps.faults)} of {len(search.found)} benchmarks have no figure{told}")


def _with_images(found: "Sequence[Benchmark]", folders: Sequence[Path], gaps: _Gaps) -> "list[Benchmark]":
    """Those of which an image was found: what then lacks one is a failure, and not a folder that was forgotten."""
    from locvlm.evaluation.benchmarks import has_images
    from locvlm.pixels import open_images

    sources = [open_images(folder) for folder in folders]
    ready = []
    for benchmark in found:
        try:
            if has_images(benchmark, sources):
                ready.append(benchmark)
            else:
                gaps.why[benchmark.kind.name] = _NO_IMAGES
        except UserError as fault:
            gaps.fault(benchmark, fault)
    return ready


def _ask(args: argparse.Namespace, benchmarks: "Sequence[Benchmark]", folder: Path, gaps: _Gaps) -> None:
    from locvlm.evaluation.predict import Job, Options, predict
    from locvlm.evaluation.tasks import task_named

    decoding = decoding_of(args)
    model = model_of(args, folder / "replies.jsonl")
    jobs = {Job(task_named(b.task), b.data, _answers(folder, b), b.split): b for b in benchmarks}

    def on_fault(job: Job, fault: UserError) -> None:
        gaps.fault(jobs[job], fault)

    predict(list(jobs), Options(args.images, args.limit, decoding, args.overwrite, args.workers), model, on_fault)


def _score(benchmark: "Benchmark", folder: Path, judge: "Judge | None", gaps: _Gaps) -> None:
    """Write the figures of one benchmark, or its result file where the answers are not public."""
    from locvlm.evaluation.score import describe_briefly, score, write_metrics, write_results
    from locvlm.evaluation.tasks import task_named

    task, answers = task_named(benchmark.task), _answers(folder, benchmark)
    try:
        if benchmark.is_scored:
            own = judge if task.judged is not None else None
            metrics = score(
                task, answers, benchmark.data, annotations=benchmark.annotations, split=benchmark.split, judge=own
            )
            write_metrics(folder / f"{benchmark.name}.metrics.json", metrics)
            print(f"{benchmark.name}: {describe_briefly(metrics)}")
        else:
            results = folder / f"{benchmark.name}.results.json"
            write_results(task, answers, benchmark.data, results)
            gaps.why[benchmark.kind.name] = _SUBMISSION
            print(f"{benchmark.name}: result file {results}")
    except UserError as fault:
        gaps.fault(benchmark, fault)


def _report(args: argparse.Namespace, name: str) -> None:
    """Every model with figures in the output folder, this one first."""
    from locvlm.evaluation.arms import read_arm
    from locvlm.evaluation.markdown import text_tables
    from locvlm.evaluation.paper_tables import paper_tables
    from locvlm.evaluation.report import Contents, write_report

    holders = {path.parent for path in args.output.glob("*/*.metrics.json")}
    if not holders:
        return
    folders = sorted(holders, key=lambda folder: (folder.name != name, folder.name))
    arms: list[Arm] = [read_arm(folder.name, folder) for folder in folders]
    contents = Contents(f"{name} on the paper's benchmarks", images=args.images, blur_faces=args.blur_faces)
    html, markdown = write_report(arms, args.output, contents)
    track(html, markdown)
    print(f"\n{text_tables(paper_tables(arms))}\n")
    print(html)
    print(markdown)


def _tell_missing(folder: Path, search: "Search", gaps: _Gaps) -> None:
    if search.missing:
        print(f"\nNot in {folder}; put there")
        for name, wanted in search.missing.items():
            print(f"  {name}: {wanted}")
    kinds = [benchmark.kind for benchmark in search.found]
    blind = {kind.name: kind.images for kind in kinds if gaps.why.get(kind.name) == _NO_IMAGES}
    if blind:
        print("\nWithout images; name a folder that holds them with --images")
        for name, needed in blind.items():
            print(f"  {name}: {needed}")


def _answers(folder: Path, benchmark: "Benchmark") -> Path:
    return folder / f"{benchmark.name}.jsonl"


def _name_of(model: str) -> str:
    """openai:org/name is org-name; a folder is called by its own name."""
    kind, _, rest = model.partition(":")
    return rest.replace("/", "-") if kind == "openai" else Path(model).resolve().name
