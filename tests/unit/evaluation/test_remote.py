"""A model behind an OpenAI-compatible endpoint: a real small server, its faults and its cache."""

import base64
import io
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from locvlm.config import EvaluationConfig
from locvlm.errors import ConfigError, DataError
from locvlm.evaluation.asks import Ask, Unanswered
from locvlm.evaluation.predict import Job, Options, predict
from locvlm.evaluation.remote import RemoteModel, remote_model
from locvlm.evaluation.score import score
from locvlm.evaluation.tasks import TASKS
from locvlm.pixels import open_images
from locvlm.records import read_json, read_jsonl, write_jsonl
from tests.endpoint import Endpoint, reply

GREEDY = EvaluationConfig(temperature=0.0, max_new_tokens=16)


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server = Endpoint("It is on the left")
    yield server
    server.close()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(6):
        Image.new("RGB", (8, 4), (40 * number, 0, 0)).save(folder / f"{number}.png")
    Image.new("RGB", (8, 4), (0, 200, 0)).save(folder / "green.jpg")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (8, 4), (0, 0, 200)).save(folder / "turned.jpg", exif=turned)
    Image.new("P", (8, 4), 3).save(folder / "palette.gif")
    return folder


def model(endpoint: Endpoint, cache: Path, **changes: Any) -> RemoteModel:
    made = remote_model("openai:vlm-x", endpoint.url, cache, None)
    return RemoteModel(made.name, made.url, made.cache, made.family, **{"pause": 0.01, "attempts": 3, **changes})


def ask(images: Path, name: str = "0.png", prompt: str = "Where?", mirror: bool = False) -> Ask:
    return Ask(f"{name}-{prompt}", open_images(images), name, prompt, mirror)


def sent(request: dict[str, Any]) -> tuple[str, bytes]:
    """(media type, bytes) of the image of a request."""
    head, _, data = request["messages"][0]["content"][0]["image_url"]["url"].partition(",")
    return head, base64.b64decode(data)


def test_an_image_and_a_question_travel_in_one_user_message(
    endpoint: Endpoint, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    engine = model(endpoint, tmp_path / "c.jsonl").open()
    assert engine.answers([ask(images, "green.jpg")], GREEDY) == ["It is on the left"]
    (request,) = endpoint.requests
    assert (request["path"], request["model"]) == ("/v1/chat/completions", "vlm-x")
    assert (request["temperature"], request["max_tokens"], request["seed"]) == (0.0, 16, 0)
    (message,) = request["messages"]
    assert message["role"] == "user"
    assert message["content"][1] == {"type": "text", "text": "Where?"}
    assert sent(request) == ("data:image/jpeg;base64", (images / "green.jpg").read_bytes())  # as it is stored
    assert endpoint.headers[0]["Authorization"] == "Bearer secret"
    assert "secret" not in (tmp_path / "c.jsonl").read_text()


@pytest.mark.parametrize(
    ("name", "mirror"), [("turned.jpg", False), ("palette.gif", False), ("0.png", True)], ids=["exif", "gif", "mirror"]
)
def test_what_would_be_seen_otherwise_is_sent_as_plain_pixels(
    endpoint: Endpoint, images: Path, tmp_path: Path, name: str, mirror: bool
) -> None:
    asked = ask(images, name, mirror=mirror)
    model(endpoint, tmp_path / "c.jsonl").open().answers([asked], GREEDY)
    kind, data = sent(endpoint.requests[0])
    assert kind == "data:image/png;base64"
    shown = Image.open(io.BytesIO(data))
    assert not shown.getexif()
    assert shown.size == (8, 4)
    assert shown.tobytes() == asked.open().convert("RGB").tobytes()


def test_replies_are_kept_and_not_asked_for_again(endpoint: Endpoint, images: Path, tmp_path: Path) -> None:
    asks = [ask(images, f"{n}.png") for n in range(6)]
    endpoint.answer = lambda number, body: reply(f"answer {number}\n")
    first = model(endpoint, tmp_path / "c.jsonl").open().answers(asks, GREEDY)
    assert sorted(first) == [f"answer {n}" for n in range(1, 7)]
    assert model(endpoint, tmp_path / "c.jsonl").open().answers(asks[::-1], GREEDY) == first[::-1]
    assert len(endpoint.requests) == 6
    other = EvaluationConfig(temperature=0.5, max_new_tokens=16)
    model(endpoint, tmp_path / "c.jsonl").open().answers(asks, other)
    assert len(endpoint.requests) == 12  # another question to the model


FAULTS = [
    (429, b"slow down", {"Retry-After": "0.05"}),
    (500, b"oops", {}),
    (200, b'{"choices": [', {}),
    (200, b'{"choices": []}', {}),
    (200, b"\xff\xfe", {}),
    (0, b"", {}),
]


@pytest.mark.parametrize("fault", FAULTS)
def test_passing_faults_are_tried_again(
    endpoint: Endpoint, images: Path, tmp_path: Path, fault: tuple[int, bytes, dict[str, str]]
) -> None:
    endpoint.answer = lambda number, body: fault if number < 3 else reply("left")
    assert model(endpoint, tmp_path / "c.jsonl").open().answers([ask(images)], GREEDY) == ["left"]
    assert len(endpoint.requests) == 3


def test_a_server_that_says_nothing_in_time_is_one_failed_question(
    endpoint: Endpoint, images: Path, tmp_path: Path
) -> None:
    def answer(_number: int, body: dict[str, Any]) -> tuple[int, bytes, dict[str, str]]:
        if body["messages"][0]["content"][1]["text"] == "slow":
            time.sleep(0.6)
        return reply("left")

    endpoint.answer = answer
    asks = [ask(images, prompt="slow"), ask(images, prompt="quick")]
    slow, quick = model(endpoint, tmp_path / "c.jsonl", timeout=0.2, attempts=2).open().answers(asks, GREEDY)
    assert quick == "left"
    assert isinstance(slow, Unanswered)
    assert slow.reason.startswith("2 attempts failed, the last with TimeoutError")


def test_a_refused_request_is_one_failed_question(endpoint: Endpoint, images: Path, tmp_path: Path) -> None:
    def answer(_number: int, body: dict[str, Any]) -> tuple[int, bytes, dict[str, str]]:
        is_bad = body["messages"][0]["content"][1]["text"] == "bad"
        return (400, b"content policy", {}) if is_bad else reply("left")

    endpoint.answer = answer
    asks = [ask(images, prompt=prompt) for prompt in ("bad", "good")]
    assert model(endpoint, tmp_path / "c.jsonl").open().answers(asks, GREEDY) == [
        Unanswered("HTTP 400 content policy"),
        "left",
    ]


@pytest.mark.parametrize(("status", "headers"), [(401, {}), (404, {}), (302, {"Location": "http://127.0.0.1:9/"})])
def test_what_no_question_can_get_past_stops_the_run(
    endpoint: Endpoint, images: Path, tmp_path: Path, status: int, headers: dict[str, str]
) -> None:
    endpoint.answer = lambda number, body: (status, b"no such model", headers)
    with pytest.raises(
        DataError, match=rf"asking openai:vlm-x at .*HTTP {status} no such model; check the model's name"
    ):
        model(endpoint, tmp_path / "c.jsonl").open().answers([ask(images)], GREEDY)
    assert len(endpoint.requests) == 1


def test_a_newer_name_for_the_length_is_found_out(endpoint: Endpoint, images: Path, tmp_path: Path) -> None:
    def answer(_number: int, body: dict[str, Any]) -> tuple[int, bytes, dict[str, str]]:
        if "max_tokens" in body:
            return 400, b"'max_tokens' is not supported, use 'max_completion_tokens'", {}
        return reply(str(body["max_completion_tokens"]))

    endpoint.answer = answer
    engine = model(endpoint, tmp_path / "c.jsonl").open()
    assert engine.answers([ask(images, "0.png"), ask(images, "1.png")], GREEDY) == ["16", "16"]
    assert engine.answers([ask(images, "2.png")], GREEDY) == ["16"]
    assert len(endpoint.requests) == 5
    model(endpoint, tmp_path / "c.jsonl").open().answers([ask(images, "0.png")], GREEDY)
    assert len(endpoint.requests) == 5


@pytest.mark.parametrize(
    ("spec", "url", "fault"),
    [
        ("gpt-4", None, "'gpt-4' is not of the form openai:NAME"),
        ("openai:", None, "is not of the form"),
        ("openai:m", "localhost:8000", "is no http address"),
        ("openai:m", "http://me:word@x/v1", "holds a user or password"),
        ("openai:m", None, "OPENAI_API_KEY is not set; export it, or name another endpoint with --url"),
    ],
)
def test_models_that_cannot_be_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, url: str | None, fault: str
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ConfigError, match=fault):
        remote_model(spec, url, tmp_path / "c.jsonl", None).identity()


def questions(images: Path, n: int = 12) -> Job:
    rows = [
        {"id": str(i), "image": f"{i % 6}.png", "prompt": f"question {i}", "reference": ("left", "right")[i % 2]}
        for i in range(n)
    ]
    write_jsonl(images.parent / "questions.jsonl", rows)
    return Job(TASKS["coco-spatial"], images.parent / "questions.jsonl", images.parent / "out.jsonl")


def test_a_run_reports_what_failed_and_counts_it_as_wrong(endpoint: Endpoint, images: Path) -> None:
    def answer(_number: int, body: dict[str, Any]) -> tuple[int, bytes, dict[str, str]]:
        text = body["messages"][0]["content"][1]["text"]
        return (500, b"busy", {}) if text in ("question 0", "question 2") else reply("left")

    endpoint.answer = answer
    (images / "5.png").write_bytes(b"no image")
    job = questions(images)
    predict([job], Options([images]), model(endpoint, images.parent / "c.jsonl"))
    rows = read_jsonl(job.output)
    assert [row["id"] for row in rows] == [str(i) for i in range(12)]
    failed = {row["id"]: row["failure"] for row in rows if "failure" in row}
    assert sorted(failed, key=int) == ["0", "2", "5", "11"]
    assert failed["0"] == "3 attempts failed, the last with HTTP 500 busy"
    assert "5.png" in failed["5"]
    meta = read_json(images.parent / "out.meta.json")
    assert meta["identity"]["model"] == f"openai:vlm-x@{endpoint.url}"
    assert meta["identity"]["asked"]["family"] == "openai"
    assert meta["failed"] == failed
    metrics = score(job.task, job.output, job.data)
    assert metrics["accuracy"] == 4 / 12  # six lefts, two of them without an answer
    assert metrics["n_failures"] == 4


def test_an_endpoint_that_dies_stops_the_run_and_only_the_rest_is_asked_afterwards(
    endpoint: Endpoint, images: Path
) -> None:
    job = questions(images, 60)
    remote = model(endpoint, images.parent / "c.jsonl", attempts=1)
    endpoint.answer = lambda number, body: reply("left") if number <= 20 else (503, b"down", {})
    with pytest.raises(DataError, match=r"\d+ of the \d+ questions asked until now failed.*HTTP 503 down"):
        predict([job], Options([images]), remote)
    assert not job.output.exists()
    kept = len((images.parent / "c.jsonl").read_text().splitlines())
    assert kept == 20
    endpoint.requests.clear()
    endpoint.answer = lambda number, body: reply("left")
    predict([job], Options([images]), remote)
    assert len(endpoint.requests) == 60 - kept
    assert [row["answer"] for row in read_jsonl(job.output)] == ["left"] * 60


def test_places_are_asked_for_only_in_a_form_that_was_named(endpoint: Endpoint, images: Path) -> None:
    reference = {"objective": "loc_pred", "category": "dog", "box": [1, 1, 2, 2], "width": 8, "height": 4}
    write_jsonl(images.parent / "q.jsonl", [{"id": "0", "image": "0.png", "prompt": "Where?", **reference}])
    job = Job(TASKS["localization"], images.parent / "q.jsonl", images.parent / "loc.jsonl")
    with pytest.raises(ConfigError, match=r"nothing says how it writes places.*--config"):
        predict([job], Options([images]), model(endpoint, images.parent / "c.jsonl"))
    assert endpoint.requests == []


def test_a_torn_cache_is_mended_and_a_strange_one_told(endpoint: Endpoint, images: Path, tmp_path: Path) -> None:
    cache = tmp_path / "c.jsonl"
    asks = [ask(images, "0.png"), ask(images, "1.png")]
    model(endpoint, cache).open().answers(asks, GREEDY)
    cache.write_bytes(cache.read_bytes()[:-7])
    model(endpoint, cache).open().answers(asks, GREEDY)
    assert len(endpoint.requests) == 3
    assert all(json.loads(line)["reply"] for line in cache.read_text().splitlines())
    cache.write_text("hello\n")
    with pytest.raises(DataError, match=r"line 1 is not one of them.*--cache"):
        model(endpoint, cache).open()
