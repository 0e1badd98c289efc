"""Features of the training videos, pooled over space and time, made once by the frozen vision tower."""

from kfp import dsl

from components.image import step


@step
def video_features(
    root: str,
    wanted: bool,
    model: str,
    videos: str,
    runner: str,
    image: str,
    inputs: list[str],
    data_md5: str,
    code_version: str,
    receipt: dsl.Output[dsl.Artifact],
) -> str:
    """`locvlm data video-features` with the model <root>/models/<model> -> <root>/data/video-features.

    Returns the folder that training takes: that of the features or, where they are not `wanted`, of the videos.
    """
    from locvlm.cli.steps import run_step, write_receipt

    output = f"{root}/data/video-features"
    if not wanted:
        write_receipt(f"{root}/models/{model}", receipt.path)
        return videos
    argv = ["data", "video-features", "--videos", videos, "--model", f"{root}/models/{model}"]
    argv += ["--config", f"{root}/config.yaml", "--output", output]
    run_step(argv, log=f"{root}/logs/video-features.log", runner=runner, image=image, gpus=1)
    write_receipt(output, receipt.path)
    return output
