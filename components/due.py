"""Is there anything to train on? Never cached: only a look can tell."""

from typing import NamedTuple

from kfp import dsl

from components.image import step


@step
def due(
    runs: str,
    data: str,
    dvc_file: str,
    repository: str,
    revision: str,
    below: str,
    images: str,
    captions: str,
    preset: str,
    overrides: list[str],
    seed: int,
    registry_name: str,
    code_version: str,
    owner: str,
    claim_hours: float,
    receipt: dsl.Output[dsl.Artifact],
) -> NamedTuple(  # type: ignore[valid-type]  # the form from which kfp reads several outputs
    "Outputs", due=str, why=str, root=str, md5=str, version=str, data_root=str, images=str, captions=str
):
    """`locvlm due` -> <runs>/due/<owner>.json; `due` is "yes" or "no".

    `root`: the folder of the run, named by what it trains on; `version`: the folder of the data version in `data`, and
    `data_root`, `images`, `captions`: the places in it (an absolute path stays as it is).
    """
    import json
    from collections import namedtuple
    from pathlib import Path

    from locvlm.cli.steps import run_step, write_receipt

    output = f"{runs}/due/{owner}.json"
    argv = ["due", "--dvc", dvc_file, "--repository", repository, "--revision", revision, "--code", code_version]
    argv += ["--name", registry_name, "--runs", runs, "--owner", owner, "--claim-hours", str(claim_hours)]
    argv += ["--preset", preset, "--set", f"seed={seed}"]
    for override in overrides:
        argv += ["--set", override]
    run_step([*argv, "--output", output], log=f"{runs}/logs/due.log")
    write_receipt(output, receipt.path)
    with open(output) as file:
        found = json.load(file)
    md5 = found["inputs"]["data"]
    version = Path(data) / md5.removesuffix(".dir")
    outputs = namedtuple("outputs", "due why root md5 version data_root images captions")
    return outputs(
        "yes" if found["due"] else "no",
        found["why"],
        f"{runs}/{found['run']}",
        md5,
        str(version),
        str(version / below),
        str(version / images),
        str(version / captions) if captions else "",
    )
