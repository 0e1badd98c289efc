"""The page of the paper in miniature from figures that are written by hand: two seeds of ten questions."""

from pathlib import Path
from typing import Any

import pytest

from locvlm.evaluation.score import FORMAT
from locvlm.records import write_json, write_jsonl
from workflows import paper
from workflows.paper_arms import ASKED_BEFORE, NAMED, Plan
from workflows.paper_page import page

BOAT, LEMON = 1, 2


def plan_in(folder: Path, *more: str) -> Plan:
    return paper._plan(paper._parser().parse_args(["--runs", str(folder), "--seeds", "0", "1", *more]))


def score(plan: Plan, arm: str, seed: int, task: str, figure: str, n_right: int, *, floor: float = 0.1) -> None:
    """Ten questions about ten images, of which the first `n_right` are right; two more questions are about others."""
    items: dict[str, Any] = {
        str(n): {"image": f"{n}.png", "sums": {figure: [float(n < n_right), 1.0]}} for n in range(10)
    }
    items |= {f"other {n}": {"image": f"other {n}.png", "sums": {"another": [1.0, 1.0]}} for n in range(2)}
    value = {"value": n_right / 10, "n": 10, "low": 0.0, "high": 1.0, "floor": floor, "floor_answer": "always"}
    path = plan.metrics(arm, seed, task)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(
        path,
        {"format": FORMAT, "task": task, "dataset": task, "n": 12, "figures": {figure: value}, "items": items},
    )


def row(text: str, start: str) -> str:
    (found,) = [line for line in text.splitlines() if line.startswith(f"| {start}")]
    return found


@pytest.mark.parametrize(("n_right", "verdict"), [(8, "shown"), (7, "not shown")])
def test_revloc_has_to_beat_naming_any_object_of_the_image(tmp_path: Path, n_right: int, verdict: str) -> None:
    """Two boats and a lemon: the lemon alone can be asked about. A boat and a lemon: one half. Mean 75 %."""
    plan = plan_in(tmp_path)
    scenes = plan.root / "data" / "scenes"
    scenes.mkdir(parents=True)
    things = {"a.png": [BOAT, BOAT, LEMON], "b.png": [BOAT, LEMON]}
    images = [{"id": n, "file_name": name} for n, name in enumerate(things)]
    annotations = [{"image_id": n, "category_id": kind} for n, kinds in enumerate(things.values()) for kind in kinds]
    write_json(scenes / "instances_test.json", {"images": images, "annotations": annotations})
    for seed in plan.seeds:
        score(plan, "full", seed, *NAMED, n_right)
        score(plan, "loc-neg", seed, *NAMED, 1)
    write_jsonl(plan.answers("full", 0, NAMED[0]), [{"image": name} for name in things])
    text = page(plan)
    found = row(text, "RevLoc added: names the object at a place").split(" | ")
    difference = f"+{10 * n_right - 10}.0"
    assert found[1:4] == ["10 in 10 images", f"full {n_right}0.0", "loc-neg 10.0"]
    assert found[4] == f"{difference} ({difference} to {difference})"
    low, high = (float(end) for end in found[5].split(" to "))
    assert 0 < low < 10 * n_right - 10 < high
    assert found[6:] == ["75.0", f"{verdict} |"]
    assert "wherever it is asked about is right in 75.0 %" in text


def test_what_the_questions_leave_open_is_not_shown(tmp_path: Path) -> None:
    """One question of ten, with both seeds: the seeds agree, and yet it is one question."""
    plan = plan_in(tmp_path)
    for seed in plan.seeds:
        score(plan, "loc-neg", seed, "presence", "accuracy", 10)
        score(plan, "loc", seed, "presence", "accuracy", 9)
    text = page(plan)
    assert "| +10.0 (+10.0 to +10.0) | +0.0 to +30.0 | 10.0 | not shown |" in row(text, "presence, accuracy")
    assert "**not shown**" in row(text, "b |")
    assert row(text, "all three objectives against none").endswith("| (not run; beside the claim) |")


def test_a_gate_is_told_of_the_seeds_that_are_finished(tmp_path: Path) -> None:
    plan = plan_in(tmp_path)
    gate = "presence, asked directly"
    assert "| not run |" in row(page(plan), gate)
    score(plan, "direct", 0, "presence", "accuracy", 10)
    assert "| 100.0 (1 of 2 seeds) | 90 | yes |" in row(page(plan), gate)
    score(plan, "direct", 1, "presence", "accuracy", 7)
    assert "| 100.0, 70.0 | 90 | no |" in row(page(plan), gate)


def test_what_the_scenes_were_asked_before_is_said_of_those_scenes_alone(tmp_path: Path) -> None:
    assert ASKED_BEFORE in page(plan_in(tmp_path))
    assert ASKED_BEFORE not in page(plan_in(tmp_path, "--scenes", "24", "6"))
