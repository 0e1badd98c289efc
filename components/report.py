"""One page with all arms side by side, and the end of the run in MLflow. Never cached: it changes what is tracked."""

from kfp import dsl

from components.image import step


@step
def report(
    root: str,
    arms: list[str],
    curves: list[str],
    images: str,
    inputs: list[str],
    code_version: str,
    receipt: dsl.Output[dsl.Artifact],
    page: dsl.Output[dsl.HTML],
    labels: list[str] = [],  # noqa: B006 - kfp reads the default, nobody changes it
) -> str:
    """`locvlm report` -> <root>/report.

    `arms`: TITLE=NAME of predictions, the first is compared with the others; TITLE=NAME,NAME puts the figures of two
    models into one row. `curves`: TITLE=NAME of models; `labels`: 'TITLE KEY=VALUE', see `locvlm report`; `images`: ""
    for a page without pictures.
    """
    import shutil
    from pathlib import Path

    from locvlm.cli.steps import run_step, write_receipt

    output = f"{root}/report"
    argv = ["report", "--output", output, *(["--images", images] if images else [])]
    for arm in arms:
        title, _, names = arm.partition("=")
        name, *others = names.split(",")
        argv += ["--arm", f"{title}={root}/predictions/{name}"]
        for other in others:
            files = sorted(Path(root, "predictions", other).glob("*.metrics.json"))
            argv += [word for file in files for word in ("--metrics", f"{title}={file}")]
    for label in labels:
        argv += ["--label", label]
    for curve in curves:
        title, _, name = curve.partition("=")
        argv += ["--curve", f"{title}={root}/models/{name}/curve.jsonl"]
    run_step(argv, log=f"{root}/logs/report.log", is_last=True)
    shutil.copyfile(f"{output}/report.html", page.path)
    return write_receipt(output, receipt.path)
