"""`locvlm data generic|described|localize-instruct`: training conversations."""

import argparse
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from locvlm.cli.configuration import read_config
from locvlm.cli.data.building import add_annotation_options, add_verb, build_from_annotations, named_inputs, tracked
from locvlm.config import ExperimentConfig
from locvlm.errors import DataError
from locvlm.records import Conversation, Manifest, medium_of

if TYPE_CHECKING:
    from locvlm.data.coco import Instances
    from locvlm.data.instruct import Renderer


def add_verbs(nested: "argparse._SubParsersAction[Any]") -> None:
    """Register the verbs."""
    generic = add_verb(nested, "generic", "captions, presence and sides: what every arm gets", _generic)
    add_annotation_options(generic)
    generic.add_argument("--captions", type=Path, metavar="FILE", help="COCO captions file")
    add_format_option(generic)

    described = add_verb(
        nested, "described", "objects described by the side of another: to teach a captioner", _described
    )
    add_annotation_options(described)
    add_format_option(described)

    instruct = add_verb(nested, "localize-instruct", "LocPred, NegPred and RevLoc conversations", _localize_instruct)
    add_annotation_options(instruct)
    instruct.add_argument(
        "--captions",
        type=Path,
        metavar="FILE",
        help='captions of objects: JSON {"<annotation id>": "text"}, or .jsonl rows {"id": .., "caption": ".."}',
    )
    add_format_option(instruct)
    instruct.add_argument(
        "--freeze-templates",
        action="store_true",
        help="store the text of the first epoch with the turns: no epoch draws templates anew, whatever the seed of "
        "the training run",
    )


def add_format_option(parser: argparse.ArgumentParser) -> None:
    """--format."""
    parser.add_argument(
        "--format",
        choices=("arrow", "llava-json"),
        default="arrow",
        help="llava-json writes conversations.json beside the Arrow file: the plain list that LLaVA, LLaMA-Factory and "
        "ms-swift read, with the text rendered for the configured coordinates",
    )


def _generic(args: argparse.Namespace) -> None:
    from locvlm.data.generic import build_generic, read_captions

    config = read_config(args)

    def fill(folder: Path, manifest: Manifest, instances: "Instances") -> None:
        captions = None if args.captions is None else read_captions(args.captions)
        if captions is not None and not any(image.id in captions for image in instances.images):
            raise DataError(
                f"building {args.output}: {args.captions} has no caption of the images of {args.annotations}; "
                "needed is the captions file of the same images"
            )
        generic = build_generic(instances, captions, manifest.seed, config.coordinates.n_bins)
        write_dataset(args, config, folder, manifest, generic)

    build_from_annotations(args, text_options(args, config), fill)


def _described(args: argparse.Namespace) -> None:
    from locvlm.data.described import build_described

    config = read_config(args)

    def fill(folder: Path, manifest: Manifest, instances: "Instances") -> None:
        write_dataset(args, config, folder, manifest, build_described(instances))

    build_from_annotations(args, text_options(args, config), fill)


def _localize_instruct(args: argparse.Namespace) -> None:
    from locvlm.data.captions import NORMALISED, normalise_captions
    from locvlm.data.columns import ImageTable
    from locvlm.data.conversations import open_conversations
    from locvlm.data.instruct import build_localize_instruct, frozen, read_object_captions, template_draws
    from locvlm.geometry import make_geometry

    config = read_config(args)

    def fill(folder: Path, manifest: Manifest, instances: "Instances") -> None:
        captions = None
        skipped: Counter[str] = Counter()
        if args.captions is not None:
            captions, skipped = read_object_captions(args.captions)
            unknown = len(captions.keys() - set(ImageTable.of(instances.images).object_ids.tolist()))
            if unknown == len(captions):
                raise DataError(
                    f"building {args.output}: none of the {unknown} annotation ids of {args.captions} is in use in "
                    f"{args.annotations}; needed are captions of the same annotation file"
                )
            if unknown:
                manifest.extra["notes"]["caption of an annotation that is not in use"] = unknown
            captions, n_changed = normalise_captions(captions, instances)
            if n_changed:
                manifest.extra["notes"][NORMALISED] = n_changed
        built = build_localize_instruct(
            instances, config.instruct, manifest.seed, captions, make_geometry(config.geometry)
        )
        conversations: Iterable[Conversation] = built
        if any(medium_of(image.file_name) != "image" for image in instances.images):
            conversations = (replace(one, medium=medium_of(one.image)) for one in built)
        if args.freeze_templates:
            conversations = frozen(conversations, _renderer(config, manifest.seed))
        write_dataset(args, config, folder, manifest, conversations)
        manifest.skipped |= skipped + built.skipped
        manifest.extra["notes"] |= built.notes
        manifest.extra["templates"] = template_draws(open_conversations(folder), manifest.seed)

    options = {"instruct": config.instruct.model_dump(mode="json"), **text_options(args, config)}
    if args.freeze_templates:
        options |= {"templates": "frozen", "prompts": config.prompts.model_dump(mode="json")}
    build_from_annotations(args, options, fill)


def write_dataset(
    args: argparse.Namespace,
    config: ExperimentConfig,
    folder: Path,
    manifest: Manifest,
    conversations: Iterable[Conversation],
    needed: str = "at least one image with an object that its category name alone picks out",
) -> None:
    """Write the files of a data set of conversations and set the counts of the manifest.

    Raises DataError, with what was `needed`, when there is none. `args` has the option of `add_format_option`.
    """
    from locvlm.data.conversations import write_conversations

    manifest.counts = write_conversations(folder, conversations)
    if not manifest.counts["conversations"]:
        raise DataError(f"building {args.output}: {named_inputs(args)} gave no conversation; needed is {needed}")
    if args.format == "llava-json":
        _write_llava_list(folder, config, manifest)


def _write_llava_list(folder: Path, config: ExperimentConfig, manifest: Manifest) -> None:
    """conversations.json: the text of epoch 0, one record a line."""
    import json

    from locvlm.data.conversations import LLAVA_NAME, llava_record, open_conversations
    from locvlm.records import atomic_write

    renderer = _renderer(config, manifest.seed)
    stored = open_conversations(folder)
    with atomic_write(folder / LLAVA_NAME) as file:
        file.write("[")
        for number, conversation in enumerate(tracked(stored, "rendering", len(stored))):
            record = llava_record(conversation, renderer.turns(conversation))
            file.write((",\n" if number else "\n") + json.dumps(record, ensure_ascii=False))
        file.write("\n]\n")


def _renderer(config: ExperimentConfig, seed: int) -> "Renderer":
    from locvlm.coordinates import make_location_format
    from locvlm.data.instruct import Renderer
    from locvlm.geometry import make_geometry

    return Renderer(make_location_format(config.coordinates, make_geometry(config.geometry)), config.prompts, seed)


def text_options(args: argparse.Namespace, config: ExperimentConfig) -> dict[str, Any]:
    """What the text of a llava-json list depends on; an Arrow file holds no rendered text."""
    if args.format == "arrow":
        return {"format": "arrow"}
    return {"format": "llava-json", "prompts": config.prompts.model_dump(mode="json")}
