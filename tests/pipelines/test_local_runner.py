"""The local runner on a toy pipeline: what a person sees, what a failure says, what a second start does."""

import io
import re
import warnings
from pathlib import Path

import pytest

from tests.pipelines.toy import make_pipeline
from workflows.local_runner import RunFolder, StepError, run_pipeline


def run(root: Path, preset: str) -> str:
    """Run the toy and return what was shown."""
    root.mkdir(exist_ok=True)
    (root / "preset").write_text(preset)
    out = io.StringIO()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # KFP's warnings about images and the like must not reach a person
        run_pipeline(make_pipeline(), {"root": str(root)}, RunFolder(root), out)
    return re.sub(r"\d+\.\d s", "N s", out.getvalue())


def test_a_failed_step_is_named_and_a_second_start_goes_on_after_the_finished_ones(tmp_path: Path) -> None:
    root = tmp_path / "run"
    with pytest.raises(StepError) as caught:
        run(root, "tyni")
    message = str(caught.value)
    assert message.startswith("the middle step failed:\n  locvlm: looking up the preset 'tyni': it must be one of tiny")
    assert message.endswith(f"its log: {root}/logs/middle.log")
    assert caught.value.exit_code == 2
    assert not (root / "last.yaml").exists()

    shown = run(root, "tiny")
    assert [line.split(maxsplit=1)[1] for line in shown.splitlines()] == [
        "1/3] the first step                   cached",
        "2/3] the middle step                  ...",
        "2/3] the middle step                  N s",
        "3/3] the last step                    ...",
        "3/3] the last step                    N s",
    ]
    assert (root / "first.count").read_text() == "x"
    everything = (root / "pipeline.log").read_text()
    assert "name: tiny" in everything
    assert "\x1b[" not in everything

    (root / "first.yaml").unlink()  # an output that went missing is made again, in spite of the cache
    assert "the first step                   N s" in run(root, "tiny")
    assert (root / "first.count").read_text() == "xx"


def test_a_killed_step_and_one_that_never_began_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(StepError, match=r"step 7, loss 0\.5\n  \(it died there without a word: killed") as caught:
        run(tmp_path / "run", "kill")
    assert caught.value.exit_code == 1
    with pytest.raises(StepError, match=r"ImportError: no module named locvlm_of_tomorrow") as caught:
        run(tmp_path / "run", "import")
    assert str(caught.value).endswith(f"everything it said: {tmp_path}/run/pipeline.log")
    assert caught.value.exit_code == 1
