"""What a pipeline step does around a verb: log, last words, receipt, launch."""

import json
import logging
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from locvlm import cli
from locvlm.cli import steps
from locvlm.records import fingerprint, write_json


def test_what_a_verb_prints_goes_on_and_into_the_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "logs" / "config.log"
    steps.run_step(["config", "--preset", "tiny"], str(log), printed=str(tmp_path / "config.yaml"))
    assert capsys.readouterr().out.startswith("name: tiny\n")
    assert (tmp_path / "config.yaml").read_text().startswith("name: tiny\n")
    text = log.read_text()
    assert text.startswith("$ locvlm config --preset tiny\nname: tiny\n")
    assert steps.exit_code(log) == 0


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["config", "--preset", "tyni"], "locvlm: looking up the preset 'tyni': it must be one of tiny"),
        (["config", "--set", "sed=1", "--preset", "tiny"], "  - sed: there is no such setting; did you mean seed?"),
        (["config", "--presets", "tiny", "surplus"], "locvlm: error: unrecognized arguments"),
    ],
)
def test_a_users_mistake_is_raised_with_its_words_and_the_log(tmp_path: Path, argv: list[str], words: str) -> None:
    log = tmp_path / "config.log"
    with pytest.raises(RuntimeError, match="locvlm config ended with exit code 2: ") as caught:
        steps.run_step(argv, str(log), printed=str(tmp_path / "out"))
    assert words in str(caught.value)
    assert str(log) in str(caught.value)
    assert words in steps.last_words(log)
    assert steps.exit_code(log) == 2
    assert not (tmp_path / "out").exists()


def test_only_the_last_try_has_the_last_words(tmp_path: Path) -> None:
    log = tmp_path / "config.log"
    for bad in ("tyni", "tinny"):
        with pytest.raises(RuntimeError):
            steps.run_step(["config", "--preset", bad], str(log))
    assert "tyni" in log.read_text()
    assert "'tinny'" in steps.last_words(log)
    assert "'tyni'" not in steps.last_words(log)


def test_our_own_fault_leaves_the_traceback_as_last_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> str:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(cli.configuration, "dump_config", fail)
    with pytest.raises(RuntimeError, match="exit code 1"):
        steps.run_step(["config", "--preset", "tiny"], str(tmp_path / "l.log"))
    assert "ZeroDivisionError: a bug" in steps.last_words(tmp_path / "l.log")


@pytest.mark.parametrize("said", ["step 7", ""])
def test_a_killed_step_leaves_what_it_said_and_no_exit_code(tmp_path: Path, said: str) -> None:
    log = tmp_path / "killed.log"
    log.write_text("$ locvlm config\nan earlier try\nended with exit code 2 after 0.1 s\n")
    code = (
        "import os, signal, sys\nfrom locvlm import cli\nfrom locvlm.cli import steps\n"
        f"def die(args):\n    print({said!r}, end='')\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        "cli.configuration._print_config = die\n"
        f"steps.run_step(['config', '--preset', 'tiny'], {str(log)!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert steps.exit_code(log) is None
    assert steps.last_words(log) == (said or "it said nothing")


def test_log_records_reach_the_log_and_the_roots_handlers_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def speak(_: object) -> str:
        logging.getLogger("locvlm.test").info("42 images")
        return ""

    monkeypatch.setattr(cli.configuration, "dump_config", speak)
    before = logging.getLogger().handlers[:]
    steps.run_step(["config", "--preset", "tiny"], str(tmp_path / "l.log"))
    assert "42 images" in (tmp_path / "l.log").read_text()
    assert logging.getLogger().handlers == before


def test_on_the_cluster_the_verb_is_launched_under_a_name_that_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []

    def record(command: list[str]) -> int:
        seen.append(list(command))
        return 0

    monkeypatch.setattr(cli, "main", record)
    verb = ["train", "--stage", "align", "--output", "x"]
    for _ in range(2):
        steps.run_step(verb, str(tmp_path / "logs" / "train-align.log"), runner="kuberay", image="img:1")
    steps.run_step(["predict"], str(tmp_path / "logs" / "predict.log"), runner="kuberay", image="img:1", gpus=1)
    first, again, predict = seen
    assert first == again
    assert first[0] == "launch"
    assert first[first.index("--image") + 1] == "img:1"
    assert first[first.index("--") + 1 :] == verb
    assert first[first.index("--name") + 1].startswith("locvlm-train-align-")
    assert "--entrypoint-gpus" not in first
    assert predict[predict.index("--entrypoint-gpus") + 1] == "1"
    assert predict[predict.index("--name") + 1] != first[first.index("--name") + 1]


def test_a_receipt_names_the_output_and_its_fingerprint(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.txt").write_text("a")
    write_json(folder / "manifest.json", {"counts": {"images": 3}})
    digest = steps.write_receipt(str(folder), str(tmp_path / "receipt"))
    found = json.loads((tmp_path / "receipt").read_text())
    assert digest == found["fingerprint"] == fingerprint(folder)
    assert found["path"] == str(folder)
    assert found["content"] == {"counts": {"images": 3}}
    (folder / "a.txt").write_text("b")
    assert steps.write_receipt(str(folder), str(tmp_path / "receipt")) != digest


def test_a_model_folder_tells_its_own_fingerprint(tmp_path: Path) -> None:
    write_json(tmp_path / "receipt.json", {"fingerprint": "sha256:weights", "steps": 3})
    assert steps.write_receipt(str(tmp_path), str(tmp_path / "out")) == "sha256:weights"


def test_every_result_of_a_model_has_a_file_of_its_own() -> None:
    benchmarks = [{"task": "gqa"}, {"task": "region-description"}, {"task": "gqa", "name": "gqa-val"}, {"task": "gqa"}]
    found = steps.file_stems(["presence", "region-description"], benchmarks)
    assert found == ["presence", "region-description", "gqa", "region-description-2", "gqa-val", "gqa-2"]
