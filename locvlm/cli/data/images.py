"""`locvlm data scenes|clips|coco`: annotated images and clips."""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from locvlm.cli.configuration import read_config
from locvlm.cli.data.building import (
    add_annotation_options,
    add_verb,
    build_from_annotations,
    fraction,
    positive,
    say_built,
    seed_of,
    summarise,
    writing,
)
from locvlm.errors import DataError
from locvlm.records import Manifest, read_manifest

if TYPE_CHECKING:
    from locvlm.data.coco import Instances


def add_verbs(nested: "argparse._SubParsersAction[Any]") -> None:
    """Register the verbs."""
    scenes = add_verb(nested, "scenes", "draw scenes of coloured shapes, with COCO annotations and captions", _scenes)
    scenes.add_argument("--n-train", type=positive, default=2000, metavar="N", help="training scenes (%(default)s)")
    scenes.add_argument("--n-test", type=positive, default=400, metavar="N", help="test scenes (%(default)s)")

    scenes.add_argument("--shards", action="store_true", help="images as tar shards with an index, not as loose files")

    clips = add_verb(nested, "clips", "draw clips of coloured shapes, some of which move, annotated likewise", _clips)
    clips.add_argument("--n-train", type=positive, default=2000, metavar="N", help="training clips (%(default)s)")
    clips.add_argument("--n-test", type=positive, default=400, metavar="N", help="test clips (%(default)s)")

    coco = add_verb(nested, "coco", "check a COCO file and its images, and split it into train and test", _coco)
    add_annotation_options(coco)
    coco.add_argument("--captions", type=Path, metavar="FILE", help="COCO captions file, split likewise")
    coco.add_argument("--test-fraction", type=fraction, default=0.2, metavar="X", help="share of test images (0.2)")


def _scenes(args: argparse.Namespace) -> None:
    from locvlm.data.scenes import draw_scenes

    _draw(args, partial(draw_scenes, shards=args.shards))


def _clips(args: argparse.Namespace) -> None:
    from locvlm.data.clips import draw_clips

    _draw(args, draw_clips)


def _draw(args: argparse.Namespace, draw: Callable[..., None]) -> None:
    seed = seed_of(args, read_config(args))
    manifest = args.output / "manifest.json"
    before = _stamp(manifest)
    with writing(args.output):
        draw(args.output, seed, args.n_train, args.n_test, force=args.force)
    if _stamp(manifest) == before:
        say_built(args)
    else:
        summarise(args, read_manifest(args.output))


def _coco(args: argparse.Namespace) -> None:
    from locvlm.data.coco import split_captions, split_instances
    from locvlm.data.formats import is_coco, write_coco
    from locvlm.data.instruct import draw

    def fill(folder: Path, manifest: Manifest, instances: "Instances") -> None:
        parts = 1 << 32

        def is_test(image_id: int) -> bool:
            return draw(parts, manifest.seed, "split", image_id) < parts * float(args.test_fraction)

        file = args.annotations
        if not is_coco(file):
            file = folder / "instances.json"
            write_coco(file, instances)
        manifest.counts = {"images": len(instances.images), **split_instances(file, instances, folder, is_test)}
        if not manifest.counts["images_train"] or not manifest.counts["images_test"]:
            raise DataError(
                f"splitting {args.annotations}: of {len(instances.images)} images {manifest.counts['images_test']} "
                f"are for testing at --test-fraction {args.test_fraction}; both parts need one, so choose another "
                "fraction or seed, or more images"
            )
        if args.captions is not None:
            manifest.counts |= split_captions(args.captions, instances, folder, is_test)

    build_from_annotations(args, {"test_fraction": args.test_fraction}, fill)


def _stamp(path: Path) -> tuple[int, int] | None:
    if not path.exists():
        return None
    status = path.stat()
    return status.st_ino, status.st_mtime_ns
