"""The command `locvlm <verb>`: parse, load the config, call one function, map errors to exit codes.

Exit codes: 0 done, 2 the user can fix it (one message on stderr), 1 we must (a traceback).
"""

import argparse
import errno
import logging
import sys
import traceback
from collections.abc import Sequence

from locvlm import __version__
from locvlm.cli import (
    captioning,
    configuration,
    data,
    doctor,
    evaluating,
    evaluation,
    launch,
    lineage,
    models,
    registry,
    reporting,
    retraining,
    serving,
    training,
)
from locvlm.errors import LocVLMError


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; every verb sets `run`, a function of the parsed arguments."""
    parser = argparse.ArgumentParser(
        prog="locvlm", description="Teach a visual LLM to say where things are, and measure what that buys."
    )
    parser.add_argument("--version", action="version", version=f"locvlm {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="<verb>", required=True)
    for group in (
        configuration,
        data,
        captioning,
        training,
        models,
        evaluation,
        evaluating,
        reporting,
        registry,
        retraining,
        lineage,
        serving,
        launch,
        doctor,
    ):
        group.add_verbs(verbs)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code and never raises for a mistake of the user."""
    args = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    try:
        args.run(args)
    except LocVLMError as error:
        print(f"locvlm: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("locvlm: interrupted; finished work is kept, run the same command again to continue", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            place = f" at {error.filename}" if error.filename else ""
            print(
                f"locvlm: writing the output: {error.strerror}{place}; finished work is kept: make room and run the "
                "same command again to continue",
                file=sys.stderr,
            )
            return 2
        traceback.print_exc()
        print("locvlm: an internal error (above); please report it with the command you ran", file=sys.stderr)
        return 1
    return 0
