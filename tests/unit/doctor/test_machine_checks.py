"""`locvlm doctor` on this machine, and on machines that lack something."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from locvlm import doctor
from locvlm.cli import main
from locvlm.doctor import machine
from locvlm.presets import preset

TINY = preset("tiny")
A100 = "NVIDIA A100-SXM4-80GB, 580.65.06, 81920\n"


def by_name(config: Any = TINY, folder: Path = Path(), gpu_type: str = "") -> dict[str, doctor.Check]:
    return {check.name: check for check in doctor.check_machine(config, folder, gpu_type)}


def test_this_machine_can_run_the_tiny_preset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--preset", "tiny", "--folder", str(tmp_path / "new"), "--storage", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert f"ok      Python: {sys.version.split()[0]}" in said.out
    assert "ok      packages: torch " in said.out
    assert f"ok      storage {tmp_path}: an object was written, read and deleted" in said.out
    assert "WARNING MLflow: MLFLOW_TRACKING_URI is not set" in said.out
    assert "nothing is in the way of a run" in said.err
    assert list(tmp_path.iterdir()) == []


def test_a_disk_or_a_memory_that_is_too_small_for_the_preset_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda place: usage._replace(free=10 * 2**30, total=64 * 2**20))
    found = by_name(preset("locvlm-b"))
    assert found["disk"].state == "failed"
    assert found["disk"].mend.startswith("80 GiB hold three checkpoints")
    assert found["shared memory"].state == "warning"
    assert "--shm-size" in found["shared memory"].mend
    assert machine._memory(2**60).state == "failed"
    assert main(["doctor", "--preset", "locvlm-b"]) == 2
    assert "disk" in capsys.readouterr().err


def test_a_package_of_another_version_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    real = machine.importlib.metadata.version

    def version(name: str) -> str:
        if name == "deepspeed":
            raise machine.importlib.metadata.PackageNotFoundError
        return "1.0" if name == "kfp" else real(name)

    monkeypatch.setattr(machine.importlib.metadata, "version", version)
    check = by_name()["packages"]
    assert check.state == "failed"
    assert check.found == "deepspeed is missing; kfp 1.0 is not ==2.17.0"


@pytest.mark.parametrize(
    ("said", "n_workers", "gpu_type", "state", "words"),
    [
        (A100 * 8, 8, "A100", "ok", "NVIDIA A100-SXM4-80GB, driver 580.65.06, 81920 MiB"),
        (A100, 8, "", "warning", "more of them, or --set cluster.num_workers=1"),
        ("Tesla T4, 580.65.06, 15360\n", 1, "A100", "failed", "use a machine with A100"),
        ("", 1, "", "failed", "use a machine with GPUs"),
    ],
)
def test_the_gpus_are_judged_by_type_and_number(
    said: str, n_workers: int, gpu_type: str, state: str, words: str
) -> None:
    check = machine.gpu_check(said, n_workers, gpu_type)
    assert check.state == state
    assert words in check.found + check.mend


def test_a_machine_without_a_gpu_fails_only_where_one_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert by_name()["GPU"].state == "not applicable"
    assert by_name(gpu_type="A100")["GPU"].state == "failed"


def test_a_driver_that_does_not_answer_fails_and_so_does_a_torch_that_sees_no_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path))
    for text, state in (("exit 9", "failed"), (f"echo '{A100.strip()}'", "ok")):
        program.write_text(f"#!/bin/sh\n{text}\n")
        program.chmod(0o755)
        found = {check.name: check for check in machine._gpus(preset("tiny", ["cluster.num_workers=1"]), "")}
        assert found["GPU"].state == state
    torch_sees_one = subprocess.run([sys.executable, "-c", "import torch; print(torch.cuda.is_available())"],
                                    capture_output=True, text=True, check=True).stdout.strip() == "True"  # fmt: skip
    assert found["CUDA"].state == ("ok" if torch_sees_one else "failed")


def test_a_missing_java_is_only_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    from locvlm.evaluation import meteor

    def none() -> str:
        raise meteor.MeteorUnavailable("METEOR needs Java, and there is none")

    monkeypatch.setattr(meteor, "find_java", none)
    assert by_name()["Java"].state == "warning"


def test_a_storage_folder_that_is_not_there_or_not_ours_fails(tmp_path: Path) -> None:
    check = doctor.check_storage(str(tmp_path / "missing"))
    assert (check.state, check.mend) == ("failed", "make the folder, or let this user write there")


def test_the_data_version_is_looked_for_in_its_remote(tmp_path: Path) -> None:
    md5 = "0123456789abcdef0123456789abcdef.dir"
    pin = tmp_path / "data.dvc"
    pin.write_text(f"outs: [{{md5: {md5}, path: data}}]")
    (tmp_path / ".dvc").mkdir()
    assert doctor.check_data(str(pin)).found == "its workspace has no default remote"
    (tmp_path / ".dvc" / "config").write_text("[core]\n    remote = here\n['remote \"here\"']\n    url = store\n")
    assert "is no folder" in doctor.check_data(str(pin)).found
    (tmp_path / ".dvc" / "store" / "files" / "md5" / "01").mkdir(parents=True)
    assert doctor.check_data(str(pin)).mend == "`dvc push` it from where the data is"
    (tmp_path / ".dvc" / "store" / "files" / "md5" / "01" / md5[2:]).write_text("[]")
    assert doctor.check_data(str(pin)).state == "ok"
    assert doctor.check_data(str(tmp_path / "other.dvc")).state == "failed"
    pin.write_text("no pin")
    assert doctor.check_data(str(pin)).mend == "give a file that `dvc add` has written"


def test_services_that_are_away_or_not_named_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert doctor.check_kfp("").state == "not applicable"
    assert doctor.check_kfp("http://127.0.0.1:9").state == "failed"
    assert doctor.check_kfp("no address").state == "failed"
    (dead,) = doctor.check_mlflow("http://user:secret@127.0.0.1:9")
    assert (dead.state, dead.mend) == ("failed", "is the server up, and MLFLOW_TRACKING_URI right?")
    (new,) = doctor.check_mlflow(f"sqlite:///{tmp_path}/mlflow.db")
    assert (new.state, list(tmp_path.iterdir())) == ("ok", [])
    assert doctor.check_workers(0).state == "not applicable"


def test_the_outcome_is_to_be_had_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--preset", "tiny", "--folder", str(tmp_path), "--kfp", "http://127.0.0.1:9", "--json"]) == 2
    told = capsys.readouterr()
    found = json.loads(told.out)
    assert found["ok"] is False
    assert [check["name"] for check in found["checks"] if check["state"] == "failed"] == ["KFP"]
    assert told.err.endswith("checks failed: KFP; mend these first\n")


@pytest.mark.slow
def test_two_workers_add_up_a_number() -> None:
    check = doctor.check_workers(2)
    assert check.state == "ok", check
    assert check.found.startswith("2 workers summed over ")
