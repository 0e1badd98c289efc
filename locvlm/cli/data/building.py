"""What the verbs of `locvlm data` share: options, the dataset folder, sources, progress, the closing line.

A dataset folder is built under a temporary name beside `--output` and renamed at the end, so a folder with the final
name is always whole. The same command again finds it built and does nothing; anything else that lies there is left
alone (`--force` replaces a finished data set, never another folder). What a killed run left under a temporary name is
removed by the next one.
"""

import argparse
import fcntl
import hashlib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from locvlm import __version__
from locvlm.cli.configuration import add_config_options, read_config
from locvlm.config import ExperimentConfig
from locvlm.errors import DataError
from locvlm.records import Manifest, read_json, source, write_manifest

if TYPE_CHECKING:  # pyarrow, numpy and Pillow are slow to import; a verb loads them when it runs
    from locvlm.data.coco import Instances

_T = TypeVar("_T")
_IDENTITY = ("dataset", "seed", "sources", "coordinates", "geometry", "options")
_END_BYTES = 4096


def add_verb(
    nested: "argparse._SubParsersAction[Any]",
    name: str,
    text: str,
    run: Callable[[argparse.Namespace], None],
    files: Sequence[str] = ("annotations", "captions", "exclude"),
    folders: Sequence[str] = ("images",),
) -> argparse.ArgumentParser:
    """A verb with the options that every verb has. `files`, `folders`: those of its options that name inputs; their
    fingerprints go into the manifest and decide whether the data set is built already. The value of an option may be a
    list of files; those of a folder option are large ones, known by their ends."""
    parser: argparse.ArgumentParser = nested.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="the folder to build")
    parser.add_argument("--seed", type=int, metavar="N", help="seed of every draw (default: the config's)")
    parser.add_argument("--force", action="store_true", help="replace another finished data set at --output")
    add_config_options(parser)
    parser.set_defaults(run=run, dataset=name, input_files=tuple(files), input_folders=tuple(folders))
    return parser


def add_annotation_options(parser: argparse.ArgumentParser) -> None:
    """--annotations, --images, --sizes, --class-names, --exclude and --limit: what `build_from_annotations` reads."""
    parser.add_argument(
        "--annotations",
        type=Path,
        required=True,
        metavar="PATH",
        help="COCO instances JSON, may be gzipped; or a folder of YOLO labels, or JSON lines of normalised corners",
    )
    parser.add_argument(
        "--sizes",
        type=Path,
        metavar="FILE",
        help='YOLO, normalised corners: the sizes of the images, as a COCO file or JSON {"file name": [width, height]} '
        "(default: those of --images)",
    )
    parser.add_argument(
        "--class-names",
        type=Path,
        metavar="FILE",
        help="YOLO, normalised corners: the classes, a name a line, a data.yaml or a COCO file (default: of --sizes)",
    )
    parser.set_defaults(input_files=(*parser.get_default("input_files"), "sizes", "class_names"))
    parser.add_argument(
        "--images",
        type=Path,
        metavar="DIR",
        help="folder of the images, or of their shards: leave out those missing or damaged",
    )
    parser.add_argument(
        "--exclude", type=Path, metavar="FILE", help="image ids to leave out: a JSON list, or one id a line"
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N images by id")


def positive(text: str) -> int:
    """An option value of 1 or more."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


def fraction(text: str) -> float:
    """An option value between 0 and 1, both left out."""
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} does not lie between 0 and 1")
    return value


def build(args: argparse.Namespace, options: Mapping[str, Any], fill: Callable[[Path, Manifest], None]) -> None:
    """Build one dataset folder: `fill` writes its files into a temporary folder and completes the manifest.

    `options`: all that the content depends on besides config, seed and inputs.
    """
    config = read_config(args)
    manifest = Manifest(
        args.dataset,
        counts={},
        seed=seed_of(args, config),
        sources=_sources(args),
        coordinates=config.coordinates.model_dump(mode="json"),
        geometry=config.geometry.model_dump(mode="json"),
        extra={"options": dict(options), "notes": {}, "version": __version__},
    )
    if _is_built(args, manifest):
        say_built(args)
        return
    with _new_folder(args.output) as folder:
        fill(folder, manifest)
        manifest.skipped = dict(sorted(manifest.skipped.items()))
        write_manifest(folder, manifest)
    summarise(args, manifest.to_dict())


def build_from_annotations(
    args: argparse.Namespace,
    options: Mapping[str, Any],
    fill: Callable[[Path, Manifest, "Instances"], None],
) -> None:
    """`build` from the annotated images that the options of `add_annotation_options` leave."""

    def read_and_fill(folder: Path, manifest: Manifest) -> None:
        instances = read_annotated(args)
        manifest.skipped = dict(instances.skipped)
        manifest.extra["notes"] = dict(instances.notes)
        fill(folder, manifest, instances)

    build(args, {"limit": args.limit, **options}, read_and_fill)


def read_annotated(args: argparse.Namespace) -> "Instances":
    """The annotated images that the options leave, faulty image files counted as skipped."""
    from locvlm.data.coco import check_images
    from locvlm.data.formats import read_annotations

    exclude = frozenset() if args.exclude is None else _read_ids(args.exclude)
    instances = read_annotations(
        args.annotations, exclude=exclude, images=args.images, sizes=args.sizes, class_names=args.class_names
    )
    if args.limit is not None:
        instances.images = instances.images[: args.limit]
    if args.images is not None:
        with progress("checking images", len(instances.images)) as advance:
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


def seed_of(args: argparse.Namespace, config: ExperimentConfig) -> int:
    """--seed, or else the config's."""
    return config.seed if args.seed is None else int(args.seed)


def _sources(args: argparse.Namespace) -> list[dict[str, str]]:
    """The input files and their fingerprints. Raises DataError for one that cannot be read."""
    sources = []
    for name in args.input_files:
        given: Path | list[Path] | None = getattr(args, name, None)
        paths = given if isinstance(given, list) else [] if given is None else [given]
        sources += [_file_source(name, path) for path in paths]
    for name in args.input_folders:
        given = getattr(args, name, None)
        if isinstance(given, list):
            files = [(path.name, path) for path in given]
            folder = given[0].resolve().parent
            sources.append({"path": folder.name, "fingerprint": _ends_fingerprint(files), **_blurred(folder)})
        elif given is not None:
            option = name.replace("_", "-")
            fingerprint = _folder_fingerprint(option, given)
            sources.append({"path": given.resolve().name, "fingerprint": fingerprint, **_blurred(given)})
    return sources


def _blurred(folder: Path) -> dict[str, str]:
    """What a source says of a folder of images or videos in which the faces were blurred."""
    from locvlm.data.faces import RECORD, blurred_by

    found = blurred_by(folder)
    if found is None:
        return {}
    settings = (f"{key} {value}" for key, value in found.items() if key != "detector")
    return {RECORD: ", ".join((found["detector"], *settings))}


def _file_source(option: str, path: Path) -> dict[str, str]:
    if path.is_dir():
        if option == "annotations":  # a folder of label files
            return {"path": path.resolve().name, "fingerprint": _folder_fingerprint(option, path)}
        raise DataError(f"reading --{option} {path}: this is a folder, a file was needed")
    try:
        return source(path)
    except FileNotFoundError:
        raise DataError(f"reading --{option} {path}: there is no such file") from None
    except OSError as error:
        raise DataError(f"reading --{option} {path}: {error.strerror or error}") from None


def named_inputs(args: argparse.Namespace) -> str:
    """The input files and folders as the user gave them, for a message."""
    given = (getattr(args, name, None) for name in (*args.input_files, *args.input_folders))
    paths = [value if isinstance(value, list) else [value] for value in given if value is not None]
    return ", ".join(f"{group[0]}" + (f" and {len(group) - 1} more" if group[1:] else "") for group in paths)


def _folder_fingerprint(option: str, folder: Path) -> str:
    if not folder.is_dir():
        raise DataError(f"reading --{option} {folder}: there is no such folder")
    return _ends_fingerprint(_files_below(folder))


def _files_below(folder: Path) -> Iterator[tuple[str, Path]]:
    for place, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted(files):
            path = Path(place, name)
            yield str(path.relative_to(folder)), path


def _ends_fingerprint(files: Iterable[tuple[str, Path]]) -> str:
    """Of the name, size, first and last bytes of files: all their bytes may be many gigabytes, and these are what tells
    a file that came late, was cut short or was replaced."""
    digest = hashlib.sha256()
    for name, path in files:
        digest.update(os.fsencode(name) + b"\0" + _ends(path))
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
    with writing(output):
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
    with writing(output):
        output = output.resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(output)
        folder, lock = _locked_folder(output)
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
        finally:
            os.close(lock)


def _locked_folder(output: Path) -> tuple[Path, int]:
    """A temporary folder beside `output`, and the open file that holds its lock: who has it is still building."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
        lock = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # another run takes it for an abandoned one and is removing it
            os.close(lock)
            continue
        except OSError:  # a file system without locks: nothing is ever taken for abandoned
            return folder, lock
        if folder.exists():
            return folder, lock
        os.close(lock)


def _remove_abandoned(output: Path) -> None:
    """Remove what killed runs left of `output`: temporary folders of its name that nobody holds."""
    form = re.compile(rf"\.{re.escape(output.name)}\.[a-z0-9_]{{8}}")  # as mkdtemp makes them
    for folder in output.parent.iterdir():
        if not form.fullmatch(folder.name) or folder.is_symlink() or not folder.is_dir():
            continue
        with suppress(OSError):  # held by a run under way, or not ours
            lock = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
            finally:
                os.close(lock)


@contextmanager
def writing(output: Path) -> Iterator[None]:
    """A full disk or a forbidden folder is the user's to mend."""
    try:
        yield
    except OSError as error:
        raise DataError(f"writing {output}: {error.strerror or error} ({error.filename or output})") from None


@contextmanager
def progress(text: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar on stderr, only where a person looks at it; yields the function that counts one step."""
    if not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(text, total=total)
        yield lambda: bar.advance(task)


def tracked(values: Iterable[_T], text: str, total: int) -> Iterator[_T]:
    """The values, with a bar as `progress` shows it."""
    with progress(text, total) as advance:
        for value in values:
            yield value
            advance()


def say_built(args: argparse.Namespace) -> None:
    """The closing line of a verb that found its work done."""
    print(f"{args.dataset}: already built in {args.output}")


def summarise(args: argparse.Namespace, manifest: Mapping[str, Any]) -> None:
    """The closing line: counts, what was skipped and noted, and where the data set is."""
    parts = [", ".join(f"{name} {n:,}" for name, n in manifest["counts"].items())]
    parts += [
        f"{kind}: " + ", ".join(f"{reason} {n:,}" for reason, n in sorted(manifest[kind].items()))
        for kind in ("skipped", "notes")
        if manifest.get(kind)
    ]
    print(f"{args.dataset}: {'; '.join(parts)}; in {args.output}")
