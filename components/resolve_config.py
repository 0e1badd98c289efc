"""Resolve and check the whole configuration before anything expensive happens."""

from kfp import dsl

from components.image import step


@step
def resolve_config(
    root: str, preset: str, overrides: list[str], seed: int, code_version: str, receipt: dsl.Output[dsl.Artifact]
) -> str:
    """`locvlm config` -> <root>/config.yaml. A misspelt key fails here, seconds after the start."""
    from locvlm.cli.steps import run_step, write_receipt

    argv = ["config", "--preset", preset, "--set", f"seed={seed}"]
    for override in overrides:
        argv += ["--set", override]
    output = f"{root}/config.yaml"
    run_step(argv, log=f"{root}/logs/resolve-config.log", printed=output)
    return write_receipt(output, receipt.path)
