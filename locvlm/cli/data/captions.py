"""`locvlm data prefcoco`: objects with pseudo-captions as conversations."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from locvlm.cli.configuration import read_config
from locvlm.cli.data.building import add_annotation_options, add_verb, build_from_annotations
from locvlm.cli.data.conversations import add_format_option, text_options, write_dataset
from locvlm.records import Manifest, read_manifest

if TYPE_CHECKING:
    from locvlm.data.coco import Instances


def add_verbs(nested: "argparse._SubParsersAction[Any]") -> None:
    """Register the verb."""
    parser = add_verb(nested, "prefcoco", "a LocPred and a RevLoc pair for every object with a caption", _prefcoco)
    add_annotation_options(parser)
    parser.add_argument(
        "--captions",
        type=Path,
        required=True,
        metavar="FILE",
        help='output of `locvlm caption`, JSON {"<annotation id>": "text"}, or .jsonl rows {"id": .., "caption": ".."}',
    )
    add_format_option(parser)


def _prefcoco(args: argparse.Namespace) -> None:
    from locvlm.data.captions import PAPER, build_prefcoco, crowd_variants
    from locvlm.data.instruct import read_object_captions
    from locvlm.geometry import make_geometry

    config = read_config(args)

    def fill(folder: Path, manifest: Manifest, instances: "Instances") -> None:
        captions, faults = read_object_captions(args.captions)
        known = {thing.id for image in instances.images for thing in image.objects}
        if unknown := len(captions.keys() - known):
            manifest.extra["notes"]["caption of an annotation that is not in use"] = unknown
        conversations = build_prefcoco(instances, config.instruct, captions, make_geometry(config.geometry))
        needed = "captions of the same annotation file, of objects that their category name alone picks out"
        write_dataset(args, config, folder, manifest, conversations, needed)
        objects = manifest.counts["loc_pred"]
        manifest.counts |= {"objects": objects, "qa_pairs": 2 * objects}
        manifest.skipped |= faults + conversations.skipped
        manifest.extra["notes"] |= conversations.notes
        manifest.extra |= {"crowd_variants": crowd_variants(instances), "paper": PAPER}

    build_from_annotations(
        args, {"instruct": config.instruct.model_dump(mode="json"), **text_options(args, config)}, fill
    )
    _compare(read_manifest(args.output), config.instruct.crowd)


def _compare(manifest: Mapping[str, Any], used: str) -> None:
    """The objects that their category name alone picks out, by each rule for crowd regions, beside the paper's."""
    print(f"{'unique objects, crowd regions':<32}{'images':>9}{'objects':>9}{'qa pairs':>10}")
    for rule, counts in manifest["crowd_variants"].items():
        name = f"{rule} (used)" if rule == used else rule
        print(f"{name:<32}{counts['images']:>9,}{counts['objects']:>9,}{2 * counts['objects']:>10,}")
    paper = manifest["paper"]
    print(f"{'paper (train2017, captioned)':<32}{paper['images']:>9,}{paper['objects']:>9,}{paper['qa_pairs']:>10,}")
