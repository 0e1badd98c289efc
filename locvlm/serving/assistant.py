"""From a query to an answer: the one way that the command line, the servers and MLflow share."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from locvlm.config import ExperimentConfig
from locvlm.geometry import make_geometry
from locvlm.model import LoadedModel, load
from locvlm.serving.forms import Answer, Forms, Query
from locvlm.serving.limits import Limits
from locvlm.serving.uploads import decode, from_base64


@dataclass(frozen=True, slots=True)
class Prepared:
    """A query ready for the model: what can fail for a user's reason is behind it. `seen` is the network's square, so
    that a large image is not kept while the query waits; `width`, `height` are those of the image itself."""

    id: str
    image: Path
    prompt: str
    seen: Image.Image
    width: int
    height: int

    def open(self) -> Image.Image:
        """What the model sees; mapping the square once more leaves it as it is."""
        return self.seen


class Assistant:
    """A checkpoint that answers queries. `decoding`: fields of its evaluation section to replace.

    An answer depends on the image and the words alone: where the checkpoint is asked with a temperature, the random
    numbers are those of the query, whatever else is in the batch.
    """

    def __init__(self, loaded: LoadedModel, limits: Limits, decoding: dict[str, Any] | None = None) -> None:
        self._loaded = loaded
        self._limits = limits
        self._geometry = make_geometry(loaded.config.geometry)
        self._forms = Forms(loaded.config, limits.text)
        values = {**loaded.config.evaluation.model_dump(), **(decoding or {}), "batch_size": limits.batch}
        self._decoding = type(loaded.config.evaluation).model_validate(values)

    @property
    def config(self) -> ExperimentConfig:
        """The one that the checkpoint was trained with."""
        return self._loaded.config

    def prepare(self, query: Query) -> Prepared:
        """Decode the image of a query and word it. Raises DataError; TooLarge beyond the limits."""
        data = from_base64(query.image, self._limits)
        shown = decode(data, self._limits)
        prompt = self._forms.prompt(query, *shown.size)
        picture = hashlib.blake2b(data, digest_size=16).hexdigest()
        key = hashlib.blake2b(f"{picture}:{prompt}".encode(), digest_size=16).hexdigest()
        return Prepared(key, Path(picture), prompt, self._geometry.apply(shown), *shown.size)

    def answers(self, prepared: Sequence[Prepared]) -> list[Answer]:
        """One answer a query, in order."""
        texts = self._loaded.answers(prepared, self._decoding)
        return [
            Answer(
                answer=text,
                places=self._forms.places(text, one.width, one.height),
                prompt=one.prompt,
                width=one.width,
                height=one.height,
            )
            for one, text in zip(prepared, texts, strict=True)
        ]


def open_assistant(folder: Path, limits: Limits, decoding: dict[str, Any] | None = None) -> Assistant:
    """The checkpoint of a folder, on the GPU in bfloat16 where there is one. Raises CheckpointError."""
    import torch

    loaded = load(folder)
    if torch.cuda.is_available():
        loaded.model.to(torch.device("cuda"), torch.bfloat16)
    return Assistant(loaded, limits, decoding)
