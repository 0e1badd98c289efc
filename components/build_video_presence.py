"""Hal-Act: presence questions about videos (paper, section 4.3)."""

from kfp import dsl

from components.image import step


@step
def build_video_presence(
    root: str,
    labels: str,
    config: str,
    inputs: list[str],
    code_version: str,
    receipt: dsl.Output[dsl.Artifact],
) -> str:
    """`locvlm data hallucination --source act` of <root>/data/<labels> -> <root>/questions/hal-act."""
    from locvlm.cli.steps import run_step, write_receipt

    output = f"{root}/questions/hal-act"
    argv = ["data", "hallucination", "--source", "act", "--annotations", f"{root}/data/{labels}"]
    argv += ["--config", f"{root}/config.yaml", "--output", output]
    run_step(argv, log=f"{root}/logs/hal-act.log")
    return write_receipt(output, receipt.path)
