"""`locvlm data pope`: POPE questions from annotations, in the form of the official files."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from locvlm.cli.data.building import add_annotation_options, add_verb, build_from_annotations, positive
from locvlm.cli.data.questions import write_questions
from locvlm.records import Manifest

if TYPE_CHECKING:
    from locvlm.data.coco import Instances


def add_verbs(nested: "argparse._SubParsersAction[Any]") -> None:
    """Register the verb."""
    pope = add_verb(nested, "pope", "POPE questions by the rules of the official generator", _pope)
    add_annotation_options(pope)
    pope.add_argument(
        "--strategy",
        choices=("random", "popular", "adversarial"),
        required=True,
        help="absent objects: any, those in most images, or those seen most often with the present ones",
    )
    pope.add_argument("--images-n", type=positive, default=500, metavar="N", help="images to ask about (%(default)s)")
    pope.add_argument(
        "--per-image", type=positive, default=6, metavar="N", help="questions an image, half of them no (%(default)s)"
    )


def _pope(args: argparse.Namespace) -> None:
    from locvlm.data.pope import build_pope

    args.dataset = f"pope-{args.strategy}"  # by which the report finds the paper's column
    options = {"strategy": args.strategy, "images_n": args.images_n, "per_image": args.per_image}

    def fill(folder: Path, manifest: Manifest, instances: "Instances") -> None:
        questions = build_pope(instances, args.strategy, manifest.seed, args.images_n, args.per_image)
        write_questions(args, folder, manifest, questions)
        manifest.extra["notes"] |= questions.notes

    build_from_annotations(args, options, fill)
