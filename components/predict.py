"""Ask one model the questions of every task."""

from kfp import dsl

from components.image import step


@step
def predict(
    root: str,
    name: str,
    tasks: list[str],
    images: str,
    n_test: int,
    runner: str,
    image: str,
    inputs: list[str],
    code_version: str,
    receipt: dsl.Output[dsl.Artifact],
) -> str:
    """`locvlm predict` with the model <root>/models/<name> -> <root>/predictions/<name>/<task>.jsonl.

    The model is loaded once for all tasks. `tasks`: TASK=DATA, a path below the root. `n_test`: questions of a task, 0
    for all of them.
    """
    from locvlm.cli.steps import run_step, write_receipt

    output = f"{root}/predictions/{name}"
    argv = ["predict", "--model", f"{root}/models/{name}", "--images", images]
    for entry in tasks:
        task, _, data = entry.partition("=")
        argv += ["--task", task, "--data", f"{root}/{data}", "--output", f"{output}/{task}.jsonl"]
    if n_test:
        argv += ["--limit", str(n_test)]
    run_step(argv, log=f"{root}/logs/predict-{name}.log", runner=runner, image=image, gpus=1)
    return write_receipt(output, receipt.path)
