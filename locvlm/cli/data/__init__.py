"""`locvlm data <verb>`: from annotation files and images to dataset folders, one file a group of verbs."""

import argparse
from typing import Any

from locvlm.cli.data import (
    analysis,
    captions,
    conversations,
    faces,
    features,
    images,
    lmms,
    look,
    pope,
    pretraining,
    questions,
    shards,
    video,
)


def add_verbs(verbs: "argparse._SubParsersAction[Any]") -> None:
    """Register `data` and its verbs."""
    data = verbs.add_parser("data", help="build data sets from annotations and images")
    nested = data.add_subparsers(title="data verbs", metavar="<verb>", required=True)
    for group in (
        images,
        faces,
        captions,
        conversations,
        questions,
        pope,
        shards,
        pretraining,
        video,
        features,
        analysis,
        lmms,
        look,
    ):
        group.add_verbs(nested)
