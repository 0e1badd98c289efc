"""`python -m workflows.paper`: the paper in miniature, on drawn scenes and the tiny preset; what `make paper` does.

All questions that are asked in the end are about scenes of a test split that nothing is trained on. Finished steps are
kept: started again, it goes on. Where that was on another machine, the answers packed beside the page do
(`--continue`). The page has every arm that is answered, also those that this start did not ask for (`--arms`).
"""

import argparse
import io
import json
import lzma
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from locvlm.cli.steps import last_words
from locvlm.config import dump_config
from locvlm.data.captions import normalise_caption
from locvlm.data.conversations import open_conversations
from locvlm.errors import ConfigError, LocVLMError
from locvlm.evaluation.score import read_metrics
from locvlm.presets import preset
from locvlm.records import atomic_write, fingerprint, read_json, read_jsonl, write_json, write_jsonl
from workflows.paper_arms import (
    ALIGNED,
    CAPTIONER,
    CAPTIONS,
    CLIP_TASKS,
    EXPRESSED,
    EXPRESSIONS,
    HORIZONTAL,
    IMAGE_ARM,
    MINIATURE,
    N_TEST,
    N_TRAIN,
    SCENES_SEED,
    STEPS,
    VERTICAL,
    Plan,
    Trained,
    foundation_of,
)
from workflows.paper_page import page
from workflows.provenance import run_name

CAPTIONER_SEED, CLIPS_SEED = 20240620, 20240621  # no other run of the project draws these
QUESTIONS = 1000  # of a task
_RUN = "run.json"  # in the packed answers
_SETTINGS = "arms.json"  # in the run's folder: what decides the answers of each arm


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is not finished and write the page; returns the exit code (2: the user can fix it, 130: stopped)."""
    args = _parser().parse_args(argv)
    try:
        plan = _plan(args)
        print(f"run folder: {plan.root}", flush=True)
        answers = args.output.with_suffix(".answers.tar.xz")
        plan.root.mkdir(parents=True, exist_ok=True)
        if args.go_on:
            _unpack(plan, answers)
        _keep_settings(plan)
        _keep_answers(plan, answers)
        if not args.only_report:
            _run(plan)
        _score_answers(plan)
        with atomic_write(args.output) as file:
            file.write(page(plan))
        _pack(plan, answers)
        print(f"wrote {args.output} and {answers}", flush=True)
    except OSError as fault:
        print(f"\nrunning the paper in miniature: {fault}; name other folders or make room", file=sys.stderr)
        return 2
    except LocVLMError as error:
        print(f"\n{error}\n\nfinished steps are kept: mend this and run `make paper` again", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\nstopped; finished steps are kept, run `make paper` again to continue", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    names = [arm.name for arm in MINIATURE]
    parser = argparse.ArgumentParser(prog="python -m workflows.paper", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="default: 0 1 2")
    parser.add_argument(
        "--arms", nargs="+", default=names, choices=names, metavar="NAME", help=f"of {', '.join(names)}"
    )
    parser.add_argument("--steps", type=int, default=STEPS, help="of stage 2 (default: %(default)s)")
    parser.add_argument("--scenes", type=int, nargs=2, default=(N_TRAIN, N_TEST), metavar=("TRAIN", "TEST"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--runs", type=Path, default=Path("runs"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="at once, a core each")
    parser.add_argument("--output", type=Path, default=Path("docs/results/miniature.md"), help="default: %(default)s")
    parser.add_argument(
        "--continue", action="store_true", dest="go_on", help="take the answers that are packed beside --output as done"
    )
    parser.add_argument("--only-report", action="store_true", help="train nothing: the page of what is finished")
    return parser


def _plan(args: argparse.Namespace) -> Plan:
    if min(args.jobs, args.steps, *args.scenes) < 1:
        raise ConfigError("running the paper in miniature: --jobs, --steps and --scenes must be at least 1")
    if len(set(args.seeds)) < len(args.seeds):
        raise ConfigError(f"running the paper in miniature: a seed of --seeds {args.seeds} is given twice")
    overrides = [f"stages.instruct.steps={args.steps}", "cluster.num_workers=0"]
    overrides += args.overrides
    config = preset("tiny", overrides)
    if config.stages.instruct is None or config.stages.instruct.steps is None:
        raise ConfigError(
            "running the paper in miniature: arms are compared after equally many steps; set --steps alone"
        )
    parts = [config.fingerprint(), fingerprint(foundation_of(config)), *args.scenes]
    arms = [arm for arm in MINIATURE if arm.name in args.arms]
    root = args.runs.absolute() / run_name("paper", parts)
    return Plan(root, config, overrides, args.seeds, arms, args.scenes, args.jobs)


def _keep_settings(plan: Plan) -> None:
    """Write down what decides the answers of each arm. Raises ConfigError where those that are here were given under
    other settings."""
    path = plan.root / _SETTINGS
    known = read_json(path) if path.is_file() else {}
    wanted = {arm.name: _identity(plan, arm) for arm in MINIATURE}
    made = {arm.name for arm in MINIATURE for seed in plan.seeds if _has_begun(plan, arm, seed)}
    if changed := sorted(name for name in made & known.keys() if known[name] != wanted[name]):
        raise ConfigError(
            f"running the paper in miniature: in {plan.root} there are answers or models of {', '.join(changed)} with "
            "other settings; remove their folders below models and predictions, or name another folder with --runs"
        )
    write_json(path, wanted)


def _identity(plan: Plan, trained: Trained) -> list[str]:
    """All that an arm's answers depend on, beside what the run's name says."""
    drawn = [f"clips {CLIPS_SEED}"] if trained.video else []
    taught = [f"captioner {CAPTIONER_SEED}"] if trained.captioned else []
    return [*plan.settings(trained), *drawn, *taught, f"scenes {SCENES_SEED}", f"{QUESTIONS} questions"]


def _has_begun(plan: Plan, trained: Trained, seed: int) -> bool:
    models = plan.root / "models" / str(seed)
    folders = [models / trained.name, models / f".{trained.name}.training"]
    return _has_answered(plan, trained, seed) or any(folder.exists() for folder in folders)


def _keep_answers(plan: Plan, packed: Path) -> None:
    """Raises ConfigError where the pack of this run beside the page has answers that are not here and would go lost."""
    if not packed.is_file():
        return
    with _opened(packed) as (archive, told):
        known = [one.name for one in archive if one.name.endswith(".jsonl") and not _is_outdated(plan, one.name, told)]
    lost = sum(not (plan.root / name).exists() for name in known)
    if told.get("run") == plan.root.name and lost:
        raise ConfigError(
            f"running the paper in miniature: {packed} holds {lost} files of answers of this run that are not in "
            f"{plan.root}, and would be replaced; take them with --continue, or name another --output"
        )


def _is_outdated(plan: Plan, member: str, told: Mapping[str, Any]) -> bool:
    """Whether answers in a pack were given under other settings than those of today. `told`: what the pack says."""
    name = Path(member).parent.name
    identities = {arm.name: _identity(plan, arm) for arm in MINIATURE}
    return bool(told.get("arms", {}).get(name) != identities.get(name))


def _score_answers(plan: Plan) -> None:
    for trained in MINIATURE:
        for seed in plan.seeds:
            if _has_answered(plan, trained, seed):
                _score(plan, trained, seed)


def _make(plan: Plan, steps: Iterable[tuple[str, list[str], Path]]) -> None:
    for name, argv, output in steps:
        _locvlm(plan, name, argv if argv[1] in ("scenes", "clips") else [*argv, "--preset", "tiny"], output)


def _run(plan: Plan) -> None:
    _make(plan, _data_steps(plan))
    chains = [(arm, seed) for arm in plan.arms for seed in plan.seeds if not _is_finished(plan, arm, seed)]
    training = [(arm, seed) for arm, seed in chains if not _has_answered(plan, arm, seed)]
    seeds = sorted({seed for _, seed in training})
    with ThreadPoolExecutor(plan.jobs) as pool:
        list(pool.map(partial(_align, plan), seeds))
    n_done = len(plan.seeds) * len(plan.arms) - len(chains)
    began, n_before = time.monotonic(), n_done
    _tell(plan, n_done, n_before, began, "")
    with ThreadPoolExecutor(plan.jobs) as pool:
        running: set[Future[str]] = set()
        if any(arm.captioned for arm, _ in training):  # first, so that its arms need not wait
            running.add(pool.submit(_caption, plan))
        running |= {pool.submit(_arm, plan, arm, seed) for arm, seed in chains}
        try:
            while running:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for news in (future.result() for future in done):
                    n_done += news != ""
                    _tell(plan, n_done, n_before, began, news or "the captioner has described all objects")
        except BaseException:
            for future in running:
                future.cancel()
            raise


def _described_steps(plan: Plan) -> Iterator[tuple[str, list[str], Path]]:
    """Name, verb and output of the scenes and of what their objects are told by."""
    scenes = plan.root / "data" / "scenes"
    sizes = ["--n-train", str(plan.scenes[0]), "--n-test", str(plan.scenes[1]), "--shards"]
    yield "scenes", ["data", "scenes", "--seed", str(SCENES_SEED), *sizes], scenes
    test = ["--annotations", str(scenes / "instances_test.json")]
    yield "described", ["data", "described", *test], plan.root / "data" / "described-test"


def _data_steps(plan: Plan) -> Iterator[tuple[str, list[str], Path]]:
    """Everything that arms share."""
    yield from _described_steps(plan)
    data, questions = plan.root / "data", plan.root / "questions"
    scenes = data / "scenes"
    train, test = (["--annotations", str(scenes / f"instances_{split}.json")] for split in ("train", "test"))
    captions = ["--captions", str(scenes / "captions_train.json")]
    yield "generic", ["data", "generic", *train, *captions], data / "generic"
    for axis, option in ((HORIZONTAL, "horizontal"), (VERTICAL, "vertical")):
        yield axis, ["data", "coco-spatial", *test, "--axis", option], questions / axis
    yield "presence", ["data", "hallucination", *test], questions / "presence"
    made = set()
    for trained in plan.arms:
        places = [part for place in trained.arm.places for part in ("--set", place)]
        for split, annotations in (("train", train), ("test", test)):
            name = trained.arm.data(split)
            if name not in made:
                made.add(name)
                yield name, ["data", "localize-instruct", *annotations, *places], data / name
    if any(arm.video for arm in plan.arms):
        yield from _clip_steps(plan)


def _clip_steps(plan: Plan) -> Iterator[tuple[str, list[str], Path]]:
    data, clips = plan.root / "data", plan.root / "data" / "clips"
    # things that move cannot be asked about: of a clip there are fewer questions than of a scene
    sizes = ["--n-train", str(plan.scenes[0]), "--n-test", str(3 * plan.scenes[1])]
    yield "clips", ["data", "clips", "--seed", str(CLIPS_SEED), *sizes], clips
    train, test = (["--annotations", str(clips / f"instances_{split}.json")] for split in ("train", "test"))
    captions = ["--captions", str(clips / "captions_train.json")]
    yield "clips-generic", ["data", "generic", *train, *captions], data / "clips-generic"
    yield "clips-train", ["data", "localize-instruct", *train], data / "clips-localize-train"
    yield "clips-test", ["data", "localize-instruct", *test], plan.root / CLIP_TASKS["localization"]
    yield "clips-left-right", ["data", "coco-spatial", *test], plan.root / CLIP_TASKS["coco-spatial"]
    yield "clips-presence", ["data", "hallucination", *test], plan.root / CLIP_TASKS["presence"]


def _align(plan: Plan, seed: int) -> None:
    output = plan.root / "models" / str(seed) / ALIGNED.name
    argv = ["train", "--stage", "align", "--data", f"generic={plan.root / 'data' / 'generic'}", *_common(plan, seed)]
    with plan.lock(f"{seed}-align"):
        _locvlm(plan, f"{seed}-align", argv, output)


def _caption(plan: Plan) -> str:
    """Teach a captioner on scenes of its own, from the aligned model of the first seed; let it describe the objects of
    the training scenes, and build what the arm with pseudo-captions is trained on. No news."""
    with plan.lock("captioner"):
        if not ((plan.root / CAPTIONER).is_file() and (plan.root / "data" / CAPTIONS.train_data).exists()):
            _teach_and_caption(plan, plan.seeds[0])
    return ""


def _teach_and_caption(plan: Plan, seed: int) -> None:
    _align(plan, seed)
    data, scenes = plan.root / "data", plan.root / "data" / "captioner-scenes"
    sizes = ["--n-train", str(plan.scenes[0]), "--n-test", "1", "--shards"]
    _locvlm(plan, scenes.name, ["data", "scenes", "--seed", str(CAPTIONER_SEED), *sizes], scenes)
    taught = data / "captioner-described"
    described = ["data", "described", "--preset", "tiny", "--annotations"]
    _locvlm(plan, taught.name, [*described, str(scenes / "instances_train.json")], taught)
    aligned = plan.root / "models" / str(seed) / ALIGNED.name
    captioner = plan.root / "models" / "captioner"
    argv = ["train", "--stage", "instruct", "--data", f"described={taught}", "--model", str(aligned)]
    argv += [*_common(plan, seed, scenes / "images"), "--set", "stages.instruct.mixture=[{source: described}]"]
    _locvlm(plan, "captioner-train", argv, captioner)
    instances, captions = data / "scenes" / "instances_train.json", data / "captions.jsonl"
    about = ["--preset", "tiny", "--annotations", str(instances)]
    argv = ["caption", "--model", str(captioner), "--images", str(instances.parent / "images"), *about]
    _locvlm(plan, "captions", [*argv, "--max-new-tokens", "24", "--batch-size", "128"], captions)
    built = data / CAPTIONS.train_data
    _locvlm(plan, built.name, ["data", "localize-instruct", *about, "--captions", str(captions)], built)
    true = data / "described-train"
    _locvlm(plan, true.name, [*described, str(instances)], true)
    wanted = {one.id.rpartition("-")[2]: one.turns[0] for one in open_conversations(true)}
    said = {str(row["id"]): row["caption"] for row in read_jsonl(captions)}
    n_same = sum(said.get(key) == normalise_caption(turn.answer, turn.category) for key, turn in wanted.items())
    with atomic_write(plan.root / CAPTIONER) as file:
        json.dump({"seed": seed, "objects": len(wanted), "word for word": n_same}, file)


def _express(plan: Plan, trained: Trained, seed: int) -> Path:
    """What the arm said of regions, to be scored against what `locvlm data described` has of the same objects."""
    with plan.lock("described"):
        _make(plan, _described_steps(plan))
    told = {}
    for one in open_conversations(plan.root / "data" / "described-test"):
        turn = one.turns[0]
        told[one.image, turn.category] = normalise_caption(turn.answer, turn.category)
    rows = []
    for row in read_jsonl(plan.answers(trained.name, seed, "region-description")):
        row["reference"]["references"] = [told[row["image"], row["reference"]["category"]]]
        rows.append(row)
    against = plan.answers(trained.name, seed, EXPRESSIONS)
    write_jsonl(against, rows)
    return against


def _arm(plan: Plan, trained: Trained, seed: int) -> str:
    """Train and ask, unless the answers are there; score. Returns a line about it."""
    if not _has_answered(plan, trained, seed):
        _train_and_ask(plan, trained, seed)
    _score(plan, trained, seed)
    found = ((name, read_metrics(plan.metrics(trained.name, seed, name))) for name in trained.tasks)
    figures = (f"{name} {100 * values['figures'][values['primary']]['value']:.1f}" for name, values in found)
    return f"seed {seed}, {trained.name}: {', '.join(figures)}"


def _score(plan: Plan, trained: Trained, seed: int) -> None:
    """What `locvlm predict` has not scored. Answers carry their references: of a whole set those that were not asked
    would count as wrong. Raises LocVLMError where an arm that is asked for could not have METEOR."""
    answers = {name: (name, plan.answers(trained.name, seed, name)) for name in trained.tasks}
    if trained.name in EXPRESSED:
        answers[EXPRESSIONS] = ("region-description", _express(plan, trained, seed))
    argv = []
    for name, (task, path) in answers.items():
        output = plan.metrics(trained.name, seed, name)
        if not _has_figures(output, name):
            argv += ["--task", task, "--predictions", str(path), "--output", str(output)]
    if argv:
        _locvlm(plan, f"{seed}-{trained.name}-score", ["score", *argv, "--config", str(_places(plan, trained))])
    for name in answers:
        output = plan.metrics(trained.name, seed, name)
        if not _has_figures(output, name) and trained in plan.arms:
            reason = read_metrics(output).get("not_computed", {}).get("meteor", "no reason is told")
            raise LocVLMError(f"scoring {output}: there is no METEOR: {reason}")


def _has_figures(metrics: Path, name: str) -> bool:
    """Without Java `locvlm score` leaves METEOR out, which is all that expressions are scored for."""
    return metrics.is_file() and (name != EXPRESSIONS or "meteor" in read_metrics(metrics)["figures"])


def _places(plan: Plan, trained: Trained) -> Path:
    """A file with the arm's settings; `locvlm score` takes from it how it writes places."""
    path = plan.root / "configs" / f"{trained.name}.yaml"
    path.parent.mkdir(exist_ok=True)
    with atomic_write(path) as file:
        file.write(dump_config(preset("tiny", [*plan.overrides, *plan.settings(trained)])))
    return path


def _train(plan: Plan, trained: Trained, seed: int) -> None:
    """Its last stage."""
    model = plan.root / "models" / str(seed) / trained.name
    data = plan.root / "data"
    argv = ["train", "--stage", trained.stage, "--data", f"generic={data / trained.generic_data}"]
    if trained.arm.objectives:
        argv += ["--data", f"localize={data / trained.train_data}"]
    argv += _common(plan, seed, plan.root / trained.images)
    argv += [part for setting in plan.settings(trained) for part in ("--set", setting)]
    if trained.video:
        _train(plan, IMAGE_ARM, seed)
    elif trained.captioned:
        _caption(plan)
    argv += ["--model", str(model.parent / (IMAGE_ARM if trained.video else ALIGNED).name)]
    with plan.lock(f"{seed}-{trained.name}"):
        _locvlm(plan, f"{seed}-{trained.name}-train", argv, model)


def _train_and_ask(plan: Plan, trained: Trained, seed: int) -> None:
    if trained is not ALIGNED:
        _train(plan, trained, seed)
    model = plan.root / "models" / str(seed) / trained.name
    asking = ["predict", "--model", str(model), "--images", str(plan.root / trained.images)]
    asking += ["--limit", str(QUESTIONS)]
    for name, about in trained.tasks.items():
        asking += ["--task", name, "--data", str(plan.root / about)]
        asking += ["--output", str(plan.answers(trained.name, seed, name))]
    _locvlm(plan, f"{seed}-{trained.name}-predict", asking)


def _common(plan: Plan, seed: int, images: Path | None = None) -> list[str]:
    overrides = [part for override in (*plan.overrides, f"seed={seed}") for part in ("--set", override)]
    images = images or plan.root / IMAGE_ARM.images
    return ["--preset", "tiny", *overrides, "--images", str(images), "--workers", "0"]


def _locvlm(plan: Plan, name: str, argv: Sequence[str], output: Path | None = None) -> None:
    """Run a verb in a process of its own, on one core; with `output`, unless that is there. Raises LocVLMError with
    the verb's last words."""
    if output is not None and output.exists():
        return
    log = plan.root / "logs" / f"{name}.log"
    log.parent.mkdir(exist_ok=True)
    with open(log, "ab") as file:
        file.write(f"$ locvlm {argv[0]}\n".encode())
        file.flush()
        command = [sys.executable, "-m", "locvlm", *argv, *(["--output", str(output)] if output else [])]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, stdout=file, stderr=file, env=environment, check=False)
    if done.returncode:
        raise LocVLMError(f"{name} ended with exit code {done.returncode}: {last_words(log)} (its log: {log})")


def _is_finished(plan: Plan, trained: Trained, seed: int) -> bool:
    figures = [*trained.tasks, *([EXPRESSIONS] if trained.name in EXPRESSED else [])]
    return all(_has_figures(plan.metrics(trained.name, seed, task), task) for task in figures)


def _has_answered(plan: Plan, trained: Trained, seed: int) -> bool:
    return all(plan.answers(trained.name, seed, task).is_file() for task in trained.tasks)


def _tell(plan: Plan, n_done: int, n_before: int, began: float, news: str) -> None:
    """A line with what is finished and the time that is left, judged by the runs of this start."""
    total = len(plan.seeds) * len(plan.arms)
    left = ""
    if n_done > n_before:
        seconds = (time.monotonic() - began) / (n_done - n_before) * (total - n_done)
        left = f", {seconds / 60:.0f} min left"
    print(f"[{n_done}/{total}] {news or 'runs are finished'}{left}", flush=True)


def _pack(plan: Plan, output: Path) -> None:
    """The answers of all arms, the settings of each and the name of the run as one file, the same bytes for the same
    answers. Figures are left out: `locvlm score` gives them again, and they name folders of this machine."""

    def plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.uid = member.gid = member.mtime = 0
        member.uname = member.gname = ""
        return member

    paths = [*plan.root.glob(CAPTIONER)]
    for folder in sorted((plan.root / "predictions").glob("*")):
        whole = [arm for arm in MINIATURE if _has_answered(plan, arm, int(folder.name))]
        found = (plan.answers(arm.name, int(folder.name), task) for arm in whole for task in (*arm.tasks, EXPRESSIONS))
        paths += sorted(path for path in found if path.is_file())
    paths += sorted({_places(plan, arm) for arm in MINIATURE if any(path.parent.name == arm.name for path in paths)})
    with atomic_write(output, "wb") as file, tarfile.open(fileobj=file, mode="w:xz") as archive:
        told = {"run": plan.root.name, "arms": {arm.name: _identity(plan, arm) for arm in MINIATURE}}
        name = json.dumps(told).encode()
        member = tarfile.TarInfo(_RUN)
        member.size = len(name)
        archive.addfile(member, io.BytesIO(name))
        for path in paths:
            archive.add(path, path.relative_to(plan.root), filter=plain)


@contextmanager
def _opened(packed: Path) -> Iterator[tuple[tarfile.TarFile, dict[str, Any]]]:
    """A pack, and what it says of itself. Raises ConfigError for one that cannot be read."""
    try:
        with tarfile.open(packed) as archive:
            named = archive.extractfile(_RUN) if _RUN in archive.getnames() else None
            yield archive, json.loads(named.read()) if named else {}
    except (tarfile.TarError, lzma.LZMAError, EOFError, ValueError) as fault:
        raise ConfigError(f"continuing the paper in miniature: {packed} cannot be read: {fault}") from fault


def _unpack(plan: Plan, packed: Path) -> None:
    """Take the answers of this very run that are not here; those of an arm that has other settings now are left.
    Raises ConfigError where they are those of another run."""
    if not packed.is_file():
        raise ConfigError(f"continuing the paper in miniature: there is no {packed}; leave out --continue")
    with _opened(packed) as (archive, told):
        if told.get("run") != plan.root.name:
            raise ConfigError(
                f"continuing the paper in miniature: {packed} is of the run {told.get('run')}, this one is "
                f"{plan.root.name}: settings, foundation or numbers of scenes differ; give the same, or leave out "
                "--continue"
            )
        left = {one.name for one in archive if one.name.endswith(".jsonl") and _is_outdated(plan, one.name, told)}
        if left:
            names = ", ".join(sorted({Path(name).parent.name for name in left}))
            print(f"left: answers that were given under other settings than those of today: {names}", flush=True)
        with tempfile.TemporaryDirectory(dir=plan.root, prefix=".unpacked.") as folder:
            for one in archive:
                target = plan.root / one.name
                if one.name != _RUN and one.name not in left and not target.exists():
                    archive.extract(one, folder, filter="data")
                    target.parent.mkdir(parents=True, exist_ok=True)
                    (Path(folder) / one.name).rename(target)


if __name__ == "__main__":
    sys.exit(main())
