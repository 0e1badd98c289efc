"""`python -m workflows.paper`: the paper in miniature, on drawn scenes and the tiny preset; what `make paper` does.

Every arm starts from the same aligned model of its seed and takes equally many steps of equally many questions. No arm
but `direct` is asked about sides in an image; all others have the same share of questions about sides in scenes stated
in words. What the location objectives do not take, captions and presence questions fill. All questions that are asked
in the end are about scenes of a test split that nothing was chosen on. Finished steps are kept: started again, it goes
on. Where that was on another machine, the answers packed beside the page do (`--continue`).
"""

import argparse
import io
import json
import lzma
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Lock

from locvlm.cli.steps import last_words
from locvlm.config import ExperimentConfig, dump_config
from locvlm.data.captions import normalise_caption
from locvlm.data.conversations import open_conversations
from locvlm.errors import ConfigError, LocVLMError
from locvlm.evaluation.score import read_metrics
from locvlm.evaluation.verdicts import Contrast, Verdict, contrast, overall
from locvlm.model.checkpoint import TINY_FOUNDATION
from locvlm.presets import preset
from locvlm.records import atomic_write, fingerprint, read_json, read_jsonl, write_jsonl
from locvlm.training.foundation import RECIPE
from workflows.ablation_pipeline import ARMS, FULL, Arm
from workflows.mixtures import STATED_SHARE, arm_mixture, mixture
from workflows.provenance import run_name

STEPS = 500  # of stage 2
N_TRAIN, N_TEST = 8000, 1000  # scenes
SCENES_SEED = 20240617  # no other run of the project draws it
CAPTIONER_SEED, CLIPS_SEED = 20240620, 20240621  # nor one of these
VIDEO_STEPS = 150  # of stage 3, or as many as of stage 2 where those are fewer
VIDEO_SETTINGS = (
    "video={n_frames: 4}",
    "stages.video={trainable: [adapter, language], learning_rate: 0.001, warmup_ratio: 0.1, betas: [0.9, 0.98], "
    "global_batch: 32, conversations_per_image: 8, precision: bf16, steps: %d}",
)
QUESTIONS = 1000  # of a task
GATE = 0.9
_RUN = "run.json"  # in the packed answers
_CAPTIONER = "captioner.json"  # how well it describes; packed too

HORIZONTAL, VERTICAL = "left-right", "above-below"
STATED = {HORIZONTAL: "stated_left_right", VERTICAL: "stated_above_below"}
# task of an arm: (task, what it asks about)
TASKS = {
    "coco-spatial": "questions/{axis}",
    "presence": "questions/presence",
    "localization": "data/{localize}",
    "region-description": "data/{localize}",
}
CLIP_TASKS = {
    "coco-spatial": "questions/clips-left-right",
    "presence": "questions/clips-presence",
    "localization": "data/clips-localize-test",
}


@dataclass(frozen=True, slots=True)
class Trained:
    """An arm of the ablations that is asked about one axis, in words in training. `shares`: of stage 2, where they are
    not those of `arm`; `captioned`: objects are named by pseudo-captions, else by their category; `video`: it is the
    full image arm after a video stage with these objectives."""

    arm: Arm
    axis: str = HORIZONTAL
    shares: tuple[tuple[str, str, float], ...] = ()
    captioned: bool = False
    video: bool = False

    @property
    def name(self) -> str:
        """Of its folders."""
        return self.arm.name + ("" if self.axis == HORIZONTAL else "-vertical")

    @property
    def mixture(self) -> str:
        """The override for its last stage: shares that add up to 1."""
        if self.shares:
            return f"stages.{self.stage}.mixture={mixture(self.shares)}"
        return arm_mixture(self.arm.objectives, STATED[self.axis], self.stage)

    @property
    def stage(self) -> str:
        """The last one."""
        return "video" if self.video else "instruct"

    @property
    def generic_data(self) -> str:
        """The name of its generic set."""
        return "clips-generic" if self.video else "generic"

    @property
    def train_data(self) -> str:
        """The name of its Localize-Instruct set."""
        if self.video:
            return "clips-localize-train"
        return self.arm.data("train") + ("-captions" if self.captioned else "")

    @property
    def images(self) -> str:
        """What it is shown, below the run's folder."""
        return "data/clips/videos" if self.video else "data/scenes/images"

    @property
    def tasks(self) -> dict[str, str]:
        """Task -> what it asks about, below the run's folder. Of the second axis its own questions alone."""
        if self.video:
            return CLIP_TASKS
        names = list(TASKS) if self.axis == HORIZONTAL else ["coco-spatial"]
        return {name: TASKS[name].format(axis=self.axis, localize=self.arm.data("test")) for name in names}


_BY_NAME = {arm.name: arm for arm in ARMS}
_NONE = _BY_NAME["none"]
# the evaluated questions themselves, in bulk: what is learnable here at all
DIRECT = Trained(
    Arm("direct", "direct supervision", ()),
    shares=(
        ("generic", "presence", 0.10),
        ("generic", "left_right", 0.20),
        ("localize", "loc_pred", 0.25),
        ("localize", "rev_loc", 0.45),
    ),
)
# asked without stage 2: what every arm starts from
ALIGNED = Trained(Arm("align", "before stage 2", ()))
CAPTIONS = Trained(Arm("captions", "pseudo-captions", ()), captioned=True)
IMAGE_ARM = Trained(FULL)
MINIATURE = (
    IMAGE_ARM,
    Trained(_NONE),
    ALIGNED,
    DIRECT,
    Trained(FULL, VERTICAL),
    Trained(_NONE, VERTICAL),
    *(Trained(_BY_NAME[name]) for name in ("loc", "loc-neg", "nfp", "diga", "point")),
    CAPTIONS,
    Trained(Arm("video-full", "video: all objectives", ()), video=True),
    Trained(Arm("video-none", "video: no location objective", (), ()), video=True),
)


@dataclass(frozen=True, slots=True)
class Claim:
    """One claim: of each contrast the arm said to be better, the other one, the task, its figure, and words for it."""

    letter: str
    text: str
    tables: str
    contrasts: tuple[tuple[str, str, str, str, str], ...]


EXPRESSIONS = "expressions"  # the answers of region-description against descriptions; of the arms of claim c
_SIDE, _PRESENCE, _WHERE = ("coco-spatial", "accuracy"), ("presence", "accuracy"), ("localization", "mean_iou")
CLAIMS = (
    Claim(
        "a",
        "LocPred, NegPred and RevLoc raise spatial reasoning",
        "4",
        (
            ("full", "none", *_SIDE, "left or right, accuracy"),
            ("full-vertical", "none-vertical", *_SIDE, "above or below, accuracy"),
        ),
    ),
    Claim(
        "b",
        "NegPred lowers hallucination",
        "8, 9",
        (
            ("loc-neg", "loc", *_PRESENCE, "presence, accuracy"),
            ("loc-neg", "loc", "localization", "neg_f1", "objects that are not there, F1 of denying them"),
        ),
    ),
    Claim(
        "c",
        "pseudo-captions lift region description",
        "11",
        (("captions", "full", EXPRESSIONS, "meteor", "METEOR against what an object is told by"),),
    ),
    Claim(
        "d",
        "integer-valued binning against the other ways to write a place",
        "2",
        (
            ("full", "nfp", *_SIDE, "against NFP: left or right, accuracy"),
            ("full", "nfp", *_WHERE, "against NFP: LocPred, mean IoU"),
            ("full", "diga", *_SIDE, "against DIGA: left or right, accuracy"),
            ("full", "diga", *_WHERE, "against DIGA: LocPred, mean IoU"),
        ),
    ),
    Claim(
        "e",
        "each objective adds",
        "11",
        (
            ("loc", "none", *_SIDE, "LocPred added: left or right, accuracy"),
            ("loc-neg", "loc", *_SIDE, "NegPred added: left or right, accuracy"),
            ("full", "loc-neg", *_SIDE, "RevLoc added: left or right, accuracy"),
        ),
    ),
    Claim(
        "f",
        "boxes against points",
        "11",
        (("full", "point", *_SIDE, "left or right, accuracy"),),
    ),
    Claim(
        "g",
        "video objectives help",
        "12",
        (
            ("video-full", "video-none", *_SIDE, "clips: left or right, accuracy"),
            ("video-full", "video-none", *_PRESENCE, "clips: presence, accuracy"),
        ),
    ),
)


_EXPRESSED = {name for claim in CLAIMS for one in claim.contrasts if one[2] == EXPRESSIONS for name in one[:2]}


@dataclass(slots=True)
class Plan:
    """Where everything is, and how it is made."""

    root: Path
    config: ExperimentConfig
    overrides: list[str]
    seeds: list[int]
    arms: list[Trained]
    scenes: Sequence[int]  # to train on, to ask about
    jobs: int
    _locks: dict[str, Lock] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock)

    def lock(self, name: str) -> Lock:
        """What two arms need is made once."""
        with self._lock:
            return self._locks.setdefault(name, Lock())

    @property
    def video_settings(self) -> tuple[str, str]:
        """Overrides for stage 3."""
        return VIDEO_SETTINGS[0], VIDEO_SETTINGS[1] % self.video_steps

    @property
    def video_steps(self) -> int:
        """Of stage 3."""
        stage = self.config.stages.instruct
        assert stage is not None
        return min(stage.steps or VIDEO_STEPS, VIDEO_STEPS)

    def metrics(self, arm: str, seed: int, task: str) -> Path:
        """The figures of one task."""
        return self.root / "predictions" / str(seed) / arm / f"{task}.metrics.json"

    def answers(self, arm: str, seed: int, task: str) -> Path:
        """What those are computed from."""
        return self.root / "predictions" / str(seed) / arm / f"{task}.jsonl"


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is not finished and write the page; returns the exit code (2: the user can fix it, 130: stopped)."""
    args = _parser().parse_args(argv)
    try:
        plan = _plan(args)
        print(f"run folder: {plan.root}", flush=True)
        answers = args.output.with_suffix(".answers.tar.xz")
        if args.go_on:
            _unpack(plan, answers)
        if not args.only_report:
            _run(plan)
        with atomic_write(args.output) as file:
            file.write(page(plan))
        _pack(plan, answers)
        print(f"wrote {args.output} and {answers}", flush=True)
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
    parts = [config.fingerprint(), fingerprint(_foundation(config)), *args.scenes]
    arms = [arm for arm in MINIATURE if arm.name in args.arms]
    root = args.runs.absolute() / run_name("paper", parts)
    return Plan(root, config, overrides, args.seeds, arms, args.scenes, args.jobs)


def _foundation(config: ExperimentConfig) -> Path:
    named = config.model.foundation
    folder = TINY_FOUNDATION if named == "tiny" else Path(named)
    if not named or not (folder / RECIPE).is_file():
        raise ConfigError(
            f"running the paper in miniature: model.foundation is {named!r}, where there is no {RECIPE}; needed is a "
            "folder that `locvlm foundation` made, or leave that setting out"
        )
    return folder


def _run(plan: Plan) -> None:
    plan.root.mkdir(parents=True, exist_ok=True)
    todo = list(_data_steps(plan))
    for name, argv, output in todo:
        _locvlm(plan, name, argv if argv[1] == "scenes" else [*argv, "--preset", "tiny"], output)
    chains = [(arm, seed) for arm in plan.arms for seed in plan.seeds if not _is_finished(plan, arm, seed)]
    training = [(arm, seed) for arm, seed in chains if not _has_answered(plan, arm, seed)]
    seeds = sorted({seed for _, seed in training})
    with ThreadPoolExecutor(plan.jobs) as pool:
        list(pool.map(partial(_align, plan), seeds))
    n_done = len(plan.seeds) * len(plan.arms) - len(chains)
    began, n_before = time.monotonic(), n_done
    _tell(plan, n_done, n_before, began, "")
    with ThreadPoolExecutor(plan.jobs) as pool:
        if any(arm.captioned for arm, _ in training):  # first, so that its arms need not wait
            pool.submit(_caption, plan)
        running: set[Future[str]] = {pool.submit(_arm, plan, arm, seed) for arm, seed in chains}
        try:
            while running:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    n_done += 1
                    _tell(plan, n_done, n_before, began, future.result())
        except BaseException:
            for future in running:
                future.cancel()
            raise


def _data_steps(plan: Plan) -> Iterator[tuple[str, list[str], Path]]:
    """Name, verb and output of everything that arms share."""
    data, questions = plan.root / "data", plan.root / "questions"
    scenes = data / "scenes"
    sizes = ["--n-train", str(plan.scenes[0]), "--n-test", str(plan.scenes[1]), "--shards"]
    yield "scenes", ["data", "scenes", "--seed", str(SCENES_SEED), *sizes], scenes
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
    yield "described", ["data", "described", *test], data / "described-test"
    if any(arm.video for arm in plan.arms):
        yield from _clip_steps(plan)


def _clip_steps(plan: Plan) -> Iterator[tuple[str, list[str], Path]]:
    data, clips = plan.root / "data", plan.root / "data" / "clips"
    sizes = ["--n-train", str(plan.scenes[0]), "--n-test", str(plan.scenes[1])]
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


def _caption(plan: Plan) -> None:
    """Teach a captioner on scenes of its own, from the aligned model of the first seed; let it describe the objects of
    the training scenes, and build what the arm with pseudo-captions is trained on."""
    with plan.lock("captioner"):
        if not (plan.root / _CAPTIONER).is_file():
            _teach_and_caption(plan, plan.seeds[0])


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
    with atomic_write(plan.root / _CAPTIONER) as file:
        json.dump({"objects": len(wanted), "word for word": n_same}, file)


def _express(plan: Plan, trained: Trained, seed: int) -> Path:
    """What the arm said of regions, to be scored against what `locvlm data described` has of the same objects."""
    told = {}
    for one in open_conversations(plan.root / "data" / "described-test"):
        turn = one.turns[0]
        told[one.image, turn.category] = normalise_caption(turn.answer, turn.category)
    rows = []
    for row in read_jsonl(plan.answers(trained.name, seed, "region-description")):
        row["reference"]["references"] = [told[row["image"], row["reference"]["category"]]]
        rows.append(row)
    against = plan.root / EXPRESSIONS / str(seed) / f"{trained.name}.jsonl"
    against.parent.mkdir(parents=True, exist_ok=True)
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
    would count as wrong."""
    answers = {name: (name, plan.answers(trained.name, seed, name)) for name in trained.tasks}
    if trained.name in _EXPRESSED:
        answers[EXPRESSIONS] = ("region-description", _express(plan, trained, seed))
    argv = []
    for name, (task, path) in answers.items():
        output = plan.metrics(trained.name, seed, name)
        if not output.is_file():
            argv += ["--task", task, "--predictions", str(path), "--output", str(output)]
    if argv:
        _locvlm(plan, f"{seed}-{trained.name}-score", ["score", *argv, "--config", str(_places(plan, trained))])


def _places(plan: Plan, trained: Trained) -> Path:
    """A file that says how the arm writes places."""
    path = plan.root / "configs" / f"{trained.name}.yaml"
    path.parent.mkdir(exist_ok=True)
    with atomic_write(path) as file:
        file.write(dump_config(preset("tiny", [*plan.overrides, *trained.arm.places])))
    return path


def _train(plan: Plan, trained: Trained, seed: int) -> None:
    """Its last stage."""
    model = plan.root / "models" / str(seed) / trained.name
    data = plan.root / "data"
    argv = ["train", "--stage", trained.stage, "--data", f"generic={data / trained.generic_data}"]
    if trained.arm.objectives:
        argv += ["--data", f"localize={data / trained.train_data}"]
    settings = [*trained.arm.places, *plan.video_settings] if trained.video else [*trained.arm.places]
    argv += _common(plan, seed, plan.root / trained.images)
    argv += [part for setting in (*settings, trained.mixture) for part in ("--set", setting)]
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
    figures = [*trained.tasks, *([EXPRESSIONS] if trained.name in _EXPRESSED else [])]
    return all(plan.metrics(trained.name, seed, task).is_file() for task in figures)


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
    """The answers of all arms and the name of the run as one file, the same bytes for the same answers. Figures are
    left out: `locvlm score` gives them again, and they name folders of this machine."""

    def plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.uid = member.gid = member.mtime = 0
        member.uname = member.gname = ""
        return member

    with atomic_write(output, "wb") as file, tarfile.open(fileobj=file, mode="w:xz") as archive:
        name = json.dumps({"run": plan.root.name}).encode()
        member = tarfile.TarInfo(_RUN)
        member.size = len(name)
        archive.addfile(member, io.BytesIO(name))
        for path in [*plan.root.glob(_CAPTIONER), *sorted((plan.root / "predictions").rglob("*.jsonl"))]:
            archive.add(path, path.relative_to(plan.root), filter=plain)


def _unpack(plan: Plan, packed: Path) -> None:
    """Take the answers of this very run that are not here. Raises ConfigError where they are those of another."""
    if not packed.is_file():
        raise ConfigError(f"continuing the paper in miniature: there is no {packed}; leave out --continue")
    try:
        with tarfile.open(packed) as archive:
            named = archive.extractfile(_RUN) if _RUN in archive.getnames() else None
            run = json.loads(named.read())["run"] if named else "one without a name"
            if run == plan.root.name:
                missing = [one for one in archive if one.name != _RUN and not (plan.root / one.name).exists()]
                archive.extractall(plan.root, missing, filter="data")
    except (tarfile.TarError, lzma.LZMAError, EOFError) as fault:
        raise ConfigError(f"continuing the paper in miniature: {packed} cannot be read: {fault}") from fault
    if run != plan.root.name:
        raise ConfigError(
            f"continuing the paper in miniature: {packed} is of the run {run}, this one is {plan.root.name}: "
            "settings, foundation or numbers of scenes differ; give the same, or leave out --continue"
        )


def page(plan: Plan) -> str:
    """The page: what was run, the gates, each claim with its verdict, the figures behind it, and all arms."""
    sections = [_head(plan), _gates(plan)]
    rows = ["## Claims", "", "| | claim | paper's table | verdict | of each figure |", "|---|---|---|---|---|"]
    details = []
    for claim in CLAIMS:
        found = [(words, _contrast(plan, *names)) for *names, words in claim.contrasts]
        verdicts = [_verdict(one) for _, one in found]
        each = "; ".join(f"{words}: {verdict}" for (words, _), verdict in zip(found, verdicts, strict=True))
        rows.append(f"| {claim.letter} | {claim.text} | {claim.tables} | **{overall(verdicts)}** | {each} |")
        details += _details(claim, found)
        if any(task == EXPRESSIONS for _, _, task, _, _ in claim.contrasts):
            details.append(_told(plan))
    sections += ["\n".join(rows), "\n".join(details), _arms(plan)]
    return "\n\n".join(sections) + "\n"


def _head(plan: Plan) -> str:
    stage = plan.config.stages.instruct
    assert stage is not None
    return f"""# The paper in miniature

Written by `make paper`; do not edit. Drawn scenes ({plan.scenes[0]} to train on, {plan.scenes[1]} to ask about, drawn
for this page alone), the tiny preset, {len(plan.seeds)} seeds ({", ".join(map(str, plan.seeds))}). Stage 1 and stage 2
from the same foundation, the one that the package ships (`make foundation` makes it again), whose lessons had scenes
and words of their own; stage 2 takes {stage.steps} steps of
{stage.global_batch} images with {stage.conversations_per_image} questions each in every arm. No arm but `direct`
is asked about sides in an image; {100 * STATED_SHARE:.0f} % of the questions of the others are about sides in scenes
stated in words, of other names, so that the language model does not forget them. Where an arm lacks a location
objective, captions and presence questions have its share. `align` is the model that all of
them start from. Arms take equally many questions, not tokens: a place costs more tokens than a yes.
Video arms are the full arm of their seed after {plan.video_steps} steps on drawn clips of 8 frames, in which some
things move; they see 4 of the frames, and are asked about other clips.

A claim is *shown* when the 95 % interval of the difference over the seeds (Student's, a seed is one observation) lies
above 0 in every figure named, and the better arm is above the floor, the best answer that never looks at the image;
*shown in part* when it does in some; *contrary* when it lies below 0 in one of them; else *not shown*. Percent; the
answers lie in `runs/*/predictions/<seed>/<arm>/`, and packed beside this page; `locvlm score` computes every figure of
an arm from them again."""


def _gates(plan: Plan) -> str:
    rows = ["## Gates", "", "| gate | figure | wanted | passed |", "|---|---|---|---|"]
    rows += _gates_of_the_foundation(_foundation(plan.config))
    gates = [
        ("left or right, asked directly in training", "coco-spatial", "accuracy"),
        ("presence, asked directly in training", "presence", "accuracy"),
        ("LocPred, centre in box", "localization", "centre_in_box"),
        ("RevLoc, names the object there", "region-description", "names_category"),
    ]
    for words, task, figure in gates:
        values = _values(plan, DIRECT.name, task, figure)
        if values is None:
            rows.append(f"| {words} | not run | {100 * GATE:.0f} | |")
            continue
        mean = sum(values) / len(values)
        rows.append(f"| {words} | {_each(values)} | {100 * GATE:.0f} | {'yes' if mean >= GATE else 'no'} |")
    return "\n".join(rows)


def _gates_of_the_foundation(folder: Path) -> list[str]:
    """What it could do before stage 1, as its recipe has it."""
    figures = read_json(folder / RECIPE).get("figures", {})
    gates = [
        ("foundation: the tower tells what a patch shows", "tower", "category"),
        ("foundation: the tower tells the column of what a patch shows (of 12)", "tower", "column"),
        ("foundation: the tower tells the row of what a patch shows (of 12)", "tower", "row"),
        ("foundation: presence in stated scenes, names held out", "reading", "presence"),
        ("foundation: left or right in stated scenes, names held out", "reading", "side"),
        ("foundation: above or below in stated scenes, names held out", "reading", "height"),
        ("foundation: presence in the words of the evaluation", "reading", "presence_in_full"),
        ("foundation: left or right likewise", "reading", "side_in_full"),
        ("foundation: presence in scenes of soft tokens, in the words of the evaluation", "soft", "presence_in_full"),
        ("foundation: left or right likewise", "soft", "side_in_full"),
        ("foundation: the column of a name in them, asked and answered in any words", "soft", "told"),
    ]
    rows = []
    for words, lesson, name in gates:
        value = figures.get(lesson, {}).get(name)
        found = "not known" if value is None else f"{100 * value:.1f}"
        passed = "" if value is None else "yes" if value >= GATE else "no"
        rows.append(f"| {words} | {found} | {100 * GATE:.0f} | {passed} |")
    return rows


def _details(claim: Claim, found: Sequence[tuple[str, Contrast | None]]) -> list[str]:
    lines = [f"### {claim.letter}: {claim.text}", ""]
    lines += ["| figure | arm | other arm | difference (95 %) | floor | verdict |", "|---|---|---|---|---|---|"]
    for (better, other, _, _, words), (_, one) in zip(claim.contrasts, found, strict=True):
        if one is None:
            lines.append(f"| {words} | {better} | {other} | | | not run |")
            continue
        between = "" if one.low is None or one.high is None else f" ({100 * one.low:+.1f} to {100 * one.high:+.1f})"
        floor = "" if one.floor is None else f"{100 * one.floor:.1f}"
        sides = (f"{name} {100 * spread.mean:.1f}" for name, spread in ((better, one.better), (other, one.other)))
        difference = f"{100 * one.difference:+.1f}{between}"
        lines.append(f"| {words} | {' | '.join(sides)} | {difference} | {floor} | {one.verdict} |")
    return [*lines, ""]


def _told(plan: Plan) -> str:
    """How well the captioner did, where there was one."""
    path = plan.root / _CAPTIONER
    if not path.is_file():
        return ""
    found = read_json(path)
    share = 100 * found["word for word"] / found["objects"]
    return f"""The captioner is the aligned model of the first seed after stage 2 on descriptions of {plan.scenes[0]}
other scenes (`locvlm data described`: "The tent is located to the left of book."), taken from their annotations.
Of the {found["objects"]} objects of the training scenes it describes {share:.1f} % as the annotations do, word by word.
What the answers are scored against are such descriptions of the test scenes: the arm with captions is taught their
form, the other one is not.
"""


def _arms(plan: Plan) -> str:
    names = ["left or right", "presence", "LocPred IoU", "NegPred F1", "RevLoc"]
    figures = [
        _SIDE,
        _PRESENCE,
        _WHERE,
        ("localization", "neg_f1"),
        ("region-description", "names_category"),
    ]
    lines = ["## All arms, a figure a seed", "", f"| arm | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for trained in MINIATURE:
        cells = [_values(plan, trained.name, *figure) for figure in figures]
        if any(cells):
            lines.append(f"| {trained.name} | {' | '.join(_each(values) if values else '' for values in cells)} |")
    return "\n".join(lines)


def _contrast(plan: Plan, better: str, other: str, task: str, figure: str) -> Contrast | None:
    """None where one of the arms is not finished for every seed."""
    values = [_values(plan, name, task, figure) for name in (better, other)]
    if values[0] is None or values[1] is None:
        return None
    floor = read_metrics(plan.metrics(better, plan.seeds[0], task))["figures"][figure]["floor"]
    return contrast(values[0], values[1], floor)


def _values(plan: Plan, name: str, task: str, figure: str) -> list[float] | None:
    """A figure of an arm, seed by seed."""
    paths = [plan.metrics(name, seed, task) for seed in plan.seeds]
    if not all(path.is_file() for path in paths):
        return None
    return [float(read_metrics(path)["figures"][figure]["value"]) for path in paths]


def _verdict(found: Contrast | None) -> Verdict:
    return "not run" if found is None else found.verdict


def _each(values: Sequence[float]) -> str:
    return ", ".join(f"{100 * value:.1f}" for value in values)


if __name__ == "__main__":
    sys.exit(main())
