import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from locvlm.errors import ConfigError, DataError
from locvlm.evaluation.endpoint import endpoint_key
from locvlm.evaluation.judges import (
    Case,
    ExactJudge,
    LexicalJudge,
    ModelJudge,
    OpenAIChat,
    Verdict,
    make_judge,
    parse_verdict,
)
from tests.endpoint import Endpoint, reply

YES = "{'pred': 'yes', 'score': 4}"


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("{'pred': 'yes', 'score': 5}", Verdict(True, 5)),
        ('{"pred": "no", "score": 0}', Verdict(False, 0)),
        ("{'pred': 'yes', 'score': 4.8}", Verdict(True, 4)),  # int(4.8), as the protocol's script takes it
        ("{'pred': 'No', 'score': '2'}", Verdict(False, 2)),
        ("Sure! {'pred': 'YES', 'score': 3}. Hope this helps.", Verdict(True, 3)),
        ("```python\n{'pred': 'yes', 'score': 3}\n```", Verdict(True, 3)),
        ("{} {'pred': 'no', 'score': 1}", Verdict(False, 1)),
        ("{'pred': 'yes'}", Verdict(True, None)),
        ("{'pred': 'yes', 'score': 9}", Verdict(True, None)),
        ("{'pred': 'yes', 'score': True}", Verdict(True, None)),
        ("{'pred': 'yes', 'score': 1e999}", Verdict(True, None)),
        ("{'score': 5}", Verdict(None)),
        ("{'pred': 1, 'score': 5}", Verdict(None)),
        ("{'pred': 'maybe', 'score': 5}", Verdict(None)),
        ("{'pred': yes, 'score': 5}", Verdict(None)),
        ("{'pred': 'yes', 'score': 5", Verdict(None)),
        ("__import__('os').system('true')", Verdict(None)),
        ("{'pred': __import__('os').getcwd()}", Verdict(None)),
        ("yes", Verdict(None)),
        ("", Verdict(None)),
        ("{" * 100_000, Verdict(None)),
        ("{'pred': " + "-" * 3000 + "1}", Verdict(None)),
    ],
)
def test_replies_are_read_as_the_protocol_reads_them(reply: str, verdict: Verdict) -> None:
    assert parse_verdict(reply) == verdict


def case(prediction: str = "A dog.", answer: str = "dog", question: str = "what is it") -> Case:
    return Case(question, answer, prediction)


@pytest.mark.parametrize(
    ("prediction", "answer", "exact", "lexical"),
    [
        ("A dog.", "dog", True, True),
        ("two", "2", True, True),
        ("There is a dog here", "dog", False, True),
        ("hotdog", "dog", False, False),
        ("dog", "big dog", False, False),
        ("", "dog", False, False),
        ("", "a", False, False),  # nothing is left of the reference, which must not equal an empty answer
        ("the", "a", False, False),
        ("A", "a", True, True),
    ],
)
def test_the_rules_of_the_offline_judges(prediction: str, answer: str, exact: bool, lexical: bool) -> None:
    for judge, expected in ((ExactJudge(), exact), (LexicalJudge(), lexical)):
        assert judge.verdicts([case(prediction, answer)]) == [Verdict(expected)]


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = Endpoint(YES)
    yield server
    server.close()


def judge(endpoint: Endpoint, cache: Path, key: str | None = None) -> ModelJudge:
    return ModelJudge(OpenAIChat("gpt-x", endpoint.url + "/", key, pause=0.01, attempts=4), cache)


def test_the_endpoint_is_asked_as_the_protocol_says(endpoint: Endpoint, tmp_path: Path) -> None:
    found = judge(endpoint, tmp_path / "c.jsonl", "secret")
    assert found.verdicts([case()]) == [Verdict(True, 4)]
    assert found.id == f"openai:gpt-x@{endpoint.url}"
    (request,) = endpoint.requests
    assert (request["path"], request["model"], request["temperature"]) == ("/v1/chat/completions", "gpt-x", 0)
    assert [message["role"] for message in request["messages"]] == ["system", "user"]
    system, user = (message["content"] for message in request["messages"])
    assert system.startswith("You are an intelligent chatbot designed for evaluating")
    assert user.startswith(
        "Please evaluate the following video-based question-answer pair:\n\n"
        "Question: what is it\nCorrect Answer: dog\nPredicted Answer: A dog.\n\n"
    )
    assert user.endswith("your response should look like this: {'pred': 'yes', 'score': 4.8}.")
    assert endpoint.headers[0]["Authorization"] == "Bearer secret"
    assert "secret" not in (tmp_path / "c.jsonl").read_text()


def test_without_a_key_none_is_sent(endpoint: Endpoint, tmp_path: Path) -> None:
    judge(endpoint, tmp_path / "c.jsonl").verdicts([case()])
    assert "Authorization" not in endpoint.headers[0]


def test_verdicts_come_in_the_order_of_the_cases_and_equal_ones_are_asked_once(
    endpoint: Endpoint, tmp_path: Path
) -> None:
    def answer(number: int, body: dict[str, Any]) -> tuple[int, bytes, dict[str, str]]:
        time.sleep(0.02 if "Predicted Answer: 0" in body["messages"][1]["content"] else 0)  # the first comes last
        said = body["messages"][1]["content"].split("Predicted Answer: ")[1][0]
        return reply(f"{{'pred': '{'yes' if int(said) % 2 else 'no'}', 'score': {said}}}")

    endpoint.answer = answer
    cases = [case(str(n % 4)) for n in range(12)]
    found = judge(endpoint, tmp_path / "c.jsonl").verdicts(cases)
    assert [verdict.score for verdict in found] == [0, 1, 2, 3] * 3
    assert [verdict.right for verdict in found] == [False, True] * 6
    assert len(endpoint.requests) == 4


@pytest.mark.parametrize(
    "fault",
    [
        (429, b"slow down", {"Retry-After": "0.05"}),
        (429, b"slow down", {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}),
        (500, b"oops", {}),
        (503, b"", {}),
        (200, b'{"choices": [', {}),
        (200, b'{"choices": []}', {}),
        (200, b"[1]", {}),
        (200, b"\xff\xfe", {}),
        reply(None),
        (0, b"", {}),
    ],
)
def test_passing_faults_are_tried_again(
    endpoint: Endpoint, tmp_path: Path, fault: tuple[int, bytes, dict[str, str]]
) -> None:
    endpoint.answer = lambda number, body: fault if number < 3 else reply(YES)
    assert judge(endpoint, tmp_path / "c.jsonl").verdicts([case()]) == [Verdict(True, 4)]
    assert len(endpoint.requests) == 3


def test_a_pause_that_the_server_asks_for_is_kept(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.answer = lambda number, body: (429, b"", {"Retry-After": "0.3"}) if number == 1 else reply(YES)
    begin = time.monotonic()
    judge(endpoint, tmp_path / "c.jsonl").verdicts([case()])
    assert time.monotonic() - begin >= 0.3


@pytest.mark.parametrize(("status", "headers"), [(401, {}), (404, {}), (302, {"Location": "http://127.0.0.1:9/"})])
def test_a_refusal_stops_with_one_message(
    endpoint: Endpoint, tmp_path: Path, status: int, headers: dict[str, str]
) -> None:
    endpoint.answer = lambda number, body: (status, b"no such model", headers)
    with pytest.raises(DataError, match=f"HTTP {status} no such model; check the model's name"):
        judge(endpoint, tmp_path / "c.jsonl", "secret").verdicts([case()])
    assert len(endpoint.requests) == 1  # neither tried again nor followed elsewhere with the key


def test_a_dead_endpoint_stops_and_a_second_run_asks_the_rest_only(endpoint: Endpoint, tmp_path: Path) -> None:
    cases = [case(str(n)) for n in range(30)]
    endpoint.answer = lambda number, body: reply(YES) if number <= 10 else (500, b"down", {})
    with pytest.raises(DataError, match=r"4 attempts failed, the last with HTTP 500 down.*run the same command again"):
        judge(endpoint, tmp_path / "c.jsonl").verdicts(cases)
    kept = len((tmp_path / "c.jsonl").read_text().splitlines())
    assert 1 <= kept <= 10
    endpoint.requests.clear()
    endpoint.answer = lambda number, body: reply(YES)
    assert judge(endpoint, tmp_path / "c.jsonl").verdicts(cases) == [Verdict(True, 4)] * 30
    assert len(endpoint.requests) == 30 - kept
    endpoint.requests.clear()
    assert judge(endpoint, tmp_path / "c.jsonl").verdicts(cases) == [Verdict(True, 4)] * 30
    assert endpoint.requests == []


def test_a_line_torn_by_a_kill_is_asked_again(endpoint: Endpoint, tmp_path: Path) -> None:
    cache = tmp_path / "c.jsonl"
    judge(endpoint, cache).verdicts([case("1"), case("2")])
    whole = cache.read_bytes()
    cache.write_bytes(whole[:-5])
    endpoint.requests.clear()
    assert judge(endpoint, cache).verdicts([case("1"), case("2")]) == [Verdict(True, 4)] * 2
    assert len(endpoint.requests) == 1
    assert sorted(cache.read_bytes().splitlines()) == sorted(whole.splitlines())
    cache.write_bytes(b"what is this\n" + whole)
    with pytest.raises(DataError, match=r"line 1 is not one of them; remove the file"):
        judge(endpoint, cache)


def test_replies_belong_to_their_judge(endpoint: Endpoint, tmp_path: Path) -> None:
    judge(endpoint, tmp_path / "c.jsonl").verdicts([case()])
    other = ModelJudge(OpenAIChat("gpt-y", endpoint.url, None), tmp_path / "c.jsonl")
    other.verdicts([case()])
    assert [request["model"] for request in endpoint.requests] == ["gpt-x", "gpt-y"]


def test_an_unreadable_reply_is_asked_for_again_and_then_stands(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.answer = lambda number, body: reply("I would say yes." if number < 3 else YES)
    assert judge(endpoint, tmp_path / "a.jsonl").verdicts([case()]) == [Verdict(True, 4)]
    assert len(endpoint.requests) == 3
    endpoint.requests.clear()
    endpoint.answer = lambda number, body: reply("I would say yes.")
    for _ in range(2):  # the second run reads it from the file
        assert judge(endpoint, tmp_path / "b.jsonl").verdicts([case()]) == [Verdict(None)]
    assert len(endpoint.requests) == 3


class Parrot:
    """A text model that says what it was told to say."""

    def __init__(self, text: str) -> None:
        self.text, self.batches = text, [0]

    def replies(self, chats: Sequence[Sequence[Any]]) -> list[str]:
        self.batches.append(len(chats))
        return [self.text for _ in chats]


def test_a_local_judge_is_pinned_by_the_hash_of_its_files(tmp_path: Path) -> None:
    folder = tmp_path / "judge"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    opened: list[Path] = []
    parrot = Parrot("{'pred': 'no', 'score': 1}")

    def open_model(path: Path) -> Parrot:
        opened.append(path)
        return parrot

    found = make_judge(f"hf:{folder}", None, tmp_path / "c.jsonl", open_model)
    name, _, pin = found.id.partition("@")
    assert (name, len(pin)) == ("hf:judge", len("sha256:") + 64)
    assert opened == []  # not before there is something to ask
    assert found.verdicts([case(str(n)) for n in range(40)]) == [Verdict(False, 1)] * 40
    assert sum(parrot.batches) == 40
    assert max(parrot.batches) == 16
    again = make_judge(f"hf:{folder}@{pin}", None, tmp_path / "c.jsonl", open_model)
    assert again.verdicts([case("0")]) == [Verdict(False, 1)]
    assert opened == [folder]  # the file had the reply
    (folder / "config.json").write_text('{"a": 1}')
    with pytest.raises(DataError, match=f"have the hash .*{pin} was asked for"):
        make_judge(f"hf:{folder}@{pin}", None, tmp_path / "c.jsonl", open_model)
    assert make_judge(f"hf:{folder}", None, tmp_path / "c.jsonl", open_model).id != found.id


@pytest.mark.parametrize(
    ("spec", "url", "fault"),
    [
        ("gpt-4", None, "'gpt-4' is not one of exact, lexical, openai:MODEL, hf:FOLDER"),
        ("openai:", None, "is not one of"),
        ("exact", "http://x/v1", "--judge-url goes with openai:MODEL"),
        ("openai:m", "ftp://x/v1", "is no http address"),
        ("openai:m", "localhost:8000", "is no http address"),
        ("openai:m", "http://me:word@x/v1", "holds a user or password"),
        ("openai:m", None, "OPENAI_API_KEY is not set"),
        ("hf:/nowhere", None, r"no model folder \(no config.json\)"),
    ],
)
def test_judges_that_cannot_be_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, url: str | None, fault: str
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises((ConfigError, DataError), match=fault):
        make_judge(spec, url, tmp_path / "c.jsonl", lambda folder: Parrot(""))


def test_the_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    assert endpoint_key("http://localhost/v1") == "k"
    monkeypatch.delenv("OPENAI_API_KEY")
    assert endpoint_key("http://localhost/v1") is None
