"""`locvlm due`: nothing new, something new, somebody else at it; and where the newest data version comes from."""

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from locvlm import tracking
from locvlm.cli import main
from locvlm.presets import preset

NEW, OLD = "0123456789abcdef0123456789abcdef.dir", "fedcba9876543210fedcba9876543210.dir"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tracking.initialise(f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}")


@pytest.fixture(autouse=True)
def use_store(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)


def pin(folder: Path, md5: str) -> Path:
    path = folder / "data.dvc"
    path.write_text(f"outs:\n- md5: {md5}\n  hash: md5\n  path: data\n")
    return path


def version(name: str, *, champion: bool, **tags: str) -> str:
    """A version with these tags over those of the newest data."""
    client = tracking.connect()
    if not client.search_registered_models(filter_string=f"name = '{name}'"):
        client.create_registered_model(name)
    every: Mapping[str, str] = {"data": NEW, "code": "c1", "config": preset("tiny").fingerprint(), **tags}
    made = client.create_model_version(name, "runs:/0/model", tags=every)
    if champion:
        client.set_registered_model_alias(name, "champion", made.version)
    return str(made.version)


def ask(folder: Path, name: str, *options: str, owner: str = "a") -> dict[str, Any]:
    argv = ["due", "--dvc", str(pin(folder, NEW)), "--preset", "tiny", "--code", "c1", "--name", name]
    argv += ["--runs", str(folder / "runs"), "--owner", owner, "--output", str(folder / "due.json"), *options]
    assert main(argv) == 0
    return dict(json.loads((folder / "due.json").read_text()))


def test_nothing_is_due_where_the_champion_was_made_from_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    version("same", champion=True)
    found = ask(tmp_path, "same")
    assert not found["due"]
    assert found["why"] == (
        f"nothing to do: same version 1, the champion, was made from data {NEW}, code c1, config "
        f"{preset('tiny').fingerprint()}"
    )
    assert capsys.readouterr().out == found["why"] + "\n"
    assert not list(tmp_path.glob("runs/*.claim"))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--code", "c2"], "code c1 -> c2"),
        (["--set", "seed=1"], f"config {preset('tiny').fingerprint()} -> {preset('tiny', ['seed=1']).fingerprint()}"),
    ],
)
def test_a_change_is_due_and_named(tmp_path: Path, options: list[str], told: str) -> None:
    version(f"changed-{options[0]}", champion=True)
    found = ask(tmp_path, f"changed-{options[0]}", *options)
    assert found["due"]
    assert found["why"] == f"training changed-{options[0]}: changed since version 1, the champion: {told}"
    assert (tmp_path / "runs" / f"{found['run']}.claim").is_file()


def test_new_data_is_due(tmp_path: Path) -> None:
    version("new-data", champion=True, data=OLD)
    assert f"data {OLD} -> {NEW}" in ask(tmp_path, "new-data")["why"]


def test_what_did_not_pass_its_gates_is_not_trained_again(tmp_path: Path) -> None:
    version("lost", champion=True, data=OLD)
    version("lost", champion=False, gates="did not hold")
    found = ask(tmp_path, "lost")
    assert not found["due"]
    assert found["why"].endswith("its gates did not hold; version 1 stays champion")


def test_what_was_registered_but_never_judged_is_due(tmp_path: Path) -> None:
    version("broken-off", champion=True, data=OLD)
    version("broken-off", champion=False)
    assert ask(tmp_path, "broken-off")["due"]


def test_a_second_run_leaves_the_first_alone_until_its_claim_is_given_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = ask(tmp_path, "twice", owner="a")
    assert first["due"]
    assert "there is no champion yet" in first["why"]
    second = ask(tmp_path, "twice", owner="b")
    assert not second["due"]
    assert second["run"] == first["run"]
    assert "nothing to do: the run a has been at it since" in second["why"]
    assert ask(tmp_path, "twice", owner="a")["due"]
    assert main(["release", "--runs", str(tmp_path / "runs"), "--owner", "a"]) == 0
    assert capsys.readouterr().out.endswith(f"given back: {first['run']}\n")
    assert ask(tmp_path, "twice", owner="b")["due"]


def test_the_newest_version_is_read_from_a_git_repository(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    repository = tmp_path / "repository"
    repository.mkdir()
    pin(repository, OLD)
    git = ["git", "-C", str(repository), "-c", "user.name=a", "-c", "user.email=a@b"]
    for arguments in (["init", "-q", "-b", "main"], ["add", "data.dvc"], ["commit", "-q", "-m", "data"]):
        subprocess.run([*git, *arguments], check=True)
    pin(repository, NEW)  # not committed: not published
    found = ask(tmp_path, "git", "--dvc", "data.dvc", "--repository", str(repository), "--revision", "main")
    assert found["inputs"]["data"] == OLD
    argv = ["due", "--dvc", "data.dvc", "--repository", str(repository), "--revision", "no-such", "--code", "c"]
    argv += ["--preset", "tiny", "--runs", str(tmp_path), "--owner", "a", "--output", str(tmp_path / "no.json")]
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert f"reading data.dvc of the Git repository {repository} at no-such: " in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dvc", "no.dvc"], "reading no.dvc: there is no such file"),
        (["--set", "sed=1"], "did you mean seed"),
        (["--repository", "no/where"], "reading data.dvc of the Git repository no/where"),
    ],
)
def test_a_mistake_is_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    argv = ["due", "--dvc", "data.dvc", "--preset", "tiny", "--code", "c", "--runs", str(tmp_path), "--owner", "a"]
    assert main([*argv, "--output", str(tmp_path / "due.json"), *options]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said
    assert not (tmp_path / "due.json").exists()
