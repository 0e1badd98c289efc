"""Presence questions about objects that are there and objects that are not (paper, section 4.3)."""

from kfp import dsl

from components.image import step


@step
def build_presence(
    root: str,
    data_root: str,
    config: str,
    data_md5: str,
    code_version: str,
    receipt: dsl.Output[dsl.Artifact],
) -> str:
    """`locvlm data hallucination` on the test images -> <root>/questions/presence."""
    from locvlm.cli.steps import run_step, write_receipt

    output = f"{root}/questions/presence"
    argv = ["data", "hallucination", "--annotations", f"{data_root}/instances_test.json"]
    argv += ["--config", f"{root}/config.yaml", "--output", output]
    run_step(argv, log=f"{root}/logs/build-presence.log")
    return write_receipt(output, receipt.path)
