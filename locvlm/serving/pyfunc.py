"""The checkpoint of a registered version as an MLflow model: `mlflow models serve -m models:/locvlm@champion`.

MLflow copies this file into the version and runs the copy, so it holds no more than the adapter; the package itself is
imported where the model is served. Beside registry and tracking it is the one place that knows MLflow.
"""

from pathlib import Path
from typing import Any

from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

from locvlm.serving.forms import Query


class LocVLMModel(PythonModel):  # type: ignore[misc]
    """Queries in, answers out: the same as POST /api/answer of `locvlm serve`, many at a time."""

    def load_context(self, context: Any) -> None:
        """Open the checkpoint: the one that lies with the version, or the one that the version points to. Raises
        CheckpointError; TrackingError when what is pointed to is not there or no longer what was registered."""
        from locvlm.registry.checkpoints import pointed_at
        from locvlm.serving.assistant import open_assistant
        from locvlm.serving.limits import Limits

        where = context.model_config
        folder = Path(context.artifacts["checkpoint"])
        if where["weights"]:
            folder = pointed_at(where["weights"], where["fingerprint"], "of this version")
        self._assistant = open_assistant(folder, Limits())

    def predict(self, context: Any, model_input: list[Query], params: dict[str, Any] | None = None) -> list[str]:
        """One answer a query, in order: the JSON of `locvlm.serving.forms.Answer`."""
        prepared = [self._assistant.prepare(query) for query in model_input]
        return [answer.model_dump_json(exclude_none=True) for answer in self._assistant.answers(prepared)]


set_model(LocVLMModel())
