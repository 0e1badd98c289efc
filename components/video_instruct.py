"""VideoInstruct-100K, read once."""

from kfp import dsl

from components.image import step


@step
def video_instruct(
    root: str,
    source: str,
    videos: str,
    config: str,
    data_md5: str,
    code_version: str,
    receipt: dsl.Output[dsl.Artifact],
) -> str:
    """`locvlm data video-instruct` -> <root>/data/video-instruct; questions about missing videos are left out."""
    from locvlm.cli.steps import run_step, write_receipt

    output = f"{root}/data/video-instruct"
    argv = ["data", "video-instruct", "--source", source, "--videos", videos]
    argv += ["--config", f"{root}/config.yaml", "--output", output]
    run_step(argv, log=f"{root}/logs/video-instruct.log")
    return write_receipt(output, receipt.path)
