"""The COCO-Spatial questions (paper, section 4.1)."""

from kfp import dsl

from components.image import step


@step
def build_spatial(
    root: str,
    data_root: str,
    config: str,
    data_md5: str,
    code_version: str,
    receipt: dsl.Output[dsl.Artifact],
) -> str:
    """`locvlm data coco-spatial` on the test images -> <root>/questions/coco-spatial."""
    from locvlm.cli.steps import run_step, write_receipt

    output = f"{root}/questions/coco-spatial"
    argv = ["data", "coco-spatial", "--annotations", f"{data_root}/instances_test.json"]
    argv += ["--config", f"{root}/config.yaml", "--output", output]
    run_step(argv, log=f"{root}/logs/build-spatial.log")
    return write_receipt(output, receipt.path)
