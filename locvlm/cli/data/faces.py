"""`locvlm data blur-faces`: images and videos whose faces cannot be recognised."""

import argparse
import functools
import os
from pathlib import Path
from typing import Any

from locvlm.cli.data.building import add_verb, fraction, positive, progress, say_built, summarise, writing


def add_verbs(nested: "argparse._SubParsersAction[Any]") -> None:
    """Register the verb."""
    faces = add_verb(nested, "blur-faces", "blur the faces in a folder of images or videos", _blur_faces)
    media = faces.add_mutually_exclusive_group(required=True)
    media.add_argument("--images", type=Path, metavar="DIR", help="folder of images, searched with its sub-folders")
    media.add_argument(
        "--videos",
        type=Path,
        metavar="DIR",
        help="folder of videos; one with a face is encoded again (H.264, without its sound), others are copied",
    )
    faces.add_argument(
        "--workers",
        type=positive,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="processes (default: one for each CPU core); the result is the same for any number",
    )
    faces.add_argument(
        "--threshold", type=fraction, default=0.2, metavar="X", help="lowest score of a face (%(default)s)"
    )
    faces.add_argument(
        "--margin", type=fraction, default=0.15, metavar="X", help="growth of a face box on each side (%(default)s)"
    )
    faces.add_argument(
        "--sigma", type=fraction, default=0.15, metavar="X", help="of the blur, in diagonals of the box (%(default)s)"
    )


def _blur_faces(args: argparse.Namespace) -> None:
    from locvlm.data.blurring import BlurTask, blur_folder
    from locvlm.data.faces import Blur, CenterFace

    task = BlurTask(
        args.images or args.videos,
        "images" if args.images else "videos",
        functools.partial(CenterFace, args.threshold),
        Blur(margin=args.margin, sigma=args.sigma),
    )
    with writing(args.output):
        manifest, is_new = blur_folder(task, args.output, args.workers, args.force, progress)
    if is_new:
        summarise(args, manifest)
    else:
        say_built(args)
