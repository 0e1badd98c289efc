"""Predictions -> figures; needs no model and no GPU."""

from kfp import dsl

from components.image import step


@step
def score(
    root: str,
    name: str,
    tasks: list[str],
    benchmarks: list[dict[str, str]],
    inputs: list[str],
    code_version: str,
    receipt: dsl.Output[dsl.Artifact],
) -> str:
    """`locvlm score` of every task in <root>/predictions/<name> -> <task>.metrics.json beside the predictions.

    `tasks`: TASK=DATA, a path below the root; `benchmarks`: as for `predict`, and "annotations" and "judge".
    """
    from locvlm.cli.steps import file_stems, run_step, write_receipt

    folder = f"{root}/predictions/{name}"
    asked: list[tuple[str, str, dict[str, str]]]
    asked = [(task, f"{root}/{data}", {}) for task, _, data in (entry.partition("=") for entry in tasks)]
    asked += [(known["task"], known["data"], known) for known in benchmarks]
    stems = file_stems([task for task, _, known in asked if not known], benchmarks)
    for stem, (task, data, known) in zip(stems, asked, strict=True):
        argv = ["score", "--task", task, "--predictions", f"{folder}/{stem}.jsonl", "--data", data]
        for option in ("split", "annotations", "judge"):
            if known.get(option):
                argv += [f"--{option}", known[option]]
        run_step([*argv, "--output", f"{folder}/{stem}.metrics.json"], log=f"{root}/logs/score-{name}.log")
    return write_receipt(folder, receipt.path)
