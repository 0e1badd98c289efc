"""Boxes of a few frames a video, from a panoptic segmentation (paper, section 4.2)."""

from kfp import dsl

from components.image import step


@step
def pseudo_actnet(
    root: str,
    name: str,
    videos: str,
    panoptic: str,
    segmenter: str,
    weights: str,
    runner: str,
    image: str,
    config: str,
    data_md5: str,
    code_version: str,
    receipt: dsl.Output[dsl.Artifact],
) -> str:
    """`locvlm data pseudo-actnet` -> <root>/data/<name>, from ready labels (`panoptic`) or by a `segmenter`
    (`weights`: SEEM's)."""
    from locvlm.cli.steps import run_step, write_receipt

    output = f"{root}/data/{name}"
    argv = ["data", "pseudo-actnet", "--videos", videos, "--config", f"{root}/config.yaml", "--output", output]
    argv += ["--panoptic", panoptic] if panoptic else ["--segmenter", segmenter]
    if weights:
        argv += ["--weights", weights]
    where = "local" if panoptic else runner  # ready labels need no GPU
    run_step(argv, log=f"{root}/logs/{name}.log", runner=where, image=image, gpus=1)
    return write_receipt(output, receipt.path)
