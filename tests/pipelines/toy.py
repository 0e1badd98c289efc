"""A pipeline of three steps that `locvlm config` does in no time; the middle one does what a file tells it to."""

from typing import Any

from kfp import dsl

from components.image import step


@step
def first(root: str, receipt: dsl.Output[dsl.Artifact]) -> str:
    """Succeeds, and counts how often it ran."""
    from locvlm.cli.steps import run_step, write_receipt

    with open(f"{root}/first.count", "a") as file:
        file.write("x")
    run_step(["config", "--preset", "tiny"], log=f"{root}/logs/first.log", printed=f"{root}/first.yaml")
    return write_receipt(f"{root}/first.yaml", receipt.path)


@step
def middle(root: str, inputs: list[str], receipt: dsl.Output[dsl.Artifact]) -> str:
    """Takes the preset's name from <root>/preset; "kill" and "import" are ways to fail."""
    import os
    import signal

    from locvlm.cli.steps import run_step, write_receipt

    with open(f"{root}/preset") as file:
        preset = file.read()
    log = f"{root}/logs/middle.log"
    if preset == "import":
        raise ImportError("no module named locvlm_of_tomorrow")
    if preset == "kill":
        with open(log, "a") as file:
            file.write("$ locvlm train\nstep 7, loss 0.5\n")
        os.kill(os.getpid(), signal.SIGKILL)
    run_step(["config", "--preset", preset], log=log, printed=f"{root}/middle.yaml")
    return write_receipt(f"{root}/middle.yaml", receipt.path)


@step
def last(root: str, inputs: list[str], receipt: dsl.Output[dsl.Artifact]) -> str:
    """Succeeds."""
    from locvlm.cli.steps import run_step, write_receipt

    run_step(["config", "--preset", "tiny"], log=f"{root}/logs/last.log", printed=f"{root}/last.yaml")
    return write_receipt(f"{root}/last.yaml", receipt.path)


def toy(root: str) -> None:
    """First, middle, last."""
    one = first(root=root).set_display_name("the first step").outputs["Output"]
    two = middle(root=root, inputs=[one]).set_display_name("the middle step").outputs["Output"]
    last(root=root, inputs=[two]).set_display_name("the last step")


def make_pipeline() -> Any:
    """The pipeline."""
    return dsl.pipeline(toy, name="toy")
