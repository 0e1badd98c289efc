"""A model behind an OpenAI-compatible endpoint as an answerer: images travel inside the requests, replies are kept.

A request that the endpoint refuses, or does not answer however often it is tried, is one failed question; only what no
question can get past (a wrong key, no such model or address) stops the run.
"""

import base64
import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from locvlm.config import EvaluationConfig, ExperimentConfig, FamilyConfig
from locvlm.errors import ConfigError, DataError
from locvlm.evaluation.asks import Ask, Unanswered
from locvlm.evaluation.endpoint import KEY_VARIABLE, OPENAI_URL, Endpoint, Fault, ReplyCache, endpoint_key
from locvlm.geometry import to_rgb
from locvlm.prompts import render_family
from locvlm.records import medium_of

_SENT_AS_STORED = {"JPEG": "image/jpeg", "PNG": "image/png"}
_ORIENTATION = 0x0112  # the EXIF tag
_HOPELESS = frozenset((301, 302, 303, 307, 308, 401, 404, 405))  # refusals of every request alike
_LIMITS = ("max_tokens", "max_completion_tokens")  # newer models of OpenAI refuse the first


@dataclass(frozen=True, slots=True)
class RemoteModel:
    """The model `name` at `url`. `cache`: the file that keeps its replies. `family`: how it is asked."""

    name: str
    url: str
    cache: Path
    family: FamilyConfig
    pause: float = field(default=1.0, kw_only=True)
    attempts: int = field(default=6, kw_only=True)
    timeout: float = field(default=120.0, kw_only=True)

    def identity(self) -> dict[str, Any]:
        """What decides its answers, as far as anybody outside can know."""
        return {"model": f"openai:{self.name}@{self._endpoint().address}"}

    def describe(self) -> FamilyConfig:
        """How it is asked."""
        return self.family

    def receipt(self) -> None:
        """There is none."""

    def open(self) -> "RemoteAnswerer":
        """Ready to ask. Raises ConfigError when OpenAI's own endpoint is asked without a key, DataError for a cache
        that is none."""
        return RemoteAnswerer(self.name, self._endpoint(), ReplyCache(self.cache, "--cache"), self.family)

    def _endpoint(self) -> Endpoint:
        key = endpoint_key(self.url)
        return Endpoint(self.url, key, "--url", pause=self.pause, attempts=self.attempts, timeout=self.timeout)


def remote_model(spec: str, url: str | None, cache: Path, places: ExperimentConfig | None) -> RemoteModel:
    """The model that `openai:NAME` names. `places`: a config that says how it is to write places, which nothing else
    does. Raises ConfigError for another spec."""
    name = spec.removeprefix("openai:")
    if not name or name == spec:
        raise ConfigError(f"choosing the model: {spec!r} is not of the form openai:NAME")
    family = FamilyConfig(
        family="openai",
        question="{question}",
        pixels="sent as stored; what the endpoint makes of them is its own matter",
        coordinates=None if places is None else places.coordinates,
    )
    return RemoteModel(name, url or OPENAI_URL, cache, family)


class RemoteAnswerer:
    """See `RemoteModel`."""

    def __init__(self, name: str, endpoint: Endpoint, cache: ReplyCache, family: FamilyConfig) -> None:
        self.config = family
        self._name, self._endpoint, self._cache = name, endpoint, cache
        self._limit = _LIMITS[0]

    def answers(self, asks: Sequence[Ask], decoding: EvaluationConfig) -> list[str | Unanswered]:
        """One answer an ask, in order. Raises DataError for an image that cannot be read and when the endpoint refuses
        whatever it is asked."""
        bodies = [self._body(ask, decoding) for ask in asks]
        keys = [self._key(body) for body in bodies]
        todo = {key: body for key, body in zip(keys, bodies, strict=True) if key not in self._cache.replies}
        faults = dict(self._ask(todo))
        if any(_LIMITS[1] in fault.reason for fault in faults.values()) and self._limit == _LIMITS[0]:
            self._limit = _LIMITS[1]
            faults = dict(self._ask({key: todo[key] for key in faults}))
        return [Unanswered(faults[key].reason) if key in faults else self._cache.replies[key][-1] for key in keys]

    def _ask(self, todo: Mapping[str, dict[str, Any]]) -> Iterator[tuple[str, Fault]]:
        """What went wrong, by key; replies go into the cache."""
        names = list(todo)
        limited = [{self._limit if name in _LIMITS else name: todo[key][name] for name in todo[key]} for key in names]
        with closing(self._endpoint.outcomes(limited)) as outcomes:
            for number, outcome in outcomes:
                if not isinstance(outcome, Fault):
                    self._cache.add(names[number], outcome.strip())
                elif outcome.status in _HOPELESS:
                    raise DataError(
                        f"asking openai:{self._name} at {self._endpoint.address}: {outcome.reason}; check the model's "
                        f"name, --url and {KEY_VARIABLE}"
                    )
                else:
                    yield names[number], outcome

    def _body(self, ask: Ask, decoding: EvaluationConfig) -> dict[str, Any]:
        content = [{"type": "image_url", "image_url": {"url": url}} for url in _data_uris(ask)]
        text = render_family(ask.prompt, self.config)
        return {
            "model": self._name,
            "messages": [{"role": "user", "content": [*content, {"type": "text", "text": text}]}],
            "temperature": decoding.temperature,
            "seed": decoding.seed,
            _LIMITS[0]: decoding.max_new_tokens,
        }

    def _key(self, body: Mapping[str, Any]) -> str:
        return hashlib.sha256(json.dumps([self._endpoint.address, body], sort_keys=True).encode()).hexdigest()


def _data_uris(ask: Ask) -> list[str]:
    """The image of an ask, or the frames of its video, as data URIs. A JPEG or PNG file goes as it is stored, unless it
    asks to be turned: annotations are of the stored pixels."""
    opened = ask.open()
    if isinstance(opened, Image.Image) and not ask.mirror and medium_of(ask.name) == "image":
        with ask.images.stream(ask.name) as file:
            data = file.read()
        stored = Image.open(io.BytesIO(data))
        kind = _SENT_AS_STORED.get(stored.format or "")
        if kind is not None and stored.getexif().get(_ORIENTATION, 1) == 1:
            return [_data_uri(data, kind)]
    pictures = [opened] if isinstance(opened, Image.Image) else list(opened)
    return [_data_uri(_png(picture), "image/png") for picture in pictures]


def _png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    to_rgb(picture).save(file, "PNG")
    return file.getvalue()


def _data_uri(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
