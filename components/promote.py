"""The gate: hold a version against its floors and the champion. Never cached: it changes the registry."""

from kfp import dsl

from components.image import step


@step
def promote(root: str, registry_name: str, version: str, receipt: dsl.Output[dsl.Artifact]) -> str:
    """`locvlm promote` -> <root>/decision.json. A gate that does not hold is a result, so the report is still made."""
    from locvlm.cli.steps import run_step, write_receipt

    output = f"{root}/decision.json"
    argv = ["promote", "--name", registry_name, "--version", version, "--output", output, "--report-only"]
    run_step(argv, log=f"{root}/logs/promote.log")
    return write_receipt(output, receipt.path)
