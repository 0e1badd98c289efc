"""The curve on disk: each step once, whatever cut the writer off."""

import errno
from pathlib import Path
from typing import Any

import pytest

from locvlm.training.curve import Curve, CurveError, read_curve


def write(path: Path, *steps: int) -> Curve:
    curve = Curve(path)
    for step in steps:
        curve.add({"step": step, "loss": float(step)})
    return curve


def steps(path: Path) -> list[int]:
    return [int(point["step"]) for point in read_curve(path)]


def test_points_that_come_again_replace_the_old_ones(tmp_path: Path) -> None:
    path = tmp_path / "run" / "curve.jsonl"
    write(path, 1, 2, 3, 4)
    write(path, 3)
    assert steps(path) == [1, 2, 3]
    write(path, 4, 5)
    assert steps(path) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("torn", ['{"step": 3, "lo', "{"])
def test_a_line_that_was_cut_short_is_no_point_and_does_not_stop_the_next(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "curve.jsonl"
    write(path, 1, 2)
    with open(path, "a") as file:
        file.write(torn)
    assert steps(path) == [1, 2]
    write(path, 3, 4)
    assert path.read_text().count("\n") == 4
    assert steps(path) == [1, 2, 3, 4]


def test_a_point_that_finds_no_room_is_told_and_costs_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "curve.jsonl"
    curve = write(path, 1, 2, 3)

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("locvlm.records.os.fdopen", full)
        with pytest.raises(CurveError, match=r"writing step 2 into .*No space left.*run the same command again"):
            curve.add({"step": 2, "loss": 0.0})
    assert steps(path) == [1, 2, 3]


def test_there_are_no_points_before_the_first(tmp_path: Path) -> None:
    assert read_curve(tmp_path / "none.jsonl") == []
    (tmp_path / "empty.jsonl").touch()
    assert Curve(tmp_path / "empty.jsonl").last == 0
