"""The image pipeline: data -> align -> two arms of instruct -> predict -> score -> register, gate -> report.

Both arms start from the same aligned model and differ in the training mixture alone: the LocVLM arm has the location
objectives of the preset, the baseline arm answers as many questions in as many steps without them.
"""

from typing import Any

from kfp import dsl, kubernetes

from components.build_generic import build_generic
from components.build_localize_instruct import build_localize_instruct
from components.build_presence import build_presence
from components.build_spatial import build_spatial
from components.fetch_data import fetch_data
from components.image import IMAGE
from components.predict import predict
from components.promote import promote
from components.register import register
from components.report import report
from components.resolve_config import resolve_config
from components.score import score
from components.train_stage import train_stage

NAME = "locvlm-image"

# The shares that the location objectives have in the LocVLM arm go to the generic ones, in about their proportion. The
# forms that an evaluation asks (presence, left or right) are in both arms, so that neither has to guess a form.
BASELINE = (
    "stages.instruct.mixture=["
    "{source: generic, objective: caption, weight: 0.5}, "
    "{source: generic, objective: presence, weight: 0.4}, "
    "{source: generic, objective: left_right, weight: 0.1}]"
)

# task -> what it asks about, below the run's folder
TASKS = [
    "coco-spatial=questions/coco-spatial",
    "coco-spatial-icl=questions/coco-spatial",
    "presence=questions/presence",
    "localization=data/localize-test",
    "region-description=data/localize-test",
]

SHARED_VOLUME, SHARED_PATH = "locvlm-shared", "/mnt/locvlm"  # k8s/storage.yaml
STORAGE_SECRET = {name: name for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL")}


def make_pipeline(retries: int = 1) -> Any:
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
    ) -> None:
        """Teach a visual LLM to say where things are, and measure what that buys against a matched baseline."""
        config = _step(
            resolve_config(root=root, preset=preset, overrides=overrides, seed=seed, code_version=code_version),
            "resolve the configuration",
        ).outputs["Output"]
        fetched = _step(
            fetch_data(root=root, data_root=data_root, images=images, data_md5=data_md5, dvc_remote=dvc_remote),
            "check the data",
            cached=False,
        ).outputs["Output"]
        common = {"root": root, "data_root": data_root, "config": config, "data_md5": fetched}
        common["code_version"] = code_version
        generic = _step(build_generic(captions=captions, **common), "build generic questions").outputs["Output"]
        localize = {
            split: _step(build_localize_instruct(split=split, **common), f"build Localize-Instruct ({split})").outputs[
                "Output"
            ]
            for split in ("train", "test")
        }
        spatial = _step(build_spatial(**common), "build COCO-Spatial").outputs["Output"]
        presence = _step(build_presence(**common), "build presence questions").outputs["Output"]

        work = {"root": root, "code_version": code_version}
        heavy = {**work, "images": images, "runner": runner, "image": IMAGE}
        align = _step(
            train_stage(
                name="align",
                stage="align",
                parent="",
                data=["generic=generic"],
                overrides=[],
                inputs=[config, generic],
                **heavy,
            ),
            "train: align",
            retries=retries,
        ).outputs["Output"]
        scored = {}
        trained = {}
        for name, data, changes in (
            ("locvlm", ["generic=generic", "localize=localize-train"], []),
            ("baseline", ["generic=generic"], baseline_overrides),
        ):
            trained[name] = _step(
                train_stage(
                    name=name,
                    stage="instruct",
                    parent="align",
                    data=data,
                    overrides=changes,
                    inputs=[config, align, generic, localize["train"]],
                    **heavy,
                ),
                f"train: instruct, {name}",
                retries=retries,
            ).outputs["Output"]
        for name in trained:
            answers = _step(
                predict(
                    name=name,
                    tasks=TASKS,
                    n_test=n_test,
                    inputs=[trained[name], spatial, presence, localize["test"]],
                    **heavy,
                ),
                f"predict, {name}",
                retries=retries,
            ).outputs["Output"]
            scored[name] = _step(score(name=name, tasks=TASKS, inputs=[answers], **work), f"score, {name}").outputs[
                "Output"
            ]
        version = _step(
            register(
                root=root,
                name="locvlm",
                tasks=TASKS,
                registry_name=registry_name,
                tags=[
                    f"data={fetched}",
                    f"code={code_version}",
                    f"preset={preset}",
                    f"image={IMAGE}",
                    f"kfp.run={dsl.PIPELINE_JOB_ID_PLACEHOLDER}",
                ],
                inputs=[scored["locvlm"]],
            ),
            "register, locvlm",
            cached=False,
        ).outputs["Output"]
        gate = _step(promote(root=root, registry_name=registry_name, version=version), "gate", cached=False)
        _step(
            report(
                arms=["LocVLM=locvlm", "baseline=baseline"],
                images=images,
                inputs=[scored["locvlm"], scored["baseline"]],
                **work,
            ),
            "report",
        ).after(gate)

    return dsl.pipeline(image_pipeline, name=NAME)


def _step(task: Any, title: str, *, cached: bool = True, retries: int = 0) -> Any:
    """Name a step and give it what every step needs on a cluster; the local runner ignores the latter."""
    task.set_display_name(title)
    task.set_caching_options(cached)
    task.set_cpu_request("1").set_memory_request("4Gi").set_memory_limit("16Gi")
    if retries:
        task.set_retry(num_retries=retries, backoff_duration="60s", backoff_factor=2)
    kubernetes.mount_pvc(task, pvc_name=SHARED_VOLUME, mount_path=SHARED_PATH)
    kubernetes.use_secret_as_env(task, secret_name="locvlm-storage", secret_key_to_env=STORAGE_SECRET, optional=True)
    kubernetes.use_config_map_as_env(
        task, "locvlm-settings", {"MLFLOW_TRACKING_URI": "MLFLOW_TRACKING_URI"}, optional=True
    )
    return task
