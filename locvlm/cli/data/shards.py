"""`locvlm data shard`: images as tar shards with an index."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from locvlm.cli.data.building import add_verb, build, positive, progress
from locvlm.errors import DataError
from locvlm.records import Manifest

_MIB = 1 << 20


def add_verbs(nested: "argparse._SubParsersAction[Any]") -> None:
    """Register the verb."""
    shard = add_verb(
        nested, "shard", "images as tar shards with an index: what every --images takes", _shard, (), ("images", "tars")
    )
    given = shard.add_mutually_exclusive_group(required=True)
    given.add_argument("--images", type=Path, metavar="DIR", help="pack this folder of images into shards")
    given.add_argument(
        "--tars",
        nargs="+",
        metavar="PATTERN",
        help="index the images in these tar files (webdataset, CC3M) where they lie, copying nothing",
    )
    shard.add_argument(
        "--shard-mib", type=positive, default=256, metavar="N", help="largest size of a shard in MiB (%(default)s)"
    )


def find_files(option: str, patterns: Sequence[str], suffix: str) -> list[Path]:
    """The files that names, folders and shell patterns stand for, each once, sorted. Raises DataError for one that
    stands for none."""
    found: set[Path] = set()
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            files = {file for file in path.rglob(f"*{suffix}") if file.is_file()}
        elif path.exists():
            files = {path}
        else:
            root = Path(path.anchor)
            files = {file for file in root.glob(str(path.relative_to(root))) if file.is_file()}
        if not files:
            raise DataError(f"reading --{option} {pattern}: there is no such file, nor a folder with *{suffix} files")
        found |= files
    return sorted(found)


def _shard(args: argparse.Namespace) -> None:
    from locvlm.data.shards import index_tars, pack_images
    from locvlm.pixels import open_images

    def pack(folder: Path, manifest: Manifest) -> None:
        source = open_images(args.images)
        names = list(source.names())
        with progress("packing", len(names)) as advance:
            packed = pack_images(source, names, folder, args.shard_mib * _MIB, advance)
        if not packed.images:
            raise DataError(f"packing {args.images}: there is no image in it; needed are .jpg, .png ... files")
        manifest.counts = {"images": packed.images, "shards": packed.shards, "bytes": packed.n_bytes}
        manifest.skipped = dict(packed.skipped)
        manifest.extra["shards"] = packed.fingerprint

    def index(folder: Path, manifest: Manifest) -> None:
        with progress("indexing", len(args.tars)) as advance:
            counts, skipped = index_tars(args.tars, folder, args.output, advance)
        manifest.counts, manifest.skipped = counts, dict(skipped)

    if args.images is not None:
        build(args, {"shard_mib": args.shard_mib}, pack)
        return
    args.tars = find_files("tars", args.tars, ".tar")
    build(args, {"in_place": True}, index)
