"""`locvlm export` and `locvlm plan`: a checkpoint for other people's servers, and what a run will cost."""

import argparse
from pathlib import Path
from typing import Any

from locvlm.cli.configuration import add_config_options, read_config


def add_verbs(verbs: "argparse._SubParsersAction[Any]") -> None:
    """Register export and plan."""
    _add_export(verbs)
    _add_plan(verbs)


def _add_export(verbs: "argparse._SubParsersAction[Any]") -> None:
    parser = verbs.add_parser(
        "export",
        help="write a checkpoint as a stock Llava",
        description="Write a checkpoint so that transformers' LlavaForConditionalGeneration, vLLM and SGLang load it "
        "without LocVLM. The logits stay equal.",
    )
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="a LocVLM checkpoint")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="the folder to write")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="bfloat16",
        help="of the weights (%(default)s); float32 keeps every bit",
    )
    parser.set_defaults(run=_export)


def _export(args: argparse.Namespace) -> None:
    from locvlm.model import load
    from locvlm.model.export import DTYPES, export

    export(load(args.model), args.output, DTYPES[args.dtype])
    print(f"export: {args.output} loads with transformers.LlavaForConditionalGeneration ({args.dtype})")


def _add_plan(verbs: "argparse._SubParsersAction[Any]") -> None:
    parser = verbs.add_parser(
        "plan",
        help="what a run will take: steps, tokens, FLOPs, GPU hours, memory, cost",
        description="Estimate a run before it costs anything. Sizes are the paper's unless given.",
    )
    add_config_options(parser)
    parser.add_argument("--gpus", type=int, default=8, metavar="N", help="GPUs (%(default)s)")
    parser.add_argument("--gpu-type", default="a100-80g", metavar="NAME", help="kind of GPU (%(default)s)")
    parser.add_argument(
        "--samples",
        action="append",
        default=[],
        metavar="STAGE=N",
        help="samples an epoch of a stage, e.g. instruct=191798; may be repeated",
    )
    parser.add_argument("--mfu", type=float, metavar="X", help="share of the peak that training reaches (0.4)")
    parser.add_argument("--price", type=float, metavar="USD", help="of one GPU hour; without it no cost is given")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=_plan)


def _plan(args: argparse.Namespace) -> None:
    import json
    from dataclasses import asdict

    from locvlm.plan import make_plan, render_plan

    plan = make_plan(read_config(args), args.gpus, args.gpu_type, args.samples, args.mfu, args.price)
    print(json.dumps(asdict(plan), indent=1) if args.json else render_plan(plan))
