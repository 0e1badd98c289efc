"""`locvlm data coco-spatial|hallucination`: question sets with known answers."""

import argparse
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from locvlm.cli.configuration import read_config
from locvlm.cli.data.building import (
    add_annotation_options,
    add_verb,
    build,
    build_from_annotations,
    named_inputs,
    positive,
    progress,
)
from locvlm.errors import DataError
from locvlm.records import Manifest, read_manifest, write_jsonl

if TYPE_CHECKING:
    from locvlm.data.coco import Instances
    from locvlm.data.hallucination import PresenceSet
    from locvlm.data.pope import PopeSet
    from locvlm.data.spatial import SpatialSet


def add_verbs(nested: "argparse._SubParsersAction[Any]") -> None:
    """Register the verbs."""
    spatial = add_verb(nested, "coco-spatial", "the COCO-Spatial questions (paper, section 4.1)", _coco_spatial)
    add_annotation_options(spatial)
    spatial.add_argument("--rules", choices=("paper", "released"), default="paper", help="which selection rules")
    spatial.add_argument(
        "--axis", choices=("horizontal", "vertical"), default="horizontal", help="left/right, or above/below"
    )
    spatial.add_argument(
        "--both-orders", action="store_true", help="released rules: ask each pair the other way round as well"
    )
    spatial.add_argument(
        "--mirrored", action="store_true", help="ask each question about the mirrored image as well (consistency)"
    )

    presence = add_verb(
        nested, "hallucination", "presence questions: two present and two absent objects", _hallucination
    )
    add_annotation_options(presence)
    presence.add_argument(
        "--source",
        choices=("coco", "ade", "act"),
        default="coco",
        help="what --annotations is: a COCO file (Hal-COCO), the folder of ADE20K's index PNGs (Hal-ADE), or a folder "
        "of `locvlm data pseudo-actnet` (Hal-Act, about videos)",
    )
    presence.add_argument("--per-image", type=positive, default=2, metavar="N", help="objects of each kind (2)")
    presence.add_argument(
        "--overlap",
        choices=("exact", "near-synonyms"),
        default="near-synonyms",
        help="ade: leave out classes with the name of a COCO category, or near-synonyms as well (%(default)s)",
    )
    presence.add_argument(
        "--classes", type=Path, metavar="FILE", help="ade: objectInfo150.txt (default: found beside the PNGs)"
    )


def _coco_spatial(args: argparse.Namespace) -> None:
    from locvlm.data.spatial import PAPER_QUESTIONS, build_coco_spatial

    options = {
        "rules": args.rules,
        "axis": args.axis,
        "both_orders": args.both_orders,
        "mirrored": args.mirrored,
        "answer_convention": read_config(args).prompts.answer_convention,
    }

    def fill(folder: Path, manifest: Manifest, instances: "Instances") -> None:
        write_questions(args, folder, manifest, build_coco_spatial(instances, **options))
        if args.axis == "horizontal":
            manifest.extra["paper_count"] = PAPER_QUESTIONS

    build_from_annotations(args, options, fill)
    counts = read_manifest(args.output)["counts"]
    asked = counts["questions"] - counts.get("mirrored", 0)
    paper = f"{PAPER_QUESTIONS:,}" if args.axis == "horizontal" else "not given"
    print(f"{'questions, mirrored ones aside':<32}{asked:>12,}\n{'paper':<32}{paper:>12}")


def _hallucination(args: argparse.Namespace) -> None:
    if args.source != "coco" and args.exclude is not None:
        raise DataError(
            f"building {args.output}: --exclude lists images of COCO, of which --source {args.source} has none"
        )
    if args.source == "act" and args.images is not None:
        raise DataError(f"building {args.output}: --images checks photographs; leave it out with --source act")
    if args.source == "ade":
        _hal_ade(args)
    elif args.source == "act":
        _hal_act(args)
    else:
        _hal_coco(args)


def _hal_coco(args: argparse.Namespace) -> None:
    from locvlm.data.hallucination import build_presence

    def fill(folder: Path, manifest: Manifest, instances: "Instances") -> None:
        write_questions(args, folder, manifest, build_presence(instances, manifest.seed, args.per_image))

    build_from_annotations(args, {"source": args.source, "per_image": args.per_image}, fill)


def _hal_ade(args: argparse.Namespace) -> None:
    from locvlm.data.ade import check_photographs, find_classes, label_maps, read_label_maps
    from locvlm.data.hallucination import ask_presence

    args.dataset = "hal-ade"  # by which the report finds the paper's column
    args.classes = args.classes or find_classes(args.annotations)
    args.input_files, args.input_folders = ("classes",), ("annotations", "images")

    def fill(folder: Path, manifest: Manifest) -> None:
        n = len(label_maps(args.annotations)[: args.limit])
        with progress("reading label maps", n) as advance:
            shown, skipped = read_label_maps(args.annotations, args.classes, args.overlap, args.limit, advance)
        if args.images is not None:
            with progress("checking images", len(shown)) as advance:
                shown, faults = check_photographs(shown, args.annotations, args.images, advance)
            skipped += faults
        manifest.skipped = dict(skipped)
        write_questions(args, folder, manifest, ask_presence(shown, manifest.seed, args.per_image))

    options = {"source": args.source, "per_image": args.per_image, "overlap": args.overlap, "limit": args.limit}
    build(args, options, fill)


def _hal_act(args: argparse.Namespace) -> None:
    from locvlm.data.actnet import present_and_absent
    from locvlm.data.hallucination import Shown, ask_presence

    args.dataset = "hal-act"
    args.input_files, args.input_folders = (), ("annotations",)

    def fill(folder: Path, manifest: Manifest) -> None:
        labels = islice(present_and_absent(args.annotations), args.limit)
        shown = (Shown(video, video, present, absent, medium="video") for video, present, absent in labels)
        write_questions(args, folder, manifest, ask_presence(shown, manifest.seed, args.per_image))

    build(args, {"source": args.source, "per_image": args.per_image, "limit": args.limit}, fill)


def write_questions(
    args: argparse.Namespace,
    folder: Path,
    manifest: Manifest,
    questions: "SpatialSet | PresenceSet | PopeSet",
) -> None:
    """Write questions.jsonl and complete the manifest. Raises DataError when there is no question."""
    if not questions.rows:
        reasons = "; ".join(f"{reason}: {n}" for reason, n in sorted(questions.skipped.items())) or "no image fits"
        raise DataError(f"building {args.output}: {named_inputs(args)} gave no question ({reasons})")
    write_jsonl(folder / "questions.jsonl", questions.rows)
    manifest.counts = dict(questions.counts)
    manifest.skipped |= questions.skipped
