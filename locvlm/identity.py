"""What a pipeline run is called wherever it leaves a trace: its lineage id, born once and kept in the run's folder.

`locvlm begin` makes it; every later step finds it there (`working_for`) and hands it to MLflow, to the RayJob that it
launches and to the model version that it registers. Where KFP's own MLflow integration is at work, its run is the one
that stages are nested under; else one is opened here, and closed here.
"""

import contextlib
import json
import logging
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from locvlm import tracking
from locvlm.errors import DataError, TrackingError
from locvlm.records import read_json, write_json

log = logging.getLogger(__name__)

FILE = "lineage.json"
_KFP_CONFIG = "KFP_MLFLOW_CONFIG"  # what KFP's MLflow integration tells the processes of a step, as JSON
_ID = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?")  # also a legal label value of Kubernetes


@dataclass(frozen=True, slots=True)
class Identity:
    """A run. `lineage`: its id; `began`: UTC; `mlflow_run`: the run that its stages are nested under ("": nothing is
    tracked), which is `ours` to close unless KFP or whoever started us opened it; `kfp_runs`: every KFP run that worked
    at it, the first one first; `tags`: what else it is made of."""

    lineage: str
    began: str
    mlflow_run: str = ""
    ours: bool = False
    kfp_runs: tuple[str, ...] = ()
    tags: Mapping[str, str] | None = None


def begin(root: Path, kfp_run: str, tags: Mapping[str, str]) -> Identity:
    """Name the run in the folder `root`, or go on with the name that it has; tells MLflow.

    Raises DataError for a lineage file that is none, TrackingError when MLflow is wanted and does not answer.
    """
    now = datetime.now(UTC)
    known = read(root) or Identity(f"{now:%Y%m%d-%H%M%S}-{secrets.token_hex(4)}", f"{now:%Y-%m-%dT%H:%M:%SZ}")
    runs = known.kfp_runs if not kfp_run or kfp_run in known.kfp_runs else (*known.kfp_runs, kfp_run)
    known = replace(known, kfp_runs=runs, tags={**(known.tags or {}), **tags})
    every_tag = {**(known.tags or {}), "lineage": known.lineage, **({"kfp.run": kfp_run} if kfp_run else {})}
    with tracking.environment(_kfp_environment()):
        outer = os.environ.get("MLFLOW_RUN_ID", "")
        if tracking.enabled() and outer:
            known = replace(known, mlflow_run=tracking.tag_run(outer, every_tag), ours=False)
        elif tracking.enabled():
            run_id = tracking.open_parent_run(root.name, every_tag, known.mlflow_run if known.ours else "")
            known = replace(known, mlflow_run=run_id, ours=True)
    write_json(root / FILE, asdict(known))
    return known


def read(root: Path) -> Identity | None:
    """The identity of the run in the folder `root`, None where it has none. Raises DataError."""
    path = root / FILE
    if not path.is_file():
        return None
    content = read_json(path)
    try:
        found = Identity(**{**content, "kfp_runs": tuple(content["kfp_runs"])})
        if not _ID.fullmatch(found.lineage):
            raise ValueError(f"lineage {found.lineage!r}")
    except (KeyError, TypeError, ValueError) as fault:
        raise DataError(
            f"reading {path}: {fault}; it is not what `locvlm begin` writes; restore it, or remove it to give the run "
            "another name"
        ) from None
    return found


@contextlib.contextmanager
def working_for(root: Path) -> Iterator[None]:
    """In the body, this process and its children leave their traces under the name of the run in `root`, if it has one.

    Raises DataError for a lineage file that is none.
    """
    known = read(root)
    with tracking.environment(_kfp_environment()):
        found: dict[str, str] = {}
        if known is not None:
            found[tracking.LINEAGE] = known.lineage
            if known.mlflow_run and not os.environ.get("MLFLOW_RUN_ID"):
                found["MLFLOW_RUN_ID"] = known.mlflow_run
        with tracking.environment(found):
            yield


def end(root: Path, status: str, note: str = "") -> None:
    """Close the run's own MLflow run as FINISHED or FAILED; leaves KFP's alone. Never raises: the outcome of the step
    counts more."""
    try:
        known = read(root)
        if known is not None and known.ours and tracking.enabled():
            tracking.resume_run(known.mlflow_run).close(status, note)
    except (DataError, TrackingError) as fault:
        log.warning("the run in %s could not be marked %s: %s", root, status, fault)


def _kfp_environment() -> dict[str, str]:
    """What KFP's MLflow integration says, in the variables of MLflow; nothing where it is not at work.

    A process that has MLFLOW_RUN_ID already (the integration can set it) is left as it is. A server other than the one
    that we use has other runs: its run is not ours.
    """
    text = os.environ.get(_KFP_CONFIG, "")
    if not text:
        return {}
    try:
        config: dict[str, Any] = json.loads(text)
        endpoint, run_id = str(config["endpoint"]), str(config["parentRunId"])
    except (ValueError, KeyError, TypeError) as fault:
        log.warning("%s is not read (%r); the run gets a parent of its own in MLflow", _KFP_CONFIG, fault)
        return {}
    ours = os.environ.get("MLFLOW_TRACKING_URI", "") or endpoint
    if ours.rstrip("/") != endpoint.rstrip("/"):
        log.warning("KFP tracks at %s and we at %s: the two are not linked", endpoint, ours)
        return {"MLFLOW_RUN_ID": ""} if os.environ.get("MLFLOW_RUN_ID") else {}
    if os.environ.get("MLFLOW_RUN_ID"):
        return {}
    found = {"MLFLOW_TRACKING_URI": ours, "MLFLOW_RUN_ID": run_id}
    if config.get("experimentId"):
        found["MLFLOW_EXPERIMENT_ID"] = str(config["experimentId"])
    if config.get("workspacesEnabled") and config.get("workspace"):
        found["MLFLOW_WORKSPACE"] = str(config["workspace"])
    return found
