"""The evaluation verbs."""

import argparse
from typing import Any


def add_verbs(verbs: "argparse._SubParsersAction[Any]") -> None:
    """Register the evaluation verbs."""
