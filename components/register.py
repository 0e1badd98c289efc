"""Make a model version, with its lineage and its figures. Never cached: it changes the registry."""

from kfp import dsl

from components.image import step


@step
def register(
    root: str,
    name: str,
    tasks: list[str],
    benchmarks: list[dict[str, str]],
    registry_name: str,
    tags: list[str],
    inputs: list[str],
    receipt: dsl.Output[dsl.Artifact],
) -> str:
    """`locvlm register` of <root>/models/<name> -> <root>/register.json; returns the version.

    `tasks`, `benchmarks`: what `score` has scored; `tags`: KEY=VALUE.
    """
    import json

    from locvlm.cli.steps import file_stems, run_step, write_receipt

    output = f"{root}/register.json"
    argv = ["register", "--model", f"{root}/models/{name}", "--name", registry_name, "--output", output]
    for stem in file_stems([entry.partition("=")[0] for entry in tasks], benchmarks):
        argv += ["--metrics", f"{root}/predictions/{name}/{stem}.metrics.json"]
    for tag in tags:
        argv += ["--tag", tag]
    run_step(argv, log=f"{root}/logs/register.log")
    write_receipt(output, receipt.path)
    with open(output) as file:
        return str(json.load(file)["version"])
