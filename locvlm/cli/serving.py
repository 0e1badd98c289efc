"""`locvlm ask` and `locvlm serve`: one question about one image, and a server with a web page."""

import argparse
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from locvlm.cli.data.building import positive
from locvlm.errors import ConfigError, DataError
from locvlm.records import atomic_write

if TYPE_CHECKING:
    from locvlm.serving.assistant import Assistant
    from locvlm.serving.limits import Limits

_SUFFIXES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


def add_verbs(verbs: "argparse._SubParsersAction[Any]") -> None:
    """Register ask and serve."""
    _add_ask(verbs)
    _add_serve(verbs)


def _add_model(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", type=Path, metavar="DIR", help="output folder of `locvlm train`")
    which.add_argument(
        "--registry",
        metavar="URI",
        help="a version in MLflow's registry, e.g. models:/locvlm@champion, models:/locvlm/3",
    )
    parser.add_argument("--temperature", type=float, help="0: greedy; default: the checkpoint's evaluation section")
    parser.add_argument("--max-new-tokens", type=positive, metavar="N", help="default: the checkpoint's")


def _add_ask(verbs: "argparse._SubParsersAction[Any]") -> None:
    parser = verbs.add_parser(
        "ask",
        help="one question about one image",
        description="Ask a checkpoint one thing about one image and print the answer. Boxes are in pixels of it.",
    )
    _add_model(parser)
    parser.add_argument("--image", type=Path, required=True, metavar="FILE", help="JPEG, PNG, WebP, BMP or GIF")
    form = parser.add_mutually_exclusive_group(required=True)
    form.add_argument("--question", metavar="TEXT", help="asked as it is")
    form.add_argument("--locate", metavar="TEXT", help="where is it? e.g. 'red circle'")
    form.add_argument("--box", type=_box, metavar="X1,Y1,X2,Y2", help="what is there?")
    parser.add_argument("--draw", type=Path, metavar="FILE", help="write the image with the boxes: .png, .jpg or .webp")
    parser.add_argument("--json", action="store_true", help="print the answer with its places as JSON")
    parser.set_defaults(run=_ask)


def _box(text: str) -> list[float]:
    return [float(number) for number in text.split(",")]


def _ask(args: argparse.Namespace) -> None:
    import base64

    from locvlm.serving.forms import Query
    from locvlm.serving.limits import Limits

    if args.draw is not None and args.draw.suffix.lower() not in _SUFFIXES:
        raise ConfigError(f"drawing on {args.image}: --draw is {args.draw}; it must end in {', '.join(_SUFFIXES)}")
    limits = Limits(image_bytes=200_000_000, pixels=150_000_000, side=30_000)  # the user's own machine and file
    try:
        data = args.image.read_bytes()
    except OSError as fault:
        raise DataError(f"reading the image {args.image}: {fault.strerror}") from None
    assistant, _ = _open(args, limits)
    query = Query(image=base64.b64encode(data).decode(), question=args.question, locate=args.locate, box=args.box)
    try:
        (answer,) = assistant.answers([assistant.prepare(query)])
    except DataError as fault:
        raise DataError(f"asking about {args.image}: {fault}") from None
    if args.draw is not None:
        from locvlm.serving.drawing import draw_places
        from locvlm.serving.uploads import decode

        drawn = draw_places(decode(data, limits), answer.places, args.box)
        with atomic_write(args.draw, "wb") as file:
            drawn.save(file, _SUFFIXES[args.draw.suffix.lower()])
    print(answer.model_dump_json(exclude_none=True) if args.json else answer.answer)


def _add_serve(verbs: "argparse._SubParsersAction[Any]") -> None:
    parser = verbs.add_parser(
        "serve",
        help="a web page and a JSON API that answer questions about images",
        description="Serve a checkpoint over HTTP: a page (upload an image, ask, see the boxes; draw a box, get its "
        "description), POST /api/answer, /health and /metrics. There is no log-in: put what has one before it, or keep "
        "it on this machine. Ends on SIGTERM when the requests under way are answered.",
    )
    _add_model(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: all (%(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="0: a free one (%(default)s)")
    parser.add_argument("--batch-size", type=positive, metavar="N", help="queries answered together")
    parser.add_argument("--open-requests", type=positive, metavar="N", help="at a time; more are told to come again")
    parser.add_argument("--max-megabytes", type=positive, metavar="N", help="of an image")
    parser.add_argument("--seconds", type=positive, metavar="N", help="a request may take")
    parser.set_defaults(run=_serve)


def _serve(args: argparse.Namespace) -> None:
    from locvlm.serving.limits import Limits
    from locvlm.serving.server import run

    if not 0 <= args.port <= 65535:
        raise ConfigError(f"serving: --port is {args.port}, it must be 0 to 65535")
    megabytes = None if args.max_megabytes is None else args.max_megabytes * 1_000_000
    given = {
        "batch": args.batch_size,
        "open_requests": args.open_requests,
        "image_bytes": megabytes,
        "seconds": args.seconds,
    }
    limits = Limits(**{name: value for name, value in given.items() if value is not None})
    assistant, about = _open(args, limits)
    run(assistant, limits, about, args.host, args.port)


def _open(args: argparse.Namespace, limits: "Limits") -> "tuple[Assistant, Any]":
    """The assistant and what is said of it."""
    from locvlm.serving.app import About
    from locvlm.serving.assistant import open_assistant

    names = {"temperature": args.temperature, "max_new_tokens": args.max_new_tokens}
    decoding = {name: value for name, value in names.items() if value is not None}
    if args.temperature is not None and args.temperature < 0:
        raise ConfigError(f"opening the model: --temperature is {args.temperature}, it must be 0 or more")
    if args.model is not None:
        assistant = open_assistant(args.model, limits, decoding)
        return assistant, About(assistant.config.name)
    from locvlm.registry.checkpoints import fetch_checkpoint

    with tempfile.TemporaryDirectory() as folder:
        stored = fetch_checkpoint(args.registry, Path(folder))
        return open_assistant(stored.folder, limits, decoding), About(stored.name, stored.version)
