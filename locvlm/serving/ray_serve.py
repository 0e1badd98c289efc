"""The application of `locvlm serve` as replicas of Ray Serve: what the RayService in k8s/serving runs.

The one file here that knows Ray. Each replica has its own model, page and limits; Ray Serve spreads the requests
and replaces a replica that fails.
"""

import tempfile
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator
from ray import serve

from locvlm.serving.limits import Limits

_PROBES = 4  # requests beside those for answers: the page, health, metrics


class Served(BaseModel):
    """What a RayService says under `args`: which model, and how many requests a replica takes at a time."""

    model_config = ConfigDict(extra="forbid")

    registry: str = Field("", description="models:/NAME@ALIAS or models:/NAME/VERSION; MLFLOW_TRACKING_URI says where")
    model: str = Field("", description="a checkpoint's folder")
    since: str = Field("", description="any text; another one makes new replicas, which open what the alias names now")
    open_requests: int = Field(Limits().open_requests, ge=1)
    batch: int = Field(Limits().batch, ge=1)

    @model_validator(mode="after")
    def _one_model(self) -> "Served":
        if bool(self.registry) == bool(self.model):
            raise ValueError("give one of registry and model")
        return self


@serve.ingress()
class Replica:
    """One model at work. Raises what opening it raises, which Ray Serve reports as the deployment's state."""

    def __init__(self, served: dict[str, Any]) -> None:
        from locvlm.registry.checkpoints import fetch_checkpoint
        from locvlm.serving.app import About, make_app
        from locvlm.serving.assistant import open_assistant

        asked = Served.model_validate(served)
        limits = Limits(open_requests=asked.open_requests, batch=asked.batch)
        if asked.model:
            assistant = open_assistant(Path(asked.model), limits)
            self._app = make_app(assistant, limits, About(assistant.config.name))
            return
        with tempfile.TemporaryDirectory() as folder:
            stored = fetch_checkpoint(asked.registry, Path(folder))
            assistant = open_assistant(stored.folder, limits)
        self._app = make_app(assistant, limits, About(stored.name, stored.version))

    def __serve_build_asgi_app__(self) -> Any:
        """The application, for Ray Serve."""
        return self._app


def build(args: dict[str, Any]) -> serve.Application:
    """The application of a Serve config (`import_path: locvlm.serving.ray_serve:build`). Raises ValidationError."""
    served = Served.model_validate(args)
    deployment = serve.deployment(Replica, name="model", max_ongoing_requests=served.open_requests + _PROBES)
    return deployment.bind(served.model_dump())
