"""The retraining pipeline, which a schedule starts: nothing new -> nothing done; else the image pipeline's steps.

Its first step finds the newest data version and compares data, code and configuration with what the champion was made
from. Where one changed it claims the run, so that of two at once only one trains; the claim is given back at the end,
however the run ends. The run's folder is named by what it trains on: one that was broken off goes on there.
"""

from collections.abc import Mapping
from typing import Any

from kfp import dsl

from components.due import due
from components.fetch_data import fetch_data
from components.release import release
from workflows.image_pipeline import BASELINE, image_steps
from workflows.steps import MLFLOW_SECRET, SHARED_PATH, STORAGE_SECRET, TIMEOUTS, Kind, Placement, Run

NAME = "locvlm-retrain"


def make_pipeline(retries: int = 1, timeouts: Mapping[Kind, int] = TIMEOUTS) -> Any:
    """The pipeline; `retries`: of the steps that train or ask a model."""

    def retrain_pipeline(
        dvc_file: str,
        dvc_remote: str,
        runs: str = f"{SHARED_PATH}/runs",
        data: str = f"{SHARED_PATH}/data",
        repository: str = "",
        revision: str = "",
        below: str = "",
        images: str = "images",
        captions: str = "",
        preset: str = "locvlm-b",
        overrides: list[str] = [],  # noqa: B006 - kfp reads the default, nobody changes it
        baseline_overrides: list[str] = [BASELINE],  # noqa: B006
        seed: int = 0,
        n_test: int = 0,
        runner: str = "kuberay",
        code_version: str = "",
        registry_name: str = "locvlm",
        claim_hours: float = 6.0,
        node_selector: dict[str, str] = {},  # noqa: B006
        tolerations: list[dict[str, str]] = [],  # noqa: B006
        storage_secret: str = STORAGE_SECRET,
        mlflow_secret: str = MLFLOW_SECRET,
    ) -> None:
        """Train again where data, code or configuration changed since the champion; promote the model if it may be.

        `dvc_file` pins the newest data: a path, or one in the Git `repository` at `revision`; `dvc_remote` has it.
        `below`: the folder of the data that has instances_train.json and instances_test.json; `images`, `captions`:
        paths in the data, or absolute ones.
        """
        # cpu and memory are settled here: kfp 2.17 does not pass those of a parameter on into a condition
        place = Placement(
            node_selector=node_selector,
            tolerations=tolerations,
            storage_secret=storage_secret,
            mlflow_secret=mlflow_secret,
            retries=retries,
            timeouts=timeouts,
        )
        owner = dsl.PIPELINE_JOB_ID_PLACEHOLDER
        asked = place.step(
            due(
                runs=runs,
                data=data,
                dvc_file=dvc_file,
                repository=repository,
                revision=revision,
                below=below,
                images=images,
                captions=captions,
                preset=preset,
                overrides=overrides,
                seed=seed,
                registry_name=registry_name,
                code_version=code_version,
                owner=owner,
                claim_hours=claim_hours,
            ),
            "look for changes",
            cached=False,
        ).outputs
        given_back = place.step(release(runs=runs, owner=owner), "give the claim back", cached=False)
        # a condition on a step inside the handler is never true in kfp 2.17's local runner
        with dsl.ExitHandler(given_back), dsl.If(asked["due"] == "yes", name="something-changed"):
            run = Run(asked["root"], asked["images"], runner, code_version, place)
            begun = run.begin({"pipeline": NAME, "preset": preset, "data": asked["md5"]})
            fetched = place.step(
                fetch_data(
                    root=asked["root"],
                    data_root=asked["version"],
                    images=asked["images"],
                    data_md5=asked["md5"],
                    dvc_remote=dvc_remote,
                ),
                "fetch the data",
                "data",
                cached=False,
            ).after(begun)
            image_steps(
                run,
                begun,
                data_root=asked["data_root"],
                captions=asked["captions"],
                preset=preset,
                overrides=overrides,
                baseline_overrides=baseline_overrides,
                seed=seed,
                n_test=n_test,
                data_md5=fetched.outputs["Output"],
                registry_name=registry_name,
            )

    return dsl.pipeline(retrain_pipeline, name=NAME)
