"""`python -m workflows.compile`: write the pipeline package; a test keeps it in step with the code."""

import argparse
import warnings
from pathlib import Path

from kfp import compiler

from workflows.image_pipeline import make_pipeline

PACKAGE = Path(__file__).with_name("image_pipeline.yaml")


def compile_package(path: Path) -> None:
    """Compile the image pipeline into `path`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        compiler.Compiler().compile(make_pipeline(), str(path))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=PACKAGE, help="default: %(default)s")
    output = parser.parse_args().output
    compile_package(output)
    print(output)
