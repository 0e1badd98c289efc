"""`locvlm predict` with models that others trained: a folder in LLaVA's own layout, an endpoint; what is refused."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from locvlm.cli import main
from locvlm.records import read_json, read_jsonl, write_jsonl
from tests.endpoint import Endpoint, reply
from tests.llava import make_folder, make_tower


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six images, questions about them, Shikra."""
    root = tmp_path_factory.mktemp("predict")
    (root / "images").mkdir()
    for number in range(6):
        Image.linear_gradient("L").resize((40, 30)).rotate(40 * number).save(root / "images" / f"{number}.png")
    asked = [{"id": str(n), "image": f"{n % 6}.png", "prompt": f"Is there dog {n}?", "label": "yes"} for n in range(12)]
    write_jsonl(root / "pope.jsonl", [{**row, "reference": "yes"} for row in asked])
    place = {"objective": "loc_pred", "category": "dog", "box": [4, 3, 20, 21], "width": 40, "height": 30}
    write_jsonl(root / "places.jsonl", [{"id": str(n), "image": f"{n}.png", "prompt": "", **place} for n in range(6)])
    make_folder(
        root / "shikra", make_tower(root / "tower"), ("<im_patch>", "<im_start>", "<im_end>"), model_type="shikra"
    )
    return root


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server = Endpoint("Yes, there is")
    yield server
    server.close()


def predict(folder: Path, output: Path, *more: Any, task: str = "presence", data: str = "pope.jsonl") -> list[str]:
    shared = ["predict", "--task", task, "--data", folder / data, "--images", folder / "images", "--output", output]
    return [str(value) for value in (*shared, *more)]


def message(capsys: pytest.CaptureFixture[str]) -> str:
    text = capsys.readouterr().err
    assert text.startswith("locvlm: ")
    assert "Traceback" not in text
    return text


def test_shikra_is_asked_in_its_own_form_and_scored(folder: Path, tmp_path: Path) -> None:
    options = ("--model", folder / "shikra", "--max-new-tokens", 4, "--temperature", 0)
    output = tmp_path / "places.jsonl"
    assert main(predict(folder, output, *options, task="localization", data="places.jsonl")) == 0
    row = read_jsonl(output)[0]
    assert row["prompt"] == (
        "In the given <im_start><image><im_end>, could you find and tell me the coordinates of dog?"
    )
    asked = read_json(tmp_path / "places.meta.json")["identity"]["asked"]
    assert asked["family"] == "shikra"
    assert asked["geometry"] == {"kind": "letterbox_white", "side": 28}
    assert (asked["coordinates"]["representation"], asked["coordinates"]["decimals"]) == ("nfp", 3)
    metrics = ["--predictions", str(output), "--output", str(tmp_path / "m.json")]
    assert main(["score", "--task", "localization", *metrics]) == 0
    assert json.loads((tmp_path / "m.json").read_text())["n"] == 6


def test_an_endpoint_is_asked_and_its_replies_lie_beside_the_answers(
    folder: Path, endpoint: Endpoint, tmp_path: Path
) -> None:
    options = ("--model", "openai:vlm", "--url", endpoint.url)
    assert main(predict(folder, tmp_path / "a.jsonl", *options)) == 0
    assert {row["parsed"] for row in read_jsonl(tmp_path / "a.jsonl")} == {"yes"}
    assert len((tmp_path / "a.replies.jsonl").read_text().splitlines()) == len(endpoint.requests) == 12
    again = (*options, "--cache", tmp_path / "a.replies.jsonl")
    assert main(predict(folder, tmp_path / "b.jsonl", *again)) == 0
    assert len(endpoint.requests) == 12
    assert (tmp_path / "b.jsonl").read_bytes() == (tmp_path / "a.jsonl").read_bytes()


def test_a_killed_run_has_kept_its_answers(folder: Path, endpoint: Endpoint, tmp_path: Path) -> None:
    def answer(number: int, _body: dict[str, Any]) -> tuple[int, bytes, dict[str, str]]:
        time.sleep(30 if number > 7 else 0)
        return reply(f"Yes {number}")

    endpoint.answer = answer
    options = ("--model", "openai:vlm", "--url", endpoint.url, "--batch-size", 4)
    command = [sys.executable, "-m", "locvlm", *predict(folder, tmp_path / "a.jsonl", *options)]
    run = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    replies = tmp_path / "a.replies.jsonl"
    deadline = time.monotonic() + 60
    while not replies.is_file() or replies.read_bytes().count(b"\n") < 7:
        assert run.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    assert not (tmp_path / "a.jsonl").exists()
    endpoint.requests.clear()
    endpoint.answer = lambda number, _body: reply(f"Yes again {number}")
    assert main(predict(folder, tmp_path / "a.jsonl", *options)) == 0
    assert len(endpoint.requests) == 12 - 7
    answers = [row["answer"] for row in read_jsonl(tmp_path / "a.jsonl")]
    assert sum("again" in answer for answer in answers) == 5
    assert {path.name for path in tmp_path.iterdir()} == {"a.jsonl", "a.meta.json", "a.replies.jsonl"}


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (("--model", "openai:"), "is not of the form openai:NAME"),
        (("--model", "openai:m"), "OPENAI_API_KEY is not set"),
        (("--model", "openai:m", "--url", "http://h/v1", "--workers", "2"), "go with a model folder"),
        (("--model", "{folder}/shikra", "--url", "http://h/v1"), "--url and --cache go with --model openai:NAME"),
        (("--model", "{folder}/shikra", "--engine", "vllm"), "it is a model in LLaVA's own layout"),
        (("--model", "{folder}/images"), "config.json cannot be read"),
        (("--model", "{folder}/none"), "there is no such folder"),
        (("--model", "{folder}/shikra", "--config", "{folder}/none.yaml"), "there is no such file"),
    ],
)
def test_a_model_that_cannot_be_gives_one_message(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    fault: str,
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    given = [option.format(folder=folder) for option in options]
    assert main(predict(folder, tmp_path / "a.jsonl", *given)) == 2
    assert fault in message(capsys)
    assert list(tmp_path.iterdir()) == []
