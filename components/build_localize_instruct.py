"""Localize-Instruct: LocPred, NegPred and RevLoc conversations (paper, section 3.3)."""

from kfp import dsl

from components.image import step


@step
def build_localize_instruct(
    root: str,
    data_root: str,
    split: str,
    name: str,
    captions: str,
    overrides: list[str],
    config: str,
    data_md5: str,
    code_version: str,
    receipt: dsl.Output[dsl.Artifact],
) -> str:
    """`locvlm data localize-instruct` -> <root>/data/<name>.

    `captions`: pseudo-captions of the objects, or "" for their category names; `overrides`: how places are written,
    where it differs from the run's config.
    """
    from locvlm.cli.steps import run_step, write_receipt

    output = f"{root}/data/{name}"
    argv = ["data", "localize-instruct", "--annotations", f"{data_root}/instances_{split}.json"]
    argv += ["--config", f"{root}/config.yaml", "--output", output]
    for override in overrides:
        argv += ["--set", override]
    if captions:
        argv += ["--captions", captions]
    run_step(argv, log=f"{root}/logs/build-{name}.log")
    return write_receipt(output, receipt.path)
