"""The image pipeline: data -> align -> two arms of instruct -> predict -> score -> register, gate -> report.

Both arms start from the same aligned model and differ in the training mixture alone: the LocVLM arm has the location
objectives of the preset, the baseline arm answers as many questions in as many steps without them.
"""

from collections.abc import Mapping
from typing import Any

from kfp import dsl

from components.build_generic import build_generic
from components.build_localize_instruct import build_localize_instruct
from components.build_presence import build_presence
from components.build_spatial import build_spatial
from components.fetch_data import fetch_data
from components.report import report
from components.resolve_config import resolve_config
from workflows.mixtures import arm_mixture
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

NAME = "locvlm-image"

BASELINE = arm_mixture(())  # the arm without location objectives

# task -> what it asks about, below the run's folder
TASKS = [
    "coco-spatial=questions/coco-spatial",
    "coco-spatial-icl=questions/coco-spatial",
    "presence=questions/presence",
    "localization=data/localize-test",
    "region-description=data/localize-test",
]


def make_pipeline(retries: int = 1, timeouts: Mapping[Kind, int] = TIMEOUTS) -> Any:
    """The pipeline; `retries`: of the steps that train or ask a model (0 where a person sits before the failure)."""

    def image_pipeline(
        root: str,
        data_root: str,
        images: str,
        captions: str = "",
        preset: str = "locvlm-b",
        overrides: list[str] = [],  # noqa: B006 - kfp reads the default, nobody changes it
        baseline_overrides: list[str] = [BASELINE],  # noqa: B006
        seed: int = 0,
        n_test: int = 0,
        runner: str = "kuberay",
        data_md5: str = "",
        dvc_remote: str = "",
        code_version: str = "",
        registry_name: str = "locvlm",
        cpu: str = CPU,
        memory: str = MEMORY,
        data_cpu: str = DATA_CPU,
        data_memory: str = DATA_MEMORY,
        node_selector: dict[str, str] = {},  # noqa: B006
        tolerations: list[dict[str, str]] = [],  # noqa: B006
        storage_secret: str = STORAGE_SECRET,
        mlflow_secret: str = MLFLOW_SECRET,
    ) -> None:
        """Teach a visual LLM to say where things are, and measure what that buys against a matched baseline."""
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
        fetched = place.step(
            fetch_data(root=root, data_root=data_root, images=images, data_md5=data_md5, dvc_remote=dvc_remote),
            "check the data",
            "data",
            cached=False,
        ).after(begun)
        image_steps(
            run,
            begun,
            data_root=data_root,
            captions=captions,
            preset=preset,
            overrides=overrides,
            baseline_overrides=baseline_overrides,
            seed=seed,
            n_test=n_test,
            data_md5=fetched.outputs["Output"],
            registry_name=registry_name,
        )

    return dsl.pipeline(image_pipeline, name=NAME)


def image_steps(
    run: Run,
    begun: Any,
    *,
    data_root: Any,
    captions: Any,
    preset: Any,
    overrides: Any,
    baseline_overrides: Any,
    seed: Any,
    n_test: Any,
    data_md5: Any,
    registry_name: Any,
) -> None:
    """The steps from data in place to a report; also what a retraining does. `begun`: the run's first step."""
    place, root, code_version = run.place, run.root, run.code_version
    resolved = place.step(
        resolve_config(root=root, preset=preset, overrides=overrides, seed=seed, code_version=code_version),
        "resolve the configuration",
    ).after(begun)
    config = resolved.outputs["Output"]
    common = {"root": root, "data_root": data_root, "config": config, "data_md5": data_md5}
    common["code_version"] = code_version
    generic = place.step(build_generic(captions=captions, **common), "build generic questions", "data").outputs[
        "Output"
    ]
    localize = {
        split: place.step(
            build_localize_instruct(split=split, name=f"localize-{split}", captions="", overrides=[], **common),
            f"build Localize-Instruct ({split})",
            "data",
        ).outputs["Output"]
        for split in ("train", "test")
    }
    spatial = place.step(build_spatial(**common), "build COCO-Spatial", "data").outputs["Output"]
    presence = place.step(build_presence(**common), "build presence questions", "data").outputs["Output"]

    align = run.train("align", "align", ["generic=generic"], [config, generic], title="train: align")
    trained = {
        name: run.train(name, "instruct", data, [config, align, generic, localize["train"]], "align", changes)
        for name, data, changes in (
            ("locvlm", ["generic=generic", "localize=localize-train"], []),
            ("baseline", ["generic=generic"], baseline_overrides),
        )
    }
    scored = {
        name: run.evaluate(name, TASKS, n_test, [trained[name], spatial, presence, localize["test"]])
        for name in trained
    }
    tags = {"data": data_md5, "preset": preset}
    gate = run.judge("locvlm", TASKS, registry_name, tags, [scored["locvlm"]])
    place.step(
        report(
            root=root,
            arms=["LocVLM=locvlm", "baseline=baseline"],
            curves=["both align=align", "LocVLM instruct=locvlm", "baseline instruct=baseline"],
            images=run.images,
            inputs=list(scored.values()),
            code_version=code_version,
        ),
        "report",
        cached=False,
    ).after(gate)
