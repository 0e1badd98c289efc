"""`locvlm caption`: pseudo-captions of unique objects by a model."""

import argparse
from pathlib import Path
from typing import Any

from locvlm.cli.configuration import add_config_options, read_config
from locvlm.cli.data.building import fraction, positive

ENGINE_NAMES = ("auto", "locvlm", "llava", "transformers", "vllm")
FILE_NAME = "captions.jsonl"


def add_verbs(verbs: "argparse._SubParsersAction[Any]") -> None:
    """Register caption."""
    parser = verbs.add_parser(
        "caption",
        help="pseudo-captions of unique objects by a model, for `locvlm data prefcoco` and `localize-instruct`",
        description="Ask a model to describe every object that its category name alone picks out. An interrupted call "
        "continues when it is run again.",
    )
    parser.add_argument("--annotations", type=Path, required=True, metavar="FILE", help="COCO instances JSON")
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="folder of the images")
    parser.add_argument(
        "--model",
        type=Path,
        required=True,
        metavar="DIR",
        help="a LocVLM checkpoint, or another visual LLM's folder",
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="PATH",
        help=f"JSON lines (a name that ends in .jsonl), or a folder that gets {FILE_NAME}",
    )
    parser.add_argument(
        "--engine",
        choices=ENGINE_NAMES,
        default="auto",
        help="auto: locvlm for our checkpoints, llava for LLaVA's own layout; else vllm where it is installed beside a "
        "GPU, or transformers",
    )
    parser.add_argument(
        "--workers", type=positive, default=1, metavar="N", help="more than 1: Ray Data actors, one a GPU (default: 1)"
    )
    parser.add_argument("--batch-size", type=positive, default=32, metavar="N", help="objects at a time (default: 32)")
    parser.add_argument("--max-new-tokens", type=positive, default=64, metavar="N", help="of a caption (default: 64)")
    parser.add_argument(
        "--round-trip",
        type=fraction,
        metavar="IOU",
        help="keep a caption only if the model, asked where it is, finds the object's box with this overlap or more",
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N images by id")
    parser.add_argument("--overwrite", action="store_true", help="replace an output that was made otherwise")
    add_config_options(parser)
    parser.set_defaults(run=_caption)


def _caption(args: argparse.Namespace) -> None:
    from locvlm.evaluation.captioning import CaptionJob, write_captions

    output = args.output if args.output.suffix == ".jsonl" else args.output / FILE_NAME
    job = CaptionJob(
        annotations=args.annotations,
        images=args.images,
        model=args.model,
        output=output,
        engine=args.engine,
        n_workers=args.workers,
        batch_size=args.batch_size,
        max_new_tokens=args.max_new_tokens,
        round_trip=args.round_trip,
        crowd=read_config(args).instruct.crowd,
        limit=args.limit,
        overwrite=args.overwrite,
    )
    report = write_captions(job)
    if report is None:
        print(f"caption: already done in {output}")
        return
    parts = [f"images {report.images:,}, objects {report.objects:,}, captions {report.captions:,}"]
    for kind, counts in (("skipped", report.skipped), ("failed", report.failed), ("dropped", report.dropped)):
        if counts:
            parts.append(f"{kind}: " + ", ".join(f"{reason} {n:,}" for reason, n in counts.items()))
    print(f"caption: {'; '.join(parts)}; in {output}")
