"""Ask one model the questions of every task."""

from kfp import dsl

from components.image import step


@step
def predict(
    root: str,
    name: str,
    tasks: list[str],
    benchmarks: list[dict[str, str]],
    images: str,
    n_test: int,
    runner: str,
    image: str,
    inputs: list[str],
    code_version: str,
    receipt: dsl.Output[dsl.Artifact],
) -> str:
    """`locvlm predict` with the model <root>/models/<name> -> <root>/predictions/<name>/<task>.jsonl.

    `tasks`: TASK=DATA, a path below the root, about `images`; `benchmarks`: {"task", "data", "images", "split",
    "name"}, data sets of others where they lie, in files called by "name" (default: the task). The model is loaded once
    for all tasks with the same images and split. `n_test`: questions of a task, 0 for all of them.
    """
    from locvlm.cli.steps import file_stems, run_step, write_receipt

    output = f"{root}/predictions/{name}"
    asked: dict[tuple[str, str], list[str]] = {}
    own = [entry.partition("=")[::2] for entry in tasks]
    stems = file_stems([task for task, _ in own], benchmarks)
    for task, data in own:
        options = ["--task", task, "--data", f"{root}/{data}", "--output", f"{output}/{task}.jsonl"]
        asked[images, ""] = asked.get((images, ""), []) + options
    for stem, known in zip(stems[len(own) :], benchmarks, strict=True):
        key = (known["images"], known.get("split", ""))
        options = ["--task", known["task"], "--data", known["data"], "--output", f"{output}/{stem}.jsonl"]
        asked[key] = asked.get(key, []) + options
    for number, ((folder, split), options) in enumerate(asked.items()):
        argv = ["predict", "--model", f"{root}/models/{name}", "--images", folder, *options]
        if split:
            argv += ["--split", split]
        if n_test:
            argv += ["--limit", str(n_test)]
        log = f"{root}/logs/predict-{name}{f'-{number}' if number else ''}.log"
        run_step(argv, log=log, runner=runner, image=image, gpus=1)
    return write_receipt(output, receipt.path)
