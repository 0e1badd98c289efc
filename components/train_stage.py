"""One training stage, here on the Ray head of the run or as a RayJob on the cluster."""

from kfp import dsl

from components.image import step


@step
def train_stage(
    root: str,
    name: str,
    stage: str,
    parent: str,
    data: list[str],
    images: list[str],
    overrides: list[str],
    runner: str,
    image: str,
    inputs: list[str],
    code_version: str,
    receipt: dsl.Output[dsl.Artifact],
) -> str:
    """`locvlm train` -> <root>/models/<name>, from <root>/models/<parent> or, with "", from the config's foundation.

    `data`: names of folders in <root>/data, as NAME=FOLDER; `images`: [NAME=]DIR, where NAME is one of them. `inputs`:
    fingerprints of the config, the data and the parent. An unfinished run in the same folder goes on where it stopped.
    """
    from locvlm.cli.steps import run_step, write_receipt

    output = f"{root}/models/{name}"
    argv = ["train", "--stage", stage, "--config", f"{root}/config.yaml", "--output", output]
    for folder in images:
        argv += ["--images", folder]
    for entry in data:
        source, _, folder = entry.partition("=")
        argv += ["--data", f"{source}={root}/data/{folder}"]
    if parent:
        argv += ["--model", f"{root}/models/{parent}"]
    for override in overrides:
        argv += ["--set", override]
    run_step(argv, log=f"{root}/logs/train-{name}.log", runner=runner, image=image)
    return write_receipt(output, receipt.path)
