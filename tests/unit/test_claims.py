"""Claims: of two that want the same run, one gets it."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from locvlm import claims, identity
from locvlm.claims import give_back, take
from locvlm.cli.steps import run_step
from locvlm.errors import DataError


def test_a_run_belongs_to_who_came_first_until_it_is_given_back(tmp_path: Path) -> None:
    assert take(tmp_path, "tiny-1", "a", 1).owner == "a"
    assert take(tmp_path, "tiny-1", "b", 1).owner == "a"
    assert take(tmp_path, "tiny-2", "b", 1).owner == "b"
    assert give_back(tmp_path, "a") == ["tiny-1"]
    assert take(tmp_path, "tiny-1", "b", 1).owner == "b"
    assert give_back(tmp_path, "a") == []
    assert give_back(tmp_path, "b") == ["tiny-1", "tiny-2"]


def test_a_retried_step_has_its_claim_still_and_an_old_claim_is_void(tmp_path: Path) -> None:
    first = take(tmp_path, "tiny-1", "a", 1)
    assert take(tmp_path, "tiny-1", "a", 1).since >= first.since
    (tmp_path / "tiny-1.claim").write_text(json.dumps({"owner": "a", "since": time.time() - 3601}))
    assert take(tmp_path, "tiny-1", "b", 1).owner == "b"


def test_of_many_at_once_one_gets_it(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        owners = set(pool.map(lambda number: take(tmp_path, "tiny-1", str(number), 1).owner, range(40)))
    assert len(owners) == 1


@pytest.mark.parametrize("content", ["[]", '{"owner": "a"}', '{"owner": "a", "since": "noon"}', "{"])
def test_a_claim_that_cannot_be_read_is_one_message(tmp_path: Path, content: str) -> None:
    (tmp_path / "tiny-1.claim").write_text(content)
    with pytest.raises(DataError, match=r"reading .*tiny-1\.claim"):
        take(tmp_path, "tiny-1", "a", 1)


def test_a_place_that_cannot_be_written_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(DataError, match="the folder has to exist and be writable"):
        take(tmp_path / "runs", "tiny-1", "a", 1)


def since(folder: Path) -> float:
    return float(json.loads((folder / "tiny-1.claim").read_text())["since"])


def age(folder: Path, hours: float) -> None:
    content = json.loads((folder / "tiny-1.claim").read_text())
    (folder / "tiny-1.claim").write_text(json.dumps({**content, "since": content["since"] - 3600 * hours}))


def test_a_run_at_work_keeps_its_claim_however_long_it_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "RENEWED_EVERY", 0.02)
    take(tmp_path, "tiny-1", "a", 1)
    with claims.kept(tmp_path, "tiny-1", ["before", "a"]):
        age(tmp_path, 5)
        deadline = time.monotonic() + 10
        while since(tmp_path) < time.time() - 60 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert take(tmp_path, "tiny-1", "b", 1).owner == "a"
    age(tmp_path, 5)  # the run died: nobody renews, and the next one gets it
    time.sleep(0.1)
    assert take(tmp_path, "tiny-1", "b", 1).owner == "b"


def test_nobody_renews_a_claim_of_another(tmp_path: Path) -> None:
    take(tmp_path, "tiny-1", "a", 1)
    age(tmp_path, 5)
    before = since(tmp_path)
    with claims.kept(tmp_path, "tiny-1", ["b"]), claims.kept(tmp_path, "unclaimed", ["b"]):
        pass
    assert since(tmp_path) == before
    assert not (tmp_path / "unclaimed.claim").exists()


def test_a_step_of_the_run_renews_its_claim(tmp_path: Path) -> None:
    run = tmp_path / "tiny-1"
    identity.begin(run, "kfp-1", {})
    take(tmp_path, "tiny-1", "kfp-1", 1)
    age(tmp_path, 5)
    run_step(["config", "--preset", "tiny"], log=f"{run}/logs/resolve-config.log")
    assert take(tmp_path, "tiny-1", "kfp-2", 1).owner == "kfp-1"
