"""Predictions -> figures; needs no model and no GPU."""

from kfp import dsl

from components.image import step


@step
def score(
    root: str, name: str, tasks: list[str], inputs: list[str], code_version: str, receipt: dsl.Output[dsl.Artifact]
) -> str:
    """`locvlm score` of every task in <root>/predictions/<name> -> <task>.metrics.json beside the predictions.

    `tasks`: TASK=DATA, a path below the root.
    """
    from locvlm.cli.steps import run_step, write_receipt

    folder = f"{root}/predictions/{name}"
    for entry in tasks:
        task, _, data = entry.partition("=")
        argv = ["score", "--task", task, "--predictions", f"{folder}/{task}.jsonl", "--data", f"{root}/{data}"]
        run_step([*argv, "--output", f"{folder}/{task}.metrics.json"], log=f"{root}/logs/score-{name}.log")
    return write_receipt(folder, receipt.path)
