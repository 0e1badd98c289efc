"""`locvlm data show|card`: a page to look into a data set, and its data set card."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from locvlm.cli.configuration import add_config_options, read_config
from locvlm.cli.data.building import positive, writing
from locvlm.errors import ConfigError, DataError
from locvlm.records import atomic_write

if TYPE_CHECKING:
    from locvlm.data.instruct import Renderer
    from locvlm.data.pages import Picture
    from locvlm.pixels import ImageSource


def add_verbs(nested: "argparse._SubParsersAction[Any]") -> None:
    """Register the verbs."""
    show = nested.add_parser(
        "show",
        help="look into a data set: one HTML page of samples with their boxes, and the distribution",
        description="Write one HTML page (no script, no outside reference): samples with the boxes drawn and the text "
        "beside, then what the whole data set holds. Places are written as the data set's manifest says, or as "
        "--preset, --config and --set say where one of them is given.",
    )
    show.add_argument(
        "dataset", type=Path, help="a data set folder, a LLaVA JSON list, or a benchmark's file of questions"
    )
    show.add_argument("--n", type=positive, default=20, metavar="N", help="samples (%(default)s)")
    show.add_argument("--images", type=Path, metavar="DIR", help="folder of the images; without it an empty canvas")
    show.add_argument("--videos", type=Path, metavar="DIR", help="folder of the videos: a middle frame is shown")
    show.add_argument("--seed", type=int, default=0, metavar="N", help="of the draw of the samples (%(default)s)")
    show.add_argument("--objective", default="", metavar="NAME", help="only samples of this objective")
    show.add_argument("--output", type=Path, metavar="FILE", help="the page, .html (default: the data set's name)")
    add_config_options(show)
    show.set_defaults(run=_show)

    card = nested.add_parser(
        "card",
        help="write a data set card",
        description="Write the card of a data set: Markdown with the header that the Hugging Face hub reads. All it "
        "says comes from the manifest and the data; what they do not say is called not recorded.",
    )
    card.add_argument("dataset", type=Path, help="a data set folder")
    card.set_defaults(preset=None, config=None, overrides=[])  # its example is written as the manifest says
    card.add_argument("--license", default="", metavar="ID", help="licence of the data as the hub calls it: cc-by-4.0")
    card.add_argument("--output", type=Path, metavar="FILE", help="the card, .md (default: print it)")
    card.set_defaults(run=_card)


def _show(args: argparse.Namespace) -> None:
    from locvlm.data.show import View, write_page
    from locvlm.pixels import INDEX_NAME, open_images

    output: Path = args.output or Path(f"{args.dataset.resolve().stem}.html")
    _refuse_other_suffix(output, (".html", ".htm"))
    renderer, how = _renderer(args)
    folder: Path | None = args.images
    if folder is None and (args.dataset / INDEX_NAME).is_file():
        folder = args.dataset  # captions from tar files lie beside the index of their images
    pictures = None
    if folder is not None or args.videos is not None:
        pictures = _Pictures(None if folder is None else open_images(folder), args.videos)
    with writing(output):
        shown = write_page(args.dataset, output, View(args.n, args.seed, args.objective, pictures, renderer, how))
    faults = "".join(f"; {reason}: {n}" for reason, n in shown.faults.items())
    print(f"show: {shown.samples} samples{faults}; in {output}")


def _renderer(args: argparse.Namespace) -> "tuple[Renderer | None, str]":
    """What writes the structured turns of the data set, and how in words: as its manifest says, or as the configuration
    that is given. None when neither says how places are written."""
    from locvlm.config import PromptConfig
    from locvlm.coordinates import make_location_format
    from locvlm.data.instruct import Renderer
    from locvlm.evaluation.questions import manifest_of, places_of
    from locvlm.geometry import make_geometry

    if not args.dataset.exists():
        raise DataError(f"looking into {args.dataset}: there is no such file or folder")
    manifest = manifest_of(args.dataset)
    coordinates, geometry = places_of(args.dataset, manifest)
    prompts, whose = PromptConfig(), "the manifest"
    if args.config is not None or args.preset is not None or args.overrides:
        config = read_config(args)
        coordinates, geometry, prompts = config.coordinates, config.geometry, config.prompts
        whose = f"the configuration {config.name}"
    if coordinates is None:
        return None, ""
    found = manifest.get("seed")
    seed = found if isinstance(found, int) else 0
    location = make_location_format(coordinates, None if geometry is None else make_geometry(geometry))
    form = {**coordinates.model_dump(mode="json"), **(geometry.model_dump(mode="json") if geometry else {})}
    words = "; ".join(f"{key} {value}" for key, value in form.items())
    how = f"places as in {whose}: {words}; templates drawn with seed {seed}, epoch 0"
    return Renderer(location, prompts, seed), how


class _Pictures:
    """The pictures of a page, by name; see `locvlm.data.show.Shoot`."""

    def __init__(self, images: "ImageSource | None", videos: Path | None) -> None:
        if videos is not None and not videos.is_dir():
            raise DataError(f"looking for videos in {videos}: there is no such folder; correct or drop --videos")
        self._images, self._videos = images, videos

    def __call__(self, name: str, medium: str, indices: Sequence[int]) -> "Picture | str":
        from locvlm.records import leads_out

        if not name:
            return f"the record names no {medium}"
        if leads_out(name):
            return f"the {medium} name leads out of the folder"
        return self._frame(name, indices) if medium == "video" else self._image(name, mirror=medium.startswith("mirr"))

    def _image(self, name: str, *, mirror: bool) -> "Picture | str":
        from PIL import ImageOps

        from locvlm.data.pages import picture

        if self._images is None:
            return "no image folder was given"
        if not self._images.has(name):
            return "the image file is missing"
        try:
            image = self._images.open(name)
            return picture(ImageOps.mirror(image) if mirror else image)
        except DataError:
            return "the image file does not decode"

    def _frame(self, name: str, indices: Sequence[int]) -> "Picture | str":
        from locvlm.data.pages import picture
        from locvlm.data.video import read_frames

        if self._videos is None:
            return "no video folder was given"
        path = self._videos / name
        if not path.is_file():
            return "the video file is missing"
        try:
            for sampling in ("vcgpt", "segment_centre"):
                frames = read_frames(path, len(indices) or 1, sampling)
                if not indices or tuple(frames.indices) == tuple(indices):
                    return picture(frames.images[len(frames.images) // 2])
        except DataError:
            return "the video does not decode"
        return "the video does not have the frames of the labels"


def _card(args: argparse.Namespace) -> None:
    from locvlm.data.card import dataset_card

    text = dataset_card(args.dataset, args.license, _renderer(args)[0])
    if args.output is None:
        print(text, end="")
        return
    _refuse_other_suffix(args.output, (".md",))
    with writing(args.output), atomic_write(args.output) as file:
        file.write(text)
    print(f"card: in {args.output}")


def _refuse_other_suffix(output: Path, suffixes: Sequence[str]) -> None:
    """A slip must not replace a file of another kind."""
    if output.suffix not in suffixes:
        raise ConfigError(f"writing {output}: the name must end in {' or '.join(suffixes)}; name another file")
