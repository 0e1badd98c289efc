"""Chat completions of OpenAI-compatible endpoints, for judges and for models: several requests at a time, tried again
where time may mend a fault, and kept in a file as they come in. The key comes from the environment only."""

import http.client
import json
import os
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from locvlm.errors import ConfigError, DataError

OPENAI_URL = "https://api.openai.com/v1"
KEY_VARIABLE = "OPENAI_API_KEY"

_WORKERS = 8  # requests at a time
_TIMEOUT = 120.0  # seconds for one reply
_MAX_PAUSE = 60.0  # seconds between two attempts
_PASSING = frozenset((408, 409, 425, 429, 500, 502, 503, 504, 529))  # faults that time may mend


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a request has no reply. `may_pass`: it was tried as often as allowed, and may work at another time; else the
    endpoint refused it, with `status`."""

    reason: str
    may_pass: bool
    status: int = 0


class Endpoint:
    """An OpenAI-compatible endpoint. `url` is the address up to /v1; `option` names where it was given, for messages.

    Too many requests, server faults, cut connections and replies that are no chat completion are tried again with
    growing pauses (at least those that the server asks for). Raises ConfigError for an address that is none, or that
    holds a password.
    """

    def __init__(
        self,
        url: str,
        key: str | None,
        option: str,
        *,
        pause: float = 1.0,
        attempts: int = 6,
        timeout: float = _TIMEOUT,
    ) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"choosing an endpoint: {option} {url!r} is no http address; give .../v1 of the endpoint")
        if "@" in parts.netloc:
            raise ConfigError(
                f"choosing an endpoint: {option} holds a user or password, which would end up beside the results; put "
                f"the key into {KEY_VARIABLE}"
            )
        self.address = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"
        self._key = key
        self._url = f"{self.address}/chat/completions" + (f"?{parts.query}" if parts.query else "")
        self._pause, self._attempts, self._timeout = pause, attempts, timeout
        self._stop = threading.Event()

    def outcomes(self, bodies: Sequence[Mapping[str, Any]]) -> Generator[tuple[int, str | Fault], None, None]:
        """(number of the request, its reply or why there is none) of every request, in any order, as they come in.
        Closing the generator stops what is under way."""
        self._stop.clear()
        with ThreadPoolExecutor(max_workers=_WORKERS) as pool:
            numbers = {pool.submit(self._reply, body): number for number, body in enumerate(bodies)}
            try:
                for future in as_completed(numbers):
                    yield numbers[future], future.result()
            finally:  # a fault, or nobody reads on: what waits is not asked any more
                self._stop.set()
                pool.shutdown(wait=True, cancel_futures=True)

    def _reply(self, body: Mapping[str, Any]) -> str | Fault:
        data = json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        fault = ""
        for attempt in range(self._attempts):
            request = urllib.request.Request(self._url, data, headers)
            wait = self._pause * 2**attempt
            try:
                with _OPENER.open(request, timeout=self._timeout) as answer:
                    return _content(answer.read())
            except urllib.error.HTTPError as error:
                fault = f"HTTP {error.code} {_excerpt(error)}"
                if error.code not in _PASSING:
                    return Fault(fault, may_pass=False, status=error.code)
                wait = max(wait, _asked_pause(error.headers.get("Retry-After")))
            except (OSError, http.client.HTTPException, ValueError) as error:
                fault = f"{type(error).__name__}: {error}"
            if attempt + 1 < self._attempts and self._stop.wait(min(wait, _MAX_PAUSE)):
                break
        return Fault(f"{self._attempts} attempts failed, the last with {fault}", may_pass=True)


def endpoint_key(url: str, option: str = "--url") -> str | None:
    """The key for an endpoint, from the environment only. Raises ConfigError when OpenAI's own is asked without."""
    key = os.environ.get(KEY_VARIABLE)
    if not key and url == OPENAI_URL:
        raise ConfigError(
            f"choosing an endpoint: {KEY_VARIABLE} is not set; export it, or name another endpoint with {option}"
        )
    return key or None


class ReplyCache:
    """Replies by key, one JSON line each; a key may have several, the last counts. `option` names the option for the
    file, for messages. Raises DataError for a file that holds something else."""

    def __init__(self, path: Path, option: str) -> None:
        self._path = path
        self.replies: dict[str, list[str]] = {}
        data = path.read_bytes() if path.is_file() else b""
        whole, newline, torn = data.rpartition(b"\n")
        if torn:  # the run was killed while it wrote
            with open(path, "r+b") as file:
                file.truncate(len(whole) + len(newline))
        for number, line in enumerate(whole.split(b"\n") if whole else (), 1):
            try:
                row = json.loads(line)
                self.replies.setdefault(row["key"], []).append(str(row["reply"]))
            except (ValueError, KeyError, TypeError):
                raise DataError(
                    f"reading the replies {path}: line {number} is not one of them; remove the file to ask again, or "
                    f"name another with {option}"
                ) from None

    def add(self, key: str, reply: str) -> None:
        """Keep a reply, in the file too."""
        self.replies.setdefault(key, []).append(reply)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, "reply": reply}) + "\n")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """An endpoint that sends elsewhere is a fault: the key must not travel to another host."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


def _content(data: bytes) -> str:
    """The text of a chat completion. Raises ValueError for anything else."""
    try:
        content = json.loads(data)["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError, json.JSONDecodeError, UnicodeDecodeError):
        raise ValueError(f"not a chat completion: {data[:80]!r}") from None
    if not isinstance(content, str):
        raise ValueError(f"a chat completion without text: {data[:80]!r}")
    return content


def _excerpt(error: urllib.error.HTTPError) -> str:
    try:
        return error.read(200).decode("utf-8", "replace").strip()
    except OSError:
        return str(error.reason)


def _asked_pause(value: str | None) -> float:
    try:
        return max(0.0, float(value or 0))
    except ValueError:  # a date; the growing pauses will reach it
        return 0.0
