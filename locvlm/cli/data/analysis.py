"""`locvlm data keywords|exclusions|overlap`: what a data set says, and what it shares with another one."""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from locvlm.cli.data.building import add_verb, build, writing
from locvlm.errors import DataError
from locvlm.records import Manifest, atomic_write, source, write_json

if TYPE_CHECKING:
    from locvlm.data.leakage import ImageSet


def add_verbs(nested: "argparse._SubParsersAction[Any]") -> None:
    """Register the verbs."""
    keywords = add_verb(
        nested, "keywords", "how often conversations say left, right, above and below (paper, table 14)", _keywords
    )
    keywords.add_argument(
        "--conversations",
        type=Path,
        required=True,
        metavar="PATH",
        help="a LLaVA or VideoChat file (JSON or JSON lines, may be gzipped), or a folder of conversations; with an "
        "--output that ends in .json the counts are that one file",
    )

    exclude = nested.add_parser("exclusions", help="list the images that benchmarks ask about, for --exclude")
    for name, text in (
        ("refcoco", "official refs(...).p, or MiniGPT-4's JSON lists"),
        ("pope", "POPE files"),
        ("vqav2", "VQAv2 question files"),
        ("gqa", "GQA question files (needs --visual-genome)"),
    ):
        exclude.add_argument(f"--{name}", type=Path, nargs="+", default=[], metavar="FILE", help=text)
    _add_visual_genome(exclude)
    exclude.add_argument(
        "--splits", nargs="+", default=[], metavar="SPLIT", help="of an official RefCOCO file (default: all but train)"
    )
    exclude.add_argument(
        "--output", type=Path, required=True, metavar="FILE", help="the list: one id a line, or a JSON list (.json)"
    )
    exclude.set_defaults(run=_exclusions)

    shared = nested.add_parser("overlap", help="count the images that two data sets share")
    shared.add_argument(
        "first", type=Path, help="a data set folder, an image folder, or any question or annotation file"
    )
    shared.add_argument("second", type=Path, help="the other one")
    _add_visual_genome(shared)
    shared.add_argument("--output", type=Path, metavar="FILE", help="write counts and the shared images as JSON")
    shared.set_defaults(run=_overlap)


def _add_visual_genome(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--visual-genome", type=Path, metavar="FILE", help="image_data.json of Visual Genome, which has the COCO ids"
    )


def _keywords(args: argparse.Namespace) -> None:
    from locvlm.data.keywords import read_keywords
    from locvlm.evaluation.keywords import keyword_table

    if args.output.suffix == ".json":
        counts = read_keywords(args.conversations).to_dict()
        _write(args.output, {**counts, "source": source(args.conversations)})
        print(keyword_table(counts))
        print(f"keywords: in {args.output}")
        return
    if args.conversations.is_dir():
        args.input_files, args.input_folders = (), ("conversations",)
    else:
        args.input_files, args.input_folders = ("conversations",), ()

    def fill(folder: Path, manifest: Manifest) -> None:
        counts = read_keywords(args.conversations).to_dict()
        manifest.counts = {name: counts[name] for name in ("conversations", "qa_pairs", "utterances")}
        manifest.skipped = counts["skipped"]
        write_json(folder / "keywords.json", counts)

    build(args, {}, fill)
    print(keyword_table(json.loads((args.output / "keywords.json").read_text())))


def _exclusions(args: argparse.Namespace) -> None:
    from locvlm.data.leakage import BENCHMARKS, exclusions, read_visual_genome

    files: dict[str, Sequence[Path]] = {name: getattr(args, name) for name in BENCHMARKS if getattr(args, name)}
    if not files:
        raise DataError(
            f"listing images to leave out: no file was given; name some with {', '.join(f'--{n}' for n in BENCHMARKS)}"
        )
    visual_genome = None if args.visual_genome is None else read_visual_genome(args.visual_genome)
    found = exclusions(files, visual_genome, args.splits)
    ids = sorted(set().union(*(one.ids for one in found)))
    with writing(args.output), atomic_write(args.output) as file:
        if args.output.suffix == ".json":
            json.dump(ids, file)
            file.write("\n")
        else:
            file.writelines(f"{number}\n" for number in ids)
    rows = [
        {
            "benchmark": one.benchmark,
            **source(one.path),
            "images": one.images,
            "ids": len(one.ids),
            "new": one.new,
            "without_coco_id": one.without,
        }
        for one in found
    ]
    _write(args.output.with_suffix(".meta.json"), {"ids": len(ids), "splits": args.splits, "sources": rows})
    for row in rows:
        without = f", {row['without_coco_id']:,} without a COCO id" if row["without_coco_id"] else ""
        print(f"{row['benchmark']} {row['path']}: {row['ids']:,} images, {row['new']:,} of them new{without}")
    print(f"exclusions: {len(ids):,} images; in {args.output}")


def _overlap(args: argparse.Namespace) -> None:
    from locvlm.data.leakage import overlap, read_images, read_visual_genome

    visual_genome = None if args.visual_genome is None else read_visual_genome(args.visual_genome)
    found = overlap(read_images(args.first, visual_genome), read_images(args.second, visual_genome))
    told = found.to_dict()
    for side, images in (("first", found.first), ("second", found.second)):
        print(_line(told[side], images, len(found.shared)))
    print(f"shared: {len(found.shared):,} images")
    if args.output is not None:
        _write(args.output, told)


def _line(side: Mapping[str, Any], images: "ImageSet", n_shared: int) -> str:
    known = ", ".join(f"{side[key]:,} by {text}" for key, text in _KINDS if side[key])
    skipped = f"; skipped: {images.skipped.total():,} records that name no image" if images.skipped else ""
    share = 100 * n_shared / side["images"]
    return f"{side['name']}: {side['images']:,} images ({known}), of which {share:.2f} % shared{skipped}"


_KINDS = (("coco", "COCO id"), ("visual_genome", "Visual Genome id"), ("by_name", "file name"))


def _write(path: Path, value: Any) -> None:
    with writing(path):
        write_json(path, value)
