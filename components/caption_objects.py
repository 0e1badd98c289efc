"""Pseudo-captions of the objects that their category name alone picks out (paper, section 4.1)."""

from kfp import dsl

from components.image import step


@step
def caption_objects(
    root: str,
    data_root: str,
    images: str,
    captioner: str,
    ready: str,
    runner: str,
    image: str,
    inputs: list[str],
    data_md5: str,
    code_version: str,
    receipt: dsl.Output[dsl.Artifact],
) -> str:
    """`locvlm caption` of the training objects -> <root>/data/object-captions.jsonl; returns the file's path.

    `captioner`: a checkpoint or another visual LLM's folder, "" for the aligned model of the run. With captions that
    are `ready`, a file, nothing is asked and that file is used.
    """
    from locvlm.cli.steps import run_step, write_receipt

    output = ready or f"{root}/data/object-captions.jsonl"
    if not ready:
        argv = ["caption", "--annotations", f"{data_root}/instances_train.json", "--images", images]
        argv += ["--model", captioner or f"{root}/models/align", "--config", f"{root}/config.yaml", "--output", output]
        run_step(argv, log=f"{root}/logs/caption-objects.log", runner=runner, image=image, gpus=1)
    write_receipt(output, receipt.path)
    return output
