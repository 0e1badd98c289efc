"""The ablations of the paper's Tables 2, 11 and 12: arms that differ in one thing, everything else computed once.

Image arms train stage 2 from the same aligned model. They differ in how places are written (Table 2; Table 11, bounding
box or point), in the location objectives (Table 11, each added), or in pseudo-captions or category names (Table 11).
No arm is asked about sides in an image, and each takes as many steps where stages.instruct counts steps; where
it counts epochs, an arm with fewer conversations takes fewer. With videos each image arm goes on to a video stage that
tunes the adapter (its column ActivityNet-QA), and the video arms (Table 12) start from the full image arm, on few
frames, with location objectives about videos beside VideoInstruct.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kfp import dsl

from components.build_generic import build_generic
from components.build_localize_instruct import build_localize_instruct
from components.build_presence import build_presence
from components.build_spatial import build_spatial
from components.caption_objects import caption_objects
from components.fetch_data import fetch_data
from components.image import IMAGE
from components.report import report
from components.resolve_config import resolve_config
from workflows.image_pipeline import TASKS
from workflows.mixtures import LOCATION_SHARES, OBJECTIVES, arm_mixture, mixture
from workflows.steps import (
    CPU,
    DATA_CPU,
    DATA_MEMORY,
    MEMORY,
    MLFLOW_SECRET,
    STORAGE_SECRET,
    TIMEOUTS,
    Kind,
    Placement,
    Run,
)
from workflows.video_pipeline import INSTRUCT, build_video_data

NAME = "locvlm-ablation"


@dataclass(frozen=True, slots=True)
class Arm:
    """One row of the tables `tables` (see ABLATIONS in `locvlm.evaluation.arms`). `title`: begins names of metrics, for
    which MLflow takes letters, digits, spaces and none but a few marks. `places`: overrides of how places are
    written, for the data and the model; `captions`: the objects are named by pseudo-captions, else by their
    category."""

    name: str
    title: str
    tables: tuple[str, ...]
    objectives: tuple[str, ...] = OBJECTIVES
    places: tuple[str, ...] = ()
    captions: bool = True

    @property
    def mixture(self) -> str:
        """The override that gives stage 2 these objectives."""
        return arm_mixture(self.objectives)

    @property
    def labels(self) -> list[str]:
        """What tells the report its rows."""
        told = [f"{self.title} tables={','.join(self.tables)}"]
        return told + ([f"{self.title} pseudo_data={'yes' if self.captions else 'no'}"] if self.objectives else [])

    def data(self, split: str) -> str:
        """The name of its Localize-Instruct set; arms that need the same one share it."""
        written = "-".join(place.rpartition("=")[2] for place in self.places)
        parts = ("localize", split, written, "names" if split == "train" and not self.captions else "")
        return "-".join(part for part in parts if part)


@dataclass(frozen=True, slots=True)
class VideoArm:
    """One row of Table 12."""

    name: str
    title: str
    objectives: tuple[str, ...] = OBJECTIVES

    @property
    def mixture(self) -> str:
        """The override that gives stage 3 these objectives beside VideoInstruct."""
        shares = [("instructions", "", sum(LOCATION_SHARES.values()))]
        shares += [("activitynet", objective, LOCATION_SHARES[objective]) for objective in self.objectives]
        return f"stages.video.mixture={mixture(shares)}"


FULL = Arm("full", "full model", ("2", "11-objectives", "11-data"))
ARMS = (
    FULL,
    Arm("nfp", "NFP", ("2",), places=("coordinates.representation=nfp",)),
    Arm("diga", "DIGA", ("2",), places=("coordinates.representation=diga",)),
    Arm("none", "no location objective", ("11-objectives",), ()),
    Arm("loc", "LocPred", ("11-objectives",), OBJECTIVES[:1]),
    Arm("loc-neg", "LocPred and NegPred", ("11-objectives",), OBJECTIVES[:2]),
    Arm("point", "points", ("11-data",), places=("coordinates.location=point",)),
    Arm("names", "category names", ("11-data",), captions=False),
)
VIDEO_ARMS = (
    VideoArm("video-full", "video: all objectives"),
    VideoArm("video-none", "video: no location objective", ()),
    VideoArm("video-loc", "video: LocPred", OBJECTIVES[:1]),
    VideoArm("video-loc-neg", "video: LocPred and NegPred", OBJECTIVES[:2]),
)
VIDEO_ARM_SETTINGS = ("video.n_frames=8", "stages.video.trainable=[adapter, language]")  # LocVLM-Vid-B+


def make_pipeline(
    retries: int = 1,
    timeouts: Mapping[Kind, int] = TIMEOUTS,
    arms: Sequence[Arm] = ARMS,
    video_arms: Sequence[VideoArm] = VIDEO_ARMS,
) -> Any:
    """The pipeline with these arms; the first is what the report compares the others with. Without `video_arms` there
    is no video in it at all. Video arms need the arm FULL."""

    def ablation_pipeline(
        root: str,
        data_root: str,
        images: str,
        videos: str = "",
        panoptic: str = "",
        segmenter: str = "",
        video_instructions: str = "",
        captions: str = "",
        object_captions: str = "",
        captioner: str = "",
        benchmarks: list[dict[str, str]] = [],  # noqa: B006 - kfp reads the default, nobody changes it
        video_benchmarks: list[dict[str, str]] = [],  # noqa: B006
        preset: str = "locvlm-vid-b",
        overrides: list[str] = [],  # noqa: B006
        seed: int = 0,
        n_test: int = 0,
        runner: str = "kuberay",
        data_md5: str = "",
        dvc_remote: str = "",
        code_version: str = "",
        cpu: str = CPU,
        memory: str = MEMORY,
        data_cpu: str = DATA_CPU,
        data_memory: str = DATA_MEMORY,
        node_selector: dict[str, str] = {},  # noqa: B006
        tolerations: list[dict[str, str]] = [],  # noqa: B006
        storage_secret: str = STORAGE_SECRET,
        mlflow_secret: str = MLFLOW_SECRET,
    ) -> None:
        """Coordinates, objectives, location type, pseudo-data and video objectives: Tables 2, 11 and 12.

        `object_captions`: pseudo-captions that are ready; else `captioner` makes them (default: the aligned model).
        `benchmarks`: [{"task", "data", "images", "split", "annotations", "judge"}], such as GQA and RefCOCOg;
        `video_benchmarks` alike, such as ActivityNet-QA.
        """
        place = Placement(
            cpu,
            memory,
            data_cpu,
            data_memory,
            node_selector,
            tolerations,
            storage_secret,
            mlflow_secret,
            retries,
            timeouts,
        )
        run = Run(root, images, runner, code_version, place)
        begun = run.begin({"pipeline": NAME, "preset": preset})
        resolved = place.step(
            resolve_config(root=root, preset=preset, overrides=overrides, seed=seed, code_version=code_version),
            "resolve the configuration",
        ).after(begun)
        config = resolved.outputs["Output"]
        looked = place.step(
            fetch_data(root=root, data_root=data_root, images=images, data_md5=data_md5, dvc_remote=dvc_remote),
            "check the data",
            "data",
            cached=False,
        ).after(begun)
        fetched = looked.outputs["Output"]
        keys = {"config": config, "data_md5": fetched, "code_version": code_version}
        common = {"root": root, "data_root": data_root, **keys}
        generic = place.step(build_generic(captions=captions, **common), "build generic questions", "data").outputs[
            "Output"
        ]
        questions = [
            place.step(build_spatial(**common), "build COCO-Spatial", "data").outputs["Output"],
            place.step(build_presence(**common), "build presence questions", "data").outputs["Output"],
        ]
        align = run.train("align", "align", ["generic=generic"], [config, generic], title="train: align")
        localize = _localize(run, arms, common, keys, align, captioner, object_captions)
        scored, trained = {}, {}
        for arm in arms:
            own = localize[arm.data("train")] if arm.objectives else []
            sources = ["generic=generic", *([f"localize={arm.data('train')}"] if arm.objectives else [])]
            inputs = [config, align, generic, *([own] if arm.objectives else [])]
            changes = (*arm.places, arm.mixture)
            trained[arm.name] = run.train(arm.name, "instruct", sources, inputs, "align", changes)
            tasks = [task.replace("localize-test", arm.data("test")) for task in TASKS]
            asked = [trained[arm.name], *questions, localize[arm.data("test")]]
            scored[arm.name] = run.evaluate(arm.name, tasks, n_test, asked, benchmarks)
        rows = {arm.title: [arm.name] for arm in arms}  # title -> the models whose figures stand in it
        labels = [label for arm in arms for label in arm.labels]
        stages = {"all align": "align", **{f"{arm.title} instruct": arm.name for arm in arms}}
        if video_arms:
            made = build_video_data(run, videos, panoptic, segmenter, video_instructions, keys)
            for base in arms:
                name, changes = f"{base.name}-video", (*base.places, "stages.video.mixture=[]")
                inputs = [config, trained[base.name], made["instructions"]]
                tuned = run.train(name, "video", [INSTRUCT], inputs, base.name, changes, [videos])
                scored[name] = run.evaluate(name, [], n_test, [tuned], video_benchmarks)
                rows[base.title].append(name)
                stages[f"{base.title} video"] = name
            for row in video_arms:
                changes = (*VIDEO_ARM_SETTINGS, row.mixture)
                sources = [INSTRUCT, *(["activitynet=localize-activitynet"] if row.objectives else [])]
                inputs = [config, trained[FULL.name], *made.values()]
                tuned = run.train(row.name, "video", sources, inputs, FULL.name, changes, [videos])
                scored[row.name] = run.evaluate(row.name, [], n_test, [tuned], video_benchmarks)
                rows[row.title] = [row.name]
                labels.append(f"{row.title} tables=12")
                stages[f"{row.title} video"] = row.name
        place.step(
            report(
                root=root,
                arms=[f"{title}={','.join(names)}" for title, names in rows.items()],
                labels=labels,
                curves=[f"{title}={name}" for title, name in stages.items()],
                images=images,
                inputs=list(scored.values()),
                code_version=code_version,
            ),
            "report",
            cached=False,
        )

    return dsl.pipeline(ablation_pipeline, name=NAME)


def _localize(
    run: Run,
    arms: Sequence[Arm],
    common: Mapping[str, Any],
    keys: Mapping[str, Any],
    align: Any,
    captioner: Any,
    ready: Any,
) -> dict[str, Any]:
    """Every Localize-Instruct set that an arm needs, each built once: name -> fingerprint."""
    captions = ""
    if any(arm.captions and arm.objectives for arm in arms):
        task = caption_objects(
            root=run.root,
            data_root=common["data_root"],
            images=run.images,
            captioner=captioner,
            ready=ready,
            runner=run.runner,
            image=IMAGE,
            inputs=[align],
            data_md5=keys["data_md5"],
            code_version=run.code_version,
        )
        captions = run.place.step(task, "caption the objects", "job").outputs["Output"]
    built: dict[str, Any] = {}
    for arm in arms:
        for split in ("train", "test"):
            name = arm.data(split)
            if name in built or (split == "train" and not arm.objectives):
                continue
            task = build_localize_instruct(
                split=split,
                name=name,
                captions=captions if split == "train" and arm.captions else "",
                overrides=list(arm.places),
                **common,
            )
            built[name] = run.place.step(task, f"build {name}", "data").outputs["Output"]
    return built
