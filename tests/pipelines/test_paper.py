"""`make paper` at two steps an arm: what it runs, keeps and writes; that it goes on instead of starting again."""

import json
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from locvlm.evaluation.verdicts import contrast
from locvlm.model.checkpoint import TINY_FOUNDATION
from workflows import paper, paper_arms

pytestmark = pytest.mark.slow

ARMS = ["full", "captions", "align", "video-full"]
ARGUMENTS = ["--seeds", "0", "--arms", *ARMS, "--steps", "2", "--scenes", "24", "6", "--jobs", "1"]
ARGUMENTS += ["--set", "stages.align.steps=2", "--set", "evaluation.max_new_tokens=8"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a run of one arm that was started again with two; fewer questions are asked than there are."""
    few = pytest.MonkeyPatch()
    few.setattr(paper, "QUESTIONS", 5)
    folder = tmp_path_factory.mktemp("paper")
    arguments = [*ARGUMENTS, "--runs", str(folder / "runs"), "--output", str(folder / "miniature.md")]
    assert paper.main([*arguments[:4], *arguments[5:]]) == 0
    first = next((folder / "runs").glob("*/models/0/full/receipt.json"))
    before = first.stat().st_mtime_ns
    assert paper.main(arguments) == 0
    assert first.stat().st_mtime_ns == before
    yield folder
    few.undo()


@pytest.mark.timeout(1200)
def test_the_page_has_each_claim_with_a_verdict(run: Path) -> None:
    page = (run / "miniature.md").read_text()
    rows = {line.split("|")[1].strip(): line for line in page.splitlines() if line.startswith("| ") and "**" in line}
    assert list(rows) == list("abcdefg")
    assert "**not shown**" in rows["c"]  # one seed has no interval
    assert all("**not run**" in rows[letter] for letter in "abdefg")
    (root,) = (run / "runs").iterdir()
    scored = [root / "predictions" / "0" / arm / "expressions.metrics.json" for arm in ("captions", "full")]
    better, other = ([_figures(path)["meteor"]["value"]] for path in scored)
    (row,) = [row for row in page.split("### c:")[1].splitlines() if row.startswith("| METEOR ")]
    assert f"| {100 * contrast(better, other).difference:+.1f} | " in row
    floor = _figures(scored[0])["meteor"]["floor"]
    assert row.endswith(f" | {100 * floor:.1f} | not shown |")
    assert "(not shown; beside the claim) |" in page.split("### c:")[1].split("### d:")[0]
    objects = json.loads((root / "captioner.json").read_text())["objects"]
    assert f"It describes 0.0 % of the {objects} objects of the training scenes" in " ".join(page.split())
    assert "| presence, asked directly in training | not run |" in page
    found = [arm.name for arm in paper_arms.MINIATURE if f"\n| {arm.name} |" in page.split("## All arms")[1]]
    assert found == ["full", "align", "captions", "video-full"]
    receipt = json.loads((root / "models" / "0" / "video-full" / "receipt.json").read_text())
    assert (receipt["stage"], Path(receipt["parent"]).name) == ("video", "full")
    learned = json.loads((TINY_FOUNDATION / "recipe.json").read_text())
    tower, reading = learned["figures"]["tower"], learned["figures"]["reading"]
    (row,) = [line for line in page.splitlines() if line.startswith("| foundation: the tower tells what a patch shows")]
    assert row.endswith(f"| {100 * tower['category']:.1f} | 90 | yes |")
    assert f"above or below in stated scenes, names held out | {100 * reading['height']:.1f} | 90 | no |" in page


@pytest.mark.timeout(1200)
def test_score_computes_the_figures_from_the_packed_answers_again(run: Path) -> None:
    (root,) = (run / "runs").iterdir()
    with tarfile.open(run / "miniature.answers.tar.xz") as archive:
        archive.extractall(run / "unpacked", filter="data")
    kept = run / "unpacked" / "predictions" / "0" / "captions"
    assert {path.name for path in kept.iterdir()} == {f"{task}.jsonl" for task in (*paper_arms.TASKS, "expressions")}
    argv = ["score", "--config", str(run / "unpacked" / "configs" / "captions.yaml")]
    again = {"presence": "presence", "localization": "localization", "expressions": "region-description"}
    for name, task in again.items():
        argv += ["--task", task, "--predictions", str(kept / f"{name}.jsonl"), "--output", str(run / f"{name}.json")]
    subprocess.run([sys.executable, "-m", "locvlm", *argv], check=True, capture_output=True)
    for name in again:
        scored = root / "predictions" / "0" / "captions" / f"{name}.metrics.json"
        assert _figures(run / f"{name}.json") == _figures(scored)


@pytest.mark.timeout(1200)
def test_the_page_has_also_the_arms_that_this_start_did_not_ask_for(run: Path, tmp_path: Path) -> None:
    arguments = [*ARGUMENTS[:3], "align", *ARGUMENTS[3 + len(ARMS) :], "--runs", str(run / "runs")]
    assert paper.main([*arguments, "--output", str(tmp_path / "miniature.md")]) == 0
    assert (tmp_path / "miniature.md").read_text() == (run / "miniature.md").read_text()


@pytest.mark.timeout(1200)
def test_on_another_machine_the_packed_answers_are_taken_as_done(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "miniature.md"
    packed = run / "miniature.answers.tar.xz"
    shutil.copy(packed, tmp_path)
    arguments = [*ARGUMENTS, "--runs", str(tmp_path / "runs"), "--output", str(page), "--only-report"]
    assert paper.main(arguments) == 2
    assert "would be replaced; take them with --continue" in capsys.readouterr().err
    assert paper.main([*arguments, "--continue"]) == 0
    assert page.read_text() == (run / "miniature.md").read_text()
    assert (tmp_path / packed.name).read_bytes() == packed.read_bytes()
    assert not list((tmp_path / "runs").glob("*/models"))  # nothing was trained
    (root,) = (tmp_path / "runs").iterdir()
    metrics = root / "predictions" / "0" / "full" / "localization.metrics.json"
    values = json.loads(metrics.read_text())
    del values["figures"]["mean_iou"]  # as of an arm that says points
    metrics.write_text(json.dumps(values))
    assert paper.main(arguments) == 0
    assert "| full |" in page.read_text()
    (root / "predictions" / "0" / "full" / "presence.jsonl").unlink()  # an arm without all of its answers is not packed
    (tmp_path / packed.name).unlink()
    assert paper.main(arguments) == 0
    with tarfile.open(tmp_path / packed.name) as archive:
        assert {Path(name).parent.name for name in archive.getnames() if name.endswith(".jsonl")} == {*ARMS[1:]}


def test_answers_under_other_settings_are_not_taken_for_those_of_today(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(paper, "QUESTIONS", 4)
    assert paper.main([*ARGUMENTS, "--runs", str(run / "runs"), "--output", str(tmp_path / "x.md")]) == 2
    assert f"answers or models of {', '.join(sorted(ARMS))} with other settings" in capsys.readouterr().err
    shutil.copy(run / "miniature.answers.tar.xz", tmp_path)
    arguments = [*ARGUMENTS, "--runs", str(tmp_path / "runs"), "--output", str(tmp_path / "miniature.md")]
    assert paper.main([*arguments, "--continue", "--only-report"]) == 0
    assert f"other settings than those of today: {', '.join(sorted(ARMS))}" in capsys.readouterr().out
    assert "**not run**" in (tmp_path / "miniature.md").read_text()


def test_answers_of_another_run_are_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(run / "miniature.answers.tar.xz", tmp_path)
    argv = ["--runs", str(tmp_path / "runs"), "--output", str(tmp_path / "miniature.md"), "--continue"]
    assert paper.main(argv) == 2
    assert "settings, foundation or numbers of scenes differ" in capsys.readouterr().err
    (tmp_path / "cut.answers.tar.xz").write_bytes((run / "miniature.answers.tar.xz").read_bytes()[:200])
    assert paper.main([*argv, "--output", str(tmp_path / "cut.md")]) == 2
    assert "cannot be read" in capsys.readouterr().err
    assert paper.main([*argv, "--output", str(tmp_path / "other.md")]) == 2
    assert "there is no" in capsys.readouterr().err


def test_arms_differ_in_the_location_objectives_alone() -> None:
    by_name = {arm.name: arm for arm in paper_arms.MINIATURE}
    assert "loc_pred" in by_name["full"].mixture
    assert "loc_pred" not in by_name["none"].mixture
    for name, trained in by_name.items():
        key, _, value = trained.mixture.partition("=")
        weights = {entry["objective"]: entry["weight"] for entry in yaml.safe_load(value)}
        assert key == f"stages.{'video' if trained.video else 'instruct'}.mixture"
        assert sum(weights.values()) == pytest.approx(1)
        if name != "direct":
            assert name == "video-none" or weights["presence"] == weights["caption"]
            (stated,) = weights.keys() - {"presence", "caption", "loc_pred", "neg_pred", "rev_loc"}
            assert stated == ("stated_above_below" if trained.axis == paper_arms.VERTICAL else "stated_left_right")
            assert weights[stated] == 0.2
    named = {name for claim in paper_arms.CLAIMS for first, second, *_ in claim.contrasts for name in (first, second)}
    assert named <= by_name.keys()


@pytest.mark.parametrize("wrong", [["--jobs", "0"], ["--steps", "0"], ["--scenes", "0", "1"]])
def test_a_size_of_nothing_is_refused(tmp_path: Path, wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert paper.main(["--runs", str(tmp_path), *wrong]) == 2
    assert "must be at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("named", ["/elsewhere", ""])
def test_a_foundation_without_its_recipe_is_refused(
    named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert paper.main(["--runs", str(tmp_path), "--set", f"model.foundation='{named}'"]) == 2
    assert f"model.foundation is '{named}', where there is no recipe.json" in capsys.readouterr().err


def _figures(path: Path) -> dict[str, dict[str, float]]:
    return dict(json.loads(path.read_text())["figures"])


def test_a_seed_counts_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert paper.main(["--runs", str(tmp_path), "--seeds", "1", "1"]) == 2
    assert "given twice" in capsys.readouterr().err
