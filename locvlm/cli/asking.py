"""What predict, score and evaluate share: the options that say which model is asked, how, and who judges."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from locvlm.cli.captioning import ENGINE_NAMES
from locvlm.cli.data.building import positive
from locvlm.errors import ConfigError

if TYPE_CHECKING:
    from locvlm.evaluation.judges import Judge, TextReplier
    from locvlm.evaluation.predict import Model

TASK_NAMES = (
    "coco-spatial, coco-spatial-icl, presence, pope, localization, region-description, vqav2, gqa, activitynet-qa, "
    "msrvtt-qa, msvd-qa, tgif-qa"
)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """--model and how it is asked."""
    parser.add_argument(
        "--model",
        required=True,
        metavar="MODEL",
        help="output folder of `locvlm train`; a folder of another visual LLM (LLaVA, BLIP-2, InstructBLIP, Kosmos-2, "
        "Shikra, Video-ChatGPT, ...); or openai:NAME behind --url",
    )
    parser.add_argument("--engine", choices=ENGINE_NAMES, default="auto", help="what runs a folder")
    parser.add_argument(
        "--workers", type=positive, default=1, metavar="N", help="more than 1: Ray Data actors, one a GPU (default: 1)"
    )
    parser.add_argument(
        "--url", metavar="URL", help="OpenAI-compatible endpoint (.../v1); the key comes from OPENAI_API_KEY"
    )
    parser.add_argument(
        "--cache", type=Path, metavar="FILE", help="replies of the endpoint (default: beside the first output)"
    )
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="whose coordinates a model of others is to write places in"
    )
    parser.add_argument(
        "--images",
        action="append",
        required=True,
        type=Path,
        metavar="DIR",
        help="folder of images, videos or shards; may be repeated: each is looked into in turn",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="ask N questions from all over the set, always the same")
    parser.add_argument("--temperature", type=float, help="0: greedy; default: the checkpoint's evaluation section")
    parser.add_argument("--seed", type=int, help="of the sampling")
    parser.add_argument("--max-new-tokens", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--overwrite", action="store_true", help="replace an output that was made otherwise")


def add_judge_options(parser: argparse.ArgumentParser) -> None:
    """--judge and where it is."""
    parser.add_argument(
        "--judge",
        metavar="JUDGE",
        help="of open-ended answers: exact (default), lexical, openai:MODEL or hf:FOLDER",
    )
    parser.add_argument(
        "--judge-url", metavar="URL", help="OpenAI-compatible endpoint (.../v1); the key comes from OPENAI_API_KEY"
    )
    parser.add_argument(
        "--judge-cache", type=Path, metavar="FILE", help="replies of the judge (default: beside the first output)"
    )


def decoding_of(args: argparse.Namespace) -> dict[str, Any]:
    """What the options override of the model's evaluation section. Raises ConfigError for a limit below 1."""
    if args.limit is not None and args.limit < 1:
        raise ConfigError(f"predicting: --limit is {args.limit}, it must be 1 or more")
    names = ("temperature", "seed", "max_new_tokens", "batch_size")
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def model_of(args: argparse.Namespace, cache: Path) -> "Model":
    """What --model names. `cache`: where replies of an endpoint are kept, if no option says. Raises ConfigError,
    CheckpointError."""
    from locvlm.config import load_config

    places = None if args.config is None else load_config(args.config)
    if args.model.startswith("openai:"):
        from locvlm.evaluation.remote import remote_model

        if args.engine != "auto" or args.workers != 1:
            raise ConfigError("predicting: --engine and --workers go with a model folder, not with an endpoint")
        return remote_model(args.model, args.url, args.cache or cache, places)
    if args.url is not None or args.cache is not None:
        raise ConfigError("predicting: --url and --cache go with --model openai:NAME")
    from locvlm.evaluation.inference import model_folder

    return model_folder(Path(args.model), args.engine, places)


def judge_of(args: argparse.Namespace, cache: Path) -> "Judge | None":
    """What --judge names; None where nothing is. `cache`: where replies of a model are kept, if no option says."""
    if args.judge is None:
        if args.judge_url is not None or args.judge_cache is not None:
            raise ConfigError("scoring: --judge-url and --judge-cache say more about --judge; give that too")
        return None
    from locvlm.evaluation.judges import make_judge

    return make_judge(args.judge, args.judge_url, args.judge_cache or cache, _open_text_model)


def _open_text_model(folder: Path) -> "TextReplier":
    from locvlm.model.text import load_text_model  # torch comes in only when there is something to ask

    return load_text_model(folder)
