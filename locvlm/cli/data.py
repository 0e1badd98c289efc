"""`locvlm data <verb>`: from annotation files and images to dataset folders.

A dataset folder is built under a temporary name beside `--output` and renamed at the end, so a folder with the final
name is always whole. The same command again finds it built and does nothing; anything else that lies there is left
alone (`--force` replaces a finished data set, never another folder).
"""

import argparse
import hashlib
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from locvlm.cli.configuration import add_config_options, read_config
from locvlm.config import ExperimentConfig
from locvlm.errors import DataError
from locvlm.records import Conversation, Manifest, read_json, read_manifest, source, write_jsonl, write_manifest

if TYPE_CHECKING:  # pyarrow, numpy and Pillow are slow to import; a verb loads them when it runs
    from locvlm.data.coco import Instances
    from locvlm.data.hallucination import PresenceSet
    from locvlm.data.spatial import SpatialSet

_T = TypeVar("_T")
_IDENTITY = ("dataset", "seed", "sources", "coordinates", "geometry", "options")
_END_BYTES = 4096


def add_verbs(verbs: "argparse._SubParsersAction[Any]") -> None:
    """Register `data` and its verbs."""
    data = verbs.add_parser("data", help="build data sets from annotations and images")
    nested = data.add_subparsers(title="data verbs", metavar="<verb>", required=True)

    scenes = _verb(nested, "scenes", "draw scenes of coloured shapes, with COCO annotations and captions", _scenes)
    scenes.add_argument("--n-train", type=_positive, default=2000, metavar="N", help="training scenes (%(default)s)")
    scenes.add_argument("--n-test", type=_positive, default=400, metavar="N", help="test scenes (%(default)s)")

    coco = _verb(nested, "coco", "check a COCO file and its images, and split it into train and test", _coco)
    _add_annotation_options(coco)
    coco.add_argument("--captions", type=Path, metavar="FILE", help="COCO captions file, split likewise")
    coco.add_argument("--test-fraction", type=_fraction, default=0.2, metavar="X", help="share of test images (0.2)")

    generic = _verb(nested, "generic", "captions, presence and side questions: the dose every arm gets", _generic)
    _add_annotation_options(generic)
    generic.add_argument("--captions", type=Path, metavar="FILE", help="COCO captions file")
    _add_format_option(generic)

    instruct = _verb(nested, "localize-instruct", "LocPred, NegPred and RevLoc conversations", _localize_instruct)
    _add_annotation_options(instruct)
    instruct.add_argument(
        "--captions",
        type=Path,
        metavar="FILE",
        help='captions of objects: JSON {"<annotation id>": "text"}, or .jsonl rows {"id": .., "caption": ".."}',
    )
    _add_format_option(instruct)

    spatial = _verb(nested, "coco-spatial", "the COCO-Spatial questions (paper, section 4.1)", _coco_spatial)
    _add_annotation_options(spatial)
    spatial.add_argument("--rules", choices=("paper", "released"), default="paper", help="which selection rules")
    spatial.add_argument(
        "--axis", choices=("horizontal", "vertical"), default="horizontal", help="left/right, or above/below"
    )
    spatial.add_argument(
        "--both-orders", action="store_true", help="released rules: ask each pair the other way round as well"
    )

    presence = _verb(nested, "hallucination", "presence questions: two present and two absent objects", _hallucination)
    _add_annotation_options(presence)
    presence.add_argument("--per-image", type=_positive, default=2, metavar="N", help="objects of each kind (2)")


def _verb(
    nested: "argparse._SubParsersAction[Any]", name: str, text: str, run: Callable[[argparse.Namespace], None]
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = nested.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="the folder to build")
    parser.add_argument("--seed", type=int, metavar="N", help="seed of every draw (default: the config's)")
    parser.add_argument("--force", action="store_true", help="replace another finished data set at --output")
    add_config_options(parser)
    parser.set_defaults(run=run, dataset=name)
    return parser


def _add_annotation_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--annotations", type=Path, required=True, metavar="FILE", help="COCO instances JSON, may be gzipped"
    )
    parser.add_argument(
        "--images", type=Path, metavar="DIR", help="folder of the images: leave out those missing or damaged"
    )
    parser.add_argument(
        "--exclude", type=Path, metavar="FILE", help="image ids to leave out: a JSON list, or one id a line"
    )
    parser.add_argument("--limit", type=_positive, metavar="N", help="only the first N images by id")


def _add_format_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--format",
        choices=("arrow", "llava-json"),
        default="arrow",
        help="llava-json writes conversations.json beside the Arrow file: the plain list that LLaVA, LLaMA-Factory and "
        "ms-swift read, with the text rendered for the configured coordinates",
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} does not lie between 0 and 1")
    return value


# --- the verbs ---------------------------------------------------------------------------------------------------


def _scenes(args: argparse.Namespace) -> None:
    from locvlm.data.scenes import draw_scenes

    seed = _seed(args, read_config(args))
    manifest = args.output / "manifest.json"
    before = _stamp(manifest)
    with _writing(args.output):
        draw_scenes(args.output, seed, args.n_train, args.n_test, force=args.force)
    if _stamp(manifest) == before:
        _say_built(args)
    else:
        _summarise(args, read_manifest(args.output))


def _coco(args: argparse.Namespace) -> None:
    from locvlm.data.coco import split_captions, split_instances
    from locvlm.data.instruct import draw

    def fill(folder: Path, manifest: Manifest, instances: "Instances") -> None:
        parts = 1 << 32

        def is_test(image_id: int) -> bool:
            return draw(parts, manifest.seed, "split", image_id) < parts * float(args.test_fraction)

        manifest.counts = {
            "images": len(instances.images),
            **split_instances(args.annotations, instances, folder, is_test),
        }
        if not manifest.counts["images_train"] or not manifest.counts["images_test"]:
            raise DataError(
                f"splitting {args.annotations}: of {len(instances.images)} images {manifest.counts['images_test']} "
                f"are for testing at --test-fraction {args.test_fraction}; both parts need one, so choose another "
                "fraction or seed, or more images"
            )
        if args.captions is not None:
            manifest.counts |= split_captions(args.captions, instances, folder, is_test)

    _build(args, {"test_fraction": args.test_fraction}, fill)


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
        _write_conversations(args, config, folder, manifest, build_generic(instances, captions, manifest.seed))

    _build(args, _text_options(args, config), fill)


def _localize_instruct(args: argparse.Namespace) -> None:
    from locvlm.data.instruct import build_localize_instruct, read_object_captions
    from locvlm.geometry import make_geometry

    config = read_config(args)

    def fill(folder: Path, manifest: Manifest, instances: "Instances") -> None:
        captions = None
        skipped: Counter[str] = Counter()
        if args.captions is not None:
            captions, skipped = read_object_captions(args.captions)
            unknown = len(captions.keys() - {thing.id for image in instances.images for thing in image.objects})
            if unknown == len(captions):
                raise DataError(
                    f"building {args.output}: none of the {unknown} annotation ids of {args.captions} is in use in "
                    f"{args.annotations}; needed are captions of the same annotation file"
                )
            if unknown:
                manifest.extra["notes"]["caption of an annotation that is not in use"] = unknown
        conversations = build_localize_instruct(
            instances, config.instruct, manifest.seed, captions, make_geometry(config.geometry)
        )
        _write_conversations(args, config, folder, manifest, conversations)
        manifest.skipped |= skipped + conversations.skipped
        manifest.extra["notes"] |= conversations.notes

    _build(args, {"instruct": config.instruct.model_dump(mode="json"), **_text_options(args, config)}, fill)


def _coco_spatial(args: argparse.Namespace) -> None:
    from locvlm.data.spatial import build_coco_spatial

    options = {
        "rules": args.rules,
        "axis": args.axis,
        "both_orders": args.both_orders,
        "answer_convention": read_config(args).prompts.answer_convention,
    }

    def fill(folder: Path, manifest: Manifest, instances: "Instances") -> None:
        _write_questions(args, folder, manifest, build_coco_spatial(instances, **options))

    _build(args, options, fill)


def _hallucination(args: argparse.Namespace) -> None:
    from locvlm.data.hallucination import build_presence

    def fill(folder: Path, manifest: Manifest, instances: "Instances") -> None:
        _write_questions(args, folder, manifest, build_presence(instances, manifest.seed, args.per_image))

    _build(args, {"per_image": args.per_image}, fill)


# --- what the verbs share ----------------------------------------------------------------------------------------


def _build(
    args: argparse.Namespace,
    options: Mapping[str, Any],
    fill: Callable[[Path, Manifest, "Instances"], None],
) -> None:
    """Build one dataset folder: `fill` writes its files into a temporary folder and completes the manifest."""
    config = read_config(args)
    manifest = Manifest(
        args.dataset,
        counts={},
        seed=_seed(args, config),
        sources=_sources(args),
        coordinates=config.coordinates.model_dump(mode="json"),
        geometry=config.geometry.model_dump(mode="json"),
        extra={"options": {"limit": args.limit, **options}, "notes": {}},
    )
    if _is_built(args, manifest):
        _say_built(args)
        return
    instances = _read_instances(args)
    manifest.skipped = dict(instances.skipped)
    manifest.extra["notes"] = dict(instances.notes)
    with _new_folder(args.output) as folder:
        fill(folder, manifest, instances)
        manifest.skipped = dict(sorted(manifest.skipped.items()))
        write_manifest(folder, manifest)
    _summarise(args, manifest.to_dict())


def _read_instances(args: argparse.Namespace) -> "Instances":
    """The annotated images that the options leave, faulty image files counted as skipped."""
    from locvlm.data.coco import check_images, read_instances

    exclude = frozenset() if args.exclude is None else _read_ids(args.exclude)
    instances = read_instances(args.annotations, exclude=exclude)
    if args.limit is not None:
        instances.images = instances.images[: args.limit]
    if args.images is not None:
        with _progress("checking images", len(instances.images)) as advance:
            instances.images, faults = check_images(instances.images, args.images, advance)
        instances.skipped += faults
    if not instances.images:
        raise DataError(f"building {args.output}: no image of {args.annotations} is left; exclude fewer")
    return instances


def _read_ids(path: Path) -> frozenset[int]:
    """Image ids from a JSON list or from lines."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"reading the image ids {path}: {error}") from None
    values = read_json(path) if text.lstrip().startswith(("[", "{")) else text.split()
    try:
        if not isinstance(values, list):
            raise TypeError
        return frozenset(int(str(value)) for value in values)
    except (TypeError, ValueError):
        raise DataError(
            f"reading the image ids {path}: needed is a JSON list of whole numbers, or one whole number a line"
        ) from None


def _write_conversations(
    args: argparse.Namespace,
    config: ExperimentConfig,
    folder: Path,
    manifest: Manifest,
    conversations: Iterable[Conversation],
) -> None:
    from locvlm.data.conversations import write_conversations

    manifest.counts = write_conversations(folder, conversations)
    if not manifest.counts["conversations"]:
        raise DataError(
            f"building {args.output}: {args.annotations} gave no conversation; needed is at least one image with an "
            "object that its category name alone picks out"
        )
    if args.format == "llava-json":
        _write_llava_list(folder, config, manifest)


def _write_llava_list(folder: Path, config: ExperimentConfig, manifest: Manifest) -> None:
    """conversations.json: the text of epoch 0, one record a line."""
    import json

    from locvlm.coordinates import make_location_format
    from locvlm.data.conversations import LLAVA_NAME, llava_record, open_conversations
    from locvlm.data.instruct import Renderer
    from locvlm.geometry import make_geometry
    from locvlm.records import atomic_write

    location = make_location_format(config.coordinates, make_geometry(config.geometry))
    renderer = Renderer(location, config.prompts, manifest.seed)
    stored = open_conversations(folder)
    with atomic_write(folder / LLAVA_NAME) as file:
        file.write("[")
        for number, conversation in enumerate(_tracked(stored, "rendering", len(stored))):
            record = llava_record(conversation, renderer.turns(conversation))
            file.write((",\n" if number else "\n") + json.dumps(record, ensure_ascii=False))
        file.write("\n]\n")


def _write_questions(
    args: argparse.Namespace,
    folder: Path,
    manifest: Manifest,
    questions: "SpatialSet | PresenceSet",
) -> None:
    if not questions.rows:
        reasons = "; ".join(f"{reason}: {n}" for reason, n in sorted(questions.skipped.items())) or "no image fits"
        raise DataError(f"building {args.output}: {args.annotations} gave no question ({reasons})")
    write_jsonl(folder / "questions.jsonl", questions.rows)
    manifest.counts = dict(questions.counts)
    manifest.skipped |= questions.skipped


def _text_options(args: argparse.Namespace, config: ExperimentConfig) -> dict[str, Any]:
    """What the text of a llava-json list depends on; an Arrow file holds no rendered text."""
    if args.format == "arrow":
        return {"format": "arrow"}
    return {"format": "llava-json", "prompts": config.prompts.model_dump(mode="json")}


def _seed(args: argparse.Namespace, config: ExperimentConfig) -> int:
    return config.seed if args.seed is None else int(args.seed)


def _sources(args: argparse.Namespace) -> list[dict[str, str]]:
    """The input files and their fingerprints. Raises DataError for one that cannot be read."""
    sources = []
    for name in ("annotations", "captions", "exclude"):
        path: Path | None = getattr(args, name, None)
        if path is None:
            continue
        if path.is_dir():
            raise DataError(f"reading --{name} {path}: this is a folder, a file was needed")
        try:
            sources.append(source(path))
        except FileNotFoundError:
            raise DataError(f"reading --{name} {path}: there is no such file") from None
        except OSError as error:
            raise DataError(f"reading --{name} {path}: {error.strerror or error}") from None
    if args.images is not None:
        sources.append({"path": args.images.resolve().name, "fingerprint": _images_fingerprint(args.images)})
    return sources


def _images_fingerprint(folder: Path) -> str:
    """Of the name, size, first and last bytes of all files below a folder of images: all their bytes may be many
    gigabytes, and these are what tells a file that came late, was cut short or was replaced."""
    if not folder.is_dir():
        raise DataError(f"reading --images {folder}: there is no such folder")
    digest = hashlib.sha256()
    for place, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted(files):
            path = Path(place, name)
            digest.update(os.fsencode(path.relative_to(folder)) + b"\0" + _ends(path))
    return f"names-sizes-ends:sha256:{digest.hexdigest()}"


def _ends(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _END_BYTES))
            last = file.read(_END_BYTES)
            file.seek(0)
            return f"{size}\0".encode() + file.read(_END_BYTES) + last
    except OSError:  # a dangling link, a file that may not be read: the check of the images counts it
        return b"unreadable\0"


def _is_built(args: argparse.Namespace, wanted: Manifest) -> bool:
    """Whether `--output` is already what was asked for. Raises DataError when it is something else."""
    output: Path = args.output
    with _writing(output):
        if not os.path.lexists(output) or (output.is_dir() and not any(output.iterdir())):
            return False
        finished = (output / "manifest.json").is_file()
    found = read_json(output / "manifest.json") if finished else None
    if not isinstance(found, dict) or "dataset" not in found:
        raise DataError(
            f"building {output}: it exists and is not a finished data set; name another folder, or remove it yourself"
        )
    other = [key for key in _IDENTITY if found.get(key) != wanted.to_dict()[key]]
    if other and not args.force:
        raise DataError(
            f"building {output}: it holds a finished data set ({found.get('dataset')}) that differs in "
            f"{', '.join(other)}; name another folder, or pass --force to replace it"
        )
    return not other


@contextmanager
def _new_folder(output: Path) -> Iterator[Path]:
    """A temporary folder beside `output` that takes its name on success; on an error nothing is left behind."""
    with _writing(output):
        output = output.resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
        try:
            folder.chmod(0o755)
            yield folder
            if output.exists() and any(output.iterdir()):  # with --force: swap, then remove the old one
                old = Path(tempfile.mkdtemp(prefix=f".{output.name}.old.", dir=output.parent))
                output.rename(old / output.name)
                folder.rename(output)
                shutil.rmtree(old)
            else:
                folder.rename(output)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise


@contextmanager
def _writing(output: Path) -> Iterator[None]:
    """A full disk or a forbidden folder is the user's to mend."""
    try:
        yield
    except OSError as error:
        raise DataError(f"writing {output}: {error.strerror or error} ({error.filename or output})") from None


def _stamp(path: Path) -> tuple[int, int] | None:
    if not path.exists():
        return None
    status = path.stat()
    return status.st_ino, status.st_mtime_ns


@contextmanager
def _progress(text: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar on stderr, only where a person looks at it; yields the function that counts one step."""
    if not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(text, total=total)
        yield lambda: bar.advance(task)


def _tracked(values: Iterable[_T], text: str, total: int) -> Iterator[_T]:
    with _progress(text, total) as advance:
        for value in values:
            yield value
            advance()


def _say_built(args: argparse.Namespace) -> None:
    print(f"{args.dataset}: already built in {args.output}")


def _summarise(args: argparse.Namespace, manifest: Mapping[str, Any]) -> None:
    parts = [", ".join(f"{name} {n:,}" for name, n in manifest["counts"].items())]
    parts += [
        f"{kind}: " + ", ".join(f"{reason} {n:,}" for reason, n in sorted(manifest[kind].items()))
        for kind in ("skipped", "notes")
        if manifest.get(kind)
    ]
    print(f"{args.dataset}: {'; '.join(parts)}; in {args.output}")
