"""`locvlm config`, and the config options that other verbs share."""

import argparse
from pathlib import Path
from typing import Any

from locvlm.config import ExperimentConfig, dump_config, load_config
from locvlm.presets import PRESETS, preset


def add_verbs(verbs: "argparse._SubParsersAction[Any]") -> None:
    """Register `config`."""
    parser = verbs.add_parser("config", help="print a resolved configuration as YAML")
    add_config_options(parser)
    parser.set_defaults(run=_print_config)


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """--preset, --config and --set."""
    parser.add_argument("--preset", help=f"one of {', '.join(PRESETS)}")
    parser.add_argument("--config", type=Path, help="a YAML file as printed by `locvlm config`")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="override, e.g. seed=1"
    )


def read_config(args: argparse.Namespace, default: str = "locvlm-b") -> ExperimentConfig:
    """The config that the options of `add_config_options` name; without any, the preset `default`."""
    if args.config is not None:
        return load_config(args.config, args.overrides)
    return preset(args.preset or default, args.overrides)


def _print_config(args: argparse.Namespace) -> None:
    print(dump_config(read_config(args)), end="")
