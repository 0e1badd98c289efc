"""`locvlm data lmms-eval`: question sets as task folders of lmms-eval."""

import argparse
from pathlib import Path
from typing import Any

from locvlm.cli.configuration import read_config
from locvlm.cli.data.building import add_verb, build
from locvlm.records import Manifest

_TASKS = ("coco-spatial", "coco-spatial-icl", "region-description")


def add_verbs(nested: "argparse._SubParsersAction[Any]") -> None:
    """Register the verb."""
    parser = add_verb(nested, "lmms-eval", "a task folder of lmms-eval from a question set", _export, (), ("images",))
    parser.add_argument("--task", required=True, choices=_TASKS, help="how the questions are asked and scored")
    parser.add_argument("--data", type=Path, required=True, metavar="PATH", help="question file or data folder")
    parser.add_argument("--split", metavar="NAME", help="of a file that holds several (RefCOCO)")
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="folder of the images or of shards")
    parser.add_argument(
        "--dataset-path",
        metavar="PATH",
        help="where the task finds its data: a folder, or the id of a data set on the hub (default: data in --output)",
    )


def _export(args: argparse.Namespace) -> None:
    from locvlm.evaluation.lmms import export
    from locvlm.pixels import open_images

    config = read_config(args)
    where = args.dataset_path or str((args.output / "data").absolute())
    if args.data.is_dir():
        args.input_folders = ("images", "data")
    else:
        args.input_files = ("data",)

    def fill(folder: Path, manifest: Manifest) -> None:
        made = export(args.task, args.data, args.split, open_images(args.images), config, folder, where)
        manifest.counts = {"images": made.images, "questions": made.questions}
        manifest.skipped = dict(made.skipped)

    build(args, {"task": args.task, "split": args.split, "dataset_path": where}, fill)
