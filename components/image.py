"""The image that every step runs on, and how a Python function becomes a step on it."""

import os
from collections.abc import Callable
from typing import Any

from kfp import dsl

# Set LOCVLM_IMAGE when compiling to name another; a release names a digest: KFP's cache cannot see behind a tag.
IMAGE = os.environ.get("LOCVLM_IMAGE", "locvlm:0.1.0")


def step(function: Callable[..., Any]) -> Any:
    """A lightweight component on IMAGE, which holds kfp and locvlm already: nothing is installed when a step starts.

    kfp copies the function's source into the pipeline, so its body may use only what it imports itself.
    """
    return dsl.component(function, base_image=IMAGE, install_kfp_package=False)
