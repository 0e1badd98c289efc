"""Bring the data of a run into place and make sure that it is the version the run names."""

from kfp import dsl

from components.image import step


@step
def fetch_data(
    root: str,
    data_root: str,
    images: str,
    data_md5: str,
    dvc_remote: str,
    receipt: dsl.Output[dsl.Artifact],
) -> str:
    """`locvlm fetch` -> <root>/data.json; returns the data's md5, the one that was asked for if one was.

    With `dvc_remote` the version `data_md5` is pulled from there into `data_root`; otherwise the files in `data_root`
    and `images` are checked. Not cached: only a look at the files can tell that they are still what they were.
    """
    import json

    from locvlm.cli.steps import run_step, write_receipt

    output = f"{root}/data.json"
    argv = ["fetch", "--output", output]
    if dvc_remote:
        argv += ["--md5", data_md5, "--remote", dvc_remote, "--into", data_root]
    else:
        for split in ("train", "test"):
            argv += ["--annotations", f"{data_root}/instances_{split}.json"]
        argv += ["--images", images]
        if data_md5:
            argv += ["--md5", data_md5]
    run_step(argv, log=f"{root}/logs/fetch-data.log")
    write_receipt(output, receipt.path)
    with open(output) as file:
        return str(json.load(file)["md5"])
