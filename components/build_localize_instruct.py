"""Localize-Instruct: LocPred, NegPred and RevLoc conversations (paper, section 3.3)."""

from kfp import dsl

from components.image import step


@step
def build_localize_instruct(
    root: str,
    data_root: str,
    split: str,
    config: str,
    data_md5: str,
    code_version: str,
    receipt: dsl.Output[dsl.Artifact],
) -> str:
    """`locvlm data localize-instruct` -> <root>/data/localize-<split>."""
    from locvlm.cli.steps import run_step, write_receipt

    output = f"{root}/data/localize-{split}"
    argv = ["data", "localize-instruct", "--annotations", f"{data_root}/instances_{split}.json"]
    argv += ["--config", f"{root}/config.yaml", "--output", output]
    run_step(argv, log=f"{root}/logs/build-localize-{split}.log")
    return write_receipt(output, receipt.path)
