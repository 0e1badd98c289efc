"""LocPred, NegPred and RevLoc conversations about objects that stay in place in a video (paper, section 3.4)."""

from kfp import dsl

from components.image import step


@step
def localize_activitynet(
    root: str,
    labels: str,
    config: str,
    inputs: list[str],
    code_version: str,
    receipt: dsl.Output[dsl.Artifact],
) -> str:
    """`locvlm data localize-activitynet` of <root>/data/<labels> -> <root>/data/localize-activitynet."""
    from locvlm.cli.steps import run_step, write_receipt

    output = f"{root}/data/localize-activitynet"
    argv = ["data", "localize-activitynet", "--pseudo-labels", f"{root}/data/{labels}"]
    argv += ["--config", f"{root}/config.yaml", "--output", output]
    run_step(argv, log=f"{root}/logs/localize-activitynet.log")
    return write_receipt(output, receipt.path)
