"""Captions and questions that every compared arm is trained on alike: `locvlm data generic`."""

from kfp import dsl

from components.image import step


@step
def build_generic(
    root: str,
    data_root: str,
    captions: str,
    config: str,
    data_md5: str,
    code_version: str,
    receipt: dsl.Output[dsl.Artifact],
) -> str:
    """`locvlm data generic` -> <root>/data/generic. `captions`: a COCO captions file, or "" for none."""
    from locvlm.cli.steps import run_step, write_receipt

    output = f"{root}/data/generic"
    argv = ["data", "generic", "--annotations", f"{data_root}/instances_train.json", "--config", f"{root}/config.yaml"]
    if captions:
        argv += ["--captions", captions]
    run_step([*argv, "--output", output], log=f"{root}/logs/build-generic.log")
    return write_receipt(output, receipt.path)
