"""The video pipeline: the image stages, objects of videos and what they are asked, the video stage, its evaluation.

Frames of the videos are segmented (or ready panoptic labels are read) into Pseudo-ActNet; the objects that stay in
place become Localize-ActivityNet, which stage 3 sees beside VideoInstruct. Evaluation asks Hal-Act about other videos,
and the video QA benchmarks that are given.
"""

from collections.abc import Mapping
from typing import Any

from kfp import dsl

from components.build_generic import build_generic
from components.build_localize_instruct import build_localize_instruct
from components.build_video_presence import build_video_presence
from components.fetch_data import fetch_data
from components.image import IMAGE
from components.localize_activitynet import localize_activitynet
from components.pseudo_actnet import pseudo_actnet
from components.report import report
from components.resolve_config import resolve_config
from components.video_features import video_features
from components.video_instruct import video_instruct
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

NAME = "locvlm-video"
INSTRUCT = "instructions=video-instruct"  # source of the mixture = folder in <root>/data
TASKS = ["presence=questions/hal-act"]
# a video model answers other questions than the image gate asks about; ActivityNet-QA's may be set beside it
GATE = "gate.primary=presence/accuracy"


def make_pipeline(retries: int = 1, timeouts: Mapping[Kind, int] = TIMEOUTS) -> Any:
    """The pipeline; `retries`: of the steps that train or ask a model."""

    def video_pipeline(
        root: str,
        data_root: str,
        images: str,
        videos: str,
        test_videos: str,
        video_instructions: str,
        panoptic: str = "",
        test_panoptic: str = "",
        segmenter: str = "",
        weights: str = "",
        features: bool = False,
        benchmarks: list[dict[str, str]] = [],  # noqa: B006 - kfp reads the default, nobody changes it
        captions: str = "",
        object_captions: str = "",
        preset: str = "locvlm-vid-b-plus",
        overrides: list[str] = [GATE],  # noqa: B006
        seed: int = 0,
        n_test: int = 0,
        runner: str = "kuberay",
        data_md5: str = "",
        dvc_remote: str = "",
        code_version: str = "",
        registry_name: str = "locvlm-video",
        cpu: str = CPU,
        memory: str = MEMORY,
        data_cpu: str = DATA_CPU,
        data_memory: str = DATA_MEMORY,
        node_selector: dict[str, str] = {},  # noqa: B006
        tolerations: list[dict[str, str]] = [],  # noqa: B006
        storage_secret: str = STORAGE_SECRET,
        mlflow_secret: str = MLFLOW_SECRET,
    ) -> None:
        """Carry what was learned about images over to videos.

        `panoptic`, `test_panoptic`: folders of ready labels of the videos; else the `segmenter` makes them (`weights`:
        of SEEM). `features`: pool the training videos once by the frozen tower. `benchmarks`: [{"task", "data",
        "images", "annotations", "judge"}] of video QA, where "images" is the folder of its videos. `data_md5` stands
        for all data of the run, the videos too.
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
        localize = place.step(
            build_localize_instruct(
                split="train", name="localize-train", captions=object_captions, overrides=[], **common
            ),
            "build Localize-Instruct",
            "data",
        ).outputs["Output"]
        align = run.train("align", "align", ["generic=generic"], [config, generic], title="train: align")
        sources = ["generic=generic", "localize=localize-train"]
        instruct = run.train("image", "instruct", sources, [config, align, generic, localize], "align")

        made = build_video_data(run, videos, panoptic, segmenter, video_instructions, keys, weights)
        pooled = place.step(
            video_features(
                root=root,
                wanted=features,
                model="image",
                videos=videos,
                runner=runner,
                image=IMAGE,
                inputs=[config, instruct],
                data_md5=fetched,
                code_version=code_version,
            ),
            "pool the videos",
            "job",
        ).outputs["Output"]
        sources = [INSTRUCT, "activitynet=localize-activitynet"]
        tuned = run.train("video", "video", sources, [config, instruct, *made.values()], "image", images=[pooled])
        hal_act = _hal_act(run, test_videos, test_panoptic, segmenter, weights, keys)
        shown = Run(root, test_videos, runner, code_version, place)
        scored = shown.evaluate("video", TASKS, n_test, [tuned, hal_act], benchmarks)
        gate = run.judge("video", TASKS, registry_name, {"data": fetched, "preset": preset}, [scored], benchmarks)
        place.step(
            report(
                root=root,
                arms=["LocVLM-Vid=video"],
                curves=["LocVLM align=align", "LocVLM instruct=image", "LocVLM-Vid video=video"],
                images="",
                inputs=[scored],
                code_version=code_version,
            ),
            "report",
            cached=False,
        ).after(gate)

    return dsl.pipeline(video_pipeline, name=NAME)


def build_video_data(
    run: Run,
    videos: Any,
    panoptic: Any,
    segmenter: Any,
    video_instructions: Any,
    keys: Mapping[str, Any],
    weights: Any = "",
) -> dict[str, Any]:
    """The training sets of the video stage; name -> fingerprint. `keys`: config, data_md5 and code_version."""
    place, root = run.place, run.root
    labels = _labels(run, "pseudo-actnet", videos, panoptic, segmenter, weights, keys)
    spoken = localize_activitynet(
        root=root,
        labels="pseudo-actnet",
        config=keys["config"],
        inputs=[labels],
        code_version=run.code_version,
    )
    instructions = video_instruct(root=root, source=video_instructions, videos=videos, **keys)
    return {
        "activitynet": place.step(spoken, "build Localize-ActivityNet", "data").outputs["Output"],
        "instructions": place.step(instructions, "read VideoInstruct", "data").outputs["Output"],
    }


def _labels(
    run: Run, name: str, videos: Any, panoptic: Any, segmenter: Any, weights: Any, keys: Mapping[str, Any]
) -> Any:
    task = pseudo_actnet(
        root=run.root,
        name=name,
        videos=videos,
        panoptic=panoptic,
        segmenter=segmenter,
        weights=weights,
        runner=run.runner,
        image=IMAGE,
        **keys,
    )
    return run.place.step(task, f"label videos: {name}", "job").outputs["Output"]


def _hal_act(run: Run, videos: Any, panoptic: Any, segmenter: Any, weights: Any, keys: Mapping[str, Any]) -> Any:
    labels = _labels(run, "pseudo-actnet-test", videos, panoptic, segmenter, weights, keys)
    task = build_video_presence(
        root=run.root,
        labels="pseudo-actnet-test",
        config=keys["config"],
        inputs=[labels],
        code_version=run.code_version,
    )
    return run.place.step(task, "build Hal-Act", "data").outputs["Output"]
