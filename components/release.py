"""The end of a run that `due` has claimed, however it ended. Never cached."""

from components.image import step


@step
def release(runs: str, owner: str) -> None:
    """`locvlm release`."""
    from locvlm.cli.steps import run_step

    run_step(["release", "--runs", runs, "--owner", owner], log=f"{runs}/logs/release.log")
