"""The first step of every run: its lineage id, and its run in MLflow. Never cached: a new KFP run joins the same id."""

from kfp import dsl

from components.image import step


@step
def begin(root: str, kfp_run: str, tags: list[str], receipt: dsl.Output[dsl.Artifact]) -> str:
    """`locvlm begin` -> <root>/lineage.json; returns the lineage id. `tags`: KEY=VALUE, what the run is made of."""
    import json

    from locvlm.cli.steps import run_step, write_receipt

    output = f"{root}/lineage.json"
    argv = ["begin", "--root", root, "--kfp-run", kfp_run]
    for tag in tags:
        argv += ["--tag", tag]
    run_step(argv, log=f"{root}/logs/begin.log")
    write_receipt(output, receipt.path)
    with open(output) as file:
        return str(json.load(file)["lineage"])
