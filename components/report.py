"""One page with both arms side by side."""

from kfp import dsl

from components.image import step


@step
def report(
    root: str,
    arms: list[str],
    images: str,
    inputs: list[str],
    code_version: str,
    receipt: dsl.Output[dsl.Artifact],
    page: dsl.Output[dsl.HTML],
) -> str:
    """`locvlm report` -> <root>/report. `arms`: TITLE=NAME, the first is compared with the others."""
    import shutil

    from locvlm.cli.steps import run_step, write_receipt

    output = f"{root}/report"
    argv = ["report", "--images", images, "--output", output, "--curve", f"both align={root}/models/align/curve.jsonl"]
    for arm in arms:
        title, _, name = arm.partition("=")
        argv += ["--arm", f"{title}={root}/predictions/{name}"]
        argv += ["--curve", f"{title} instruct={root}/models/{name}/curve.jsonl"]
    run_step(argv, log=f"{root}/logs/report.log")
    shutil.copyfile(f"{output}/report.html", page.path)
    return write_receipt(output, receipt.path)
