"""What MLflow's pages show without set-up: few parameters that tell runs apart, and the figures of every model."""

import os
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from locvlm import tracking
from locvlm.config import ExperimentConfig, MixtureEntry

if TYPE_CHECKING:
    from locvlm.evaluation.arms import Arm


_FORBIDDEN = re.compile(r"[^\w\-. :/]")  # MLflow takes no such character in the name of a metric


def params_of(config: ExperimentConfig, stage: str, parent: str, n_workers: int) -> dict[str, str]:
    """The parameters of a training run: what people change. The whole configuration is the run's locvlm.yaml."""
    found = getattr(config.stages, stage)
    mixture: Iterable[MixtureEntry] = found.mixture
    shares = [f"{entry.source} {entry.objective or 'all'} {entry.weight:g}" for entry in mixture]
    return {
        "preset": config.name,
        "stage": stage,
        "starts from": parent,
        "mixture": ", ".join(shares) or "all alike",
        "places": f"{config.coordinates.representation} {config.coordinates.n_bins}, {config.geometry.kind}",
        "trains": ", ".join(found.trainable),
        "length": f"{found.steps} steps" if found.steps is not None else f"{found.epochs:g} epochs",
        "global batch": str(found.global_batch),
        "learning rate": f"{found.learning_rate:g}",
        "precision": found.precision,
        "engine": f"{config.cluster.engine}, {n_workers} workers" if n_workers else "one process",
        "seed": str(config.seed),
    }


def tell(arms: "Iterable[Arm]") -> None:
    """Put the primary figure of every task on the run that trained an arm's model, and all arms' on the pipeline's run.

    So the runs of two arms, compared in MLflow, show their mixtures, curves and figures side by side; all figures are
    in the report and with the model version. Does nothing where nothing is tracked; a model that was not trained under
    this server has no run of its own. Raises TrackingError.
    """
    if not tracking.enabled():
        return
    outer = tracking.resume_run(os.environ.get("MLFLOW_RUN_ID", ""))
    for arm in arms:
        figures: dict[str, float] = {}
        for result in arm.results:
            figures |= _primary(result.task, result.metrics)
        name = _FORBIDDEN.sub(" ", arm.name)
        outer.log_metrics({f"{name}/{key}": value for key, value in figures.items()}, 0)
        if trained := arm.receipt.get("fingerprint"):
            tracking.add_figures({"fingerprint": str(trained)}, figures, {"arm": arm.name})
    outer.deliver()


def _primary(task: str, metrics: Mapping[str, Any]) -> dict[str, float]:
    """`task/figure` -> value, where it is known."""
    name = str(metrics["primary"])
    value = metrics["figures"].get(name, {}).get("value")
    return {} if value is None else {f"{task}/{name}": float(value)}
