"""`locvlm data captions|llava|video-instruct`: what others published, as conversations."""

import argparse
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from locvlm.cli.configuration import read_config
from locvlm.cli.data.building import add_verb, build, progress
from locvlm.cli.data.conversations import add_format_option, text_options, write_dataset
from locvlm.cli.data.shards import find_files
from locvlm.errors import ConfigError, DataError
from locvlm.records import Conversation, Manifest

if TYPE_CHECKING:
    from locvlm.data.pretraining import Parts

_MIB = 1 << 20


def add_verbs(nested: "argparse._SubParsersAction[Any]") -> None:
    """Register the verbs."""
    captions = add_verb(
        nested,
        "captions",
        "stage-1 captions from LLaVA's lists (CC3M-595K, LCS-558K) or from CC3M tar files",
        _captions,
        ("source",),
        ("images", "tars"),
    )
    captions.add_argument(
        "--source",
        nargs="+",
        required=True,
        metavar="FILE",
        help="LLaVA JSON lists, or tar files of a webdataset (also a folder of them, or a pattern '*.tar'); tar files "
        "are indexed where they lie, so that the output is also what --images takes",
    )
    llava = add_verb(
        nested, "llava", "LLaVA-Instruct (80K, 158K, 665K) or VideoChat lists, read once", _llava, ("source",)
    )
    llava.add_argument("--source", nargs="+", required=True, metavar="FILE", help="LLaVA JSON lists")
    for parser in (captions, llava):
        parser.add_argument(
            "--images", type=Path, metavar="DIR", help="images of a list: leave out those missing or damaged"
        )
        add_format_option(parser)

    video = add_verb(nested, "video-instruct", "VideoInstruct-100K", _video_instruct, ("source",), ("videos",))
    video.add_argument("--source", nargs="+", required=True, metavar="FILE", help="JSON list [{q, a, video_id}]")
    video.add_argument("--videos", type=Path, metavar="DIR", help="folder of the videos: leave out those missing")
    video.add_argument(
        "--file-name",
        default="{video_id}.mp4",
        metavar="PATTERN",
        help="name of a video's file (%(default)s); in --videos another ending is found too",
    )
    video.add_argument(
        "--group", choices=("qa", "video"), default="qa", help="a conversation a question, or a video (%(default)s)"
    )
    add_format_option(video)


def _captions(args: argparse.Namespace) -> None:
    from locvlm.data.pretraining import listed_captions

    if not _are_tars(args.source):
        _build_from_lists(args, listed_captions)
        return
    if args.images is not None:
        raise ConfigError("reading --images: the images of tar files are in them; leave --images out")
    args.tars, args.source = find_files("source", args.source, ".tar"), None
    _build(args, {"source": "tar"}, _make_tar_parts, by_image=True)


def _llava(args: argparse.Namespace) -> None:
    from locvlm.data.conversations import literal_conversations

    _build_from_lists(args, literal_conversations)


def _are_tars(names: list[str]) -> bool:
    """Whether --source names tar files. Raises ConfigError for a mixture of lists and tar files."""
    kinds = {name.endswith(".tar") or Path(name).is_dir() for name in names}
    if len(kinds) > 1:
        raise ConfigError("reading --source: lists and tar files are two data sets; build one of each")
    return kinds.pop()


def _build_from_lists(
    args: argparse.Namespace, read: Callable[[Iterable[bytes], Counter[str], int], Iterator[Conversation]]
) -> None:
    args.source = find_files("source", args.source, ".json")

    def make(args: argparse.Namespace, manifest: Manifest, parts: "Parts") -> None:
        _make_list_parts(args, parts, read)

    _build(args, {"source": "list"}, make)


def _build(
    args: argparse.Namespace,
    options: dict[str, Any],
    make: Callable[[argparse.Namespace, Manifest, "Parts"], None],
    *,
    by_image: bool = False,
) -> None:
    """Make the parts, then the data set from them; the parts go when it is whole."""
    from locvlm.data.pretraining import HARMLESS, Parts, distinct

    config = read_config(args)
    place = args.output.resolve().with_name(f".{args.output.resolve().name}.parts")

    def fill(folder: Path, manifest: Manifest) -> None:
        parts = Parts(place, json.dumps(manifest.to_dict(), sort_keys=True))
        try:
            make(args, manifest, parts)
            skipped = parts.skipped()
            _refuse_useless(args, parts, skipped, HARMLESS)
        except DataError:  # another run would find the same
            parts.remove()
            raise
        write_dataset(args, config, folder, manifest, distinct(parts.conversations(), skipped, by_image=by_image))
        if by_image:
            parts.index().write(folder)
        manifest.skipped = dict(skipped)

    build(args, {**options, **text_options(args, config)}, fill)
    shutil.rmtree(place, ignore_errors=True)


def _refuse_useless(args: argparse.Namespace, parts: "Parts", skipped: Counter[str], harmless: Iterable[str]) -> None:
    """Raises DataError when nothing can be used, or when most records are faulty."""
    from locvlm.data.coco import refuse_if_most_skipped
    from locvlm.data.conversations import open_conversations

    usable = sum(len(open_conversations(part)) for part in parts.made)
    first = (args.source or args.tars)[0]
    if not usable:
        reasons = "; ".join(f"{reason}: {n}" for reason, n in sorted(skipped.items())) or "it is empty"
        raise DataError(f"building {args.output}: nothing of {first} can be used ({reasons})")
    faults = {reason: n for reason, n in skipped.items() if reason not in harmless}
    refuse_if_most_skipped(first, "records", faults, usable + sum(faults.values()))


def _make_list_parts(
    args: argparse.Namespace,
    parts: "Parts",
    read: Callable[[Iterable[bytes], Counter[str], int], Iterator[Conversation]],
) -> None:
    from locvlm.data.pretraining import RECORDS_A_PART, stream_list, with_sound_images
    from locvlm.pixels import open_images

    images = None if args.images is None else open_images(args.images)

    def part(records: list[bytes], first: int) -> Callable[[Path, Counter[str]], Iterable[Conversation]]:
        def fill(_: Path, skipped: Counter[str]) -> Iterable[Conversation]:
            conversations = read(records, skipped, first)
            return conversations if images is None else with_sound_images(conversations, images, skipped)

        return fill

    for number, path in enumerate(args.source):
        with progress(f"reading {path.name}", path.stat().st_size // _MIB + 1) as advance:
            rest = stream_list(path, advance)
            first = 0
            while records := list(islice(rest, RECORDS_A_PART)):
                parts.make(f"{number:05d}-{first:09d}", part(records, first))
                first += len(records)


def _make_tar_parts(args: argparse.Namespace, manifest: Manifest, parts: "Parts") -> None:
    from locvlm.data.pretraining import dead_links, tar_captions

    final, seed = args.output.resolve(), manifest.seed
    with progress("reading tar files", len(args.tars)) as advance:
        for number, path in enumerate(args.tars):

            def fill(part: Path, skipped: Counter[str], path: Path = path) -> Iterator[Conversation]:
                return tar_captions(path, part, final, skipped, seed)

            parts.make(f"{number:05d}", fill)
            advance()
    if n := dead_links(args.tars):
        manifest.extra["notes"]["image that could not be downloaded, by the statistics beside the tar files"] = n


def _video_instruct(args: argparse.Namespace) -> None:
    from locvlm.data.coco import refuse_if_most_skipped
    from locvlm.data.pretraining import HARMLESS, distinct, video_instructions

    args.source = find_files("source", args.source, ".json")
    config = read_config(args)
    file_name = _video_names(args)

    def fill(folder: Path, manifest: Manifest) -> None:
        skipped: Counter[str] = Counter()
        missing: set[str] = set()

        def find(video_id: str) -> str | None:
            name = file_name(video_id)
            if name is None:
                missing.add(video_id)
            return name

        def conversations() -> Iterator[Conversation]:
            for path in args.source:
                yield from video_instructions(path, find, skipped, args.group)

        needed = "a list [{q, a, video_id}]" + ("" if args.videos is None else f" about videos in {args.videos}")
        write_dataset(args, config, folder, manifest, distinct(conversations(), skipped), needed)
        faults = {reason: n for reason, n in skipped.items() if reason not in HARMLESS}
        total = manifest.counts["conversations"] + sum(faults.values())
        refuse_if_most_skipped(args.source[0], "records", faults, total)
        manifest.skipped = dict(skipped)
        if missing:
            manifest.extra["notes"]["video that is missing"] = len(missing)

    build(args, {"file_name": args.file_name, "group": args.group, **text_options(args, config)}, fill)


def _video_names(args: argparse.Namespace) -> Callable[[str], str | None]:
    """Video id -> the name of its file, None when it is not in --videos. Raises ConfigError for a bad --file-name."""
    try:
        if args.file_name.format(video_id="1") == args.file_name:
            raise KeyError("video_id")
    except (KeyError, IndexError, ValueError) as fault:
        raise ConfigError(
            f"reading --file-name {args.file_name!r}: {fault}; it needs {{video_id}} and no other"
        ) from None
    if args.videos is None:
        return lambda video_id: str(args.file_name).format(video_id=video_id)
    if not args.videos.is_dir():
        raise DataError(f"reading --videos {args.videos}: there is no such folder")
    found: dict[str, str] = {}
    for path in sorted(path for path in args.videos.rglob("*") if path.is_file()):
        name = path.relative_to(args.videos)
        found.setdefault(name.with_suffix("").as_posix(), name.as_posix())

    def find(video_id: str) -> str | None:
        return found.get(Path(args.file_name.format(video_id=video_id)).with_suffix("").as_posix())

    return find
