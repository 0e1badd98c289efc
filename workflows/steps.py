"""What the steps of every pipeline have in common: their titles and caching, where they run, the usual sequences."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from kfp import dsl, kubernetes

from components.begin import begin
from components.image import IMAGE
from components.predict import predict
from components.promote import promote
from components.register import register
from components.score import score
from components.train_stage import train_stage

SHARED_VOLUME, SHARED_PATH = "locvlm-shared", "/mnt/locvlm"  # k8s/base/storage.yaml
STORAGE_SECRET = "locvlm-storage"  # its name; the values stay in the cluster
STORAGE_KEYS = {name: name for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL")}
MLFLOW_SECRET = "locvlm-mlflow"
MLFLOW_KEYS = {name: name for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")}
USER = 1000  # of the image; the rest of the restricted profile (no capability, seccomp ...) KFP sets by itself

# light: looks, decides or scores; data: builds a data set; job: follows a RayJob that trains or asks a model
Kind = Literal["light", "data", "job"]

# Seconds until Kubernetes ends a step. KFP takes no parameter of a pipeline there; `python -m workflows.compile
# --timeout KIND=SECONDS` compiles with others. The wait of a job in the queue counts.
TIMEOUTS: Mapping[Kind, int] = {"light": 3600, "data": 24 * 3600, "job": 14 * 24 * 3600}

# What a pipeline that knows nothing else gives its steps; the parameters of the same names change it run by run.
CPU, MEMORY, DATA_CPU, DATA_MEMORY = "1", "16Gi", "2", "32Gi"


@dataclass(frozen=True, slots=True)
class Placement:
    """Where steps run: parameters of the pipeline (the first eight), and what is settled when it is compiled.

    `cpu`, `memory`: of every step; `data_cpu`, `data_memory`: of those that build data; `node_selector`: {label:
    value}; `tolerations`: a list as in a pod; `storage_secret`, `mlflow_secret`: the names of the secrets with the keys
    of the storage and with the user of MLflow.
    The local runner ignores all but `retries`: of the steps that train or ask a model.
    """

    cpu: Any = CPU
    memory: Any = MEMORY
    data_cpu: Any = DATA_CPU
    data_memory: Any = DATA_MEMORY
    node_selector: Any = field(default_factory=dict)
    tolerations: Any = field(default_factory=list)
    storage_secret: Any = STORAGE_SECRET
    mlflow_secret: Any = MLFLOW_SECRET
    retries: int = 1
    timeouts: Mapping[Kind, int] = field(default_factory=lambda: TIMEOUTS)

    def step(self, task: Any, title: str, kind: Kind = "light", *, cached: bool = True) -> Any:
        """Name a step, say whether its result may be taken from a cache, and where it runs."""
        task.set_display_name(title)
        task.set_caching_options(cached)
        task.set_cpu_request(self.data_cpu if kind == "data" else self.cpu)
        task.set_cpu_limit(self.data_cpu if kind == "data" else self.cpu)
        task.set_memory_request(self.data_memory if kind == "data" else self.memory)
        task.set_memory_limit(self.data_memory if kind == "data" else self.memory)
        if kind == "job" and self.retries:
            task.set_retry(num_retries=self.retries, backoff_duration="60s", backoff_factor=2)
        kubernetes.set_timeout(task, self.timeouts[kind])
        kubernetes.add_node_selector_json(task, self.node_selector)
        kubernetes.add_toleration_json(task, self.tolerations)
        kubernetes.mount_pvc(task, pvc_name=SHARED_VOLUME, mount_path=SHARED_PATH)
        kubernetes.use_secret_as_env(
            task, secret_name=self.storage_secret, secret_key_to_env=STORAGE_KEYS, optional=True
        )
        kubernetes.use_secret_as_env(task, secret_name=self.mlflow_secret, secret_key_to_env=MLFLOW_KEYS, optional=True)
        kubernetes.set_security_context(task, run_as_user=USER, run_as_group=USER, run_as_non_root=True)
        kubernetes.use_config_map_as_env(
            task, "locvlm-settings", {"MLFLOW_TRACKING_URI": "MLFLOW_TRACKING_URI"}, optional=True
        )
        return task


@dataclass(frozen=True, slots=True)
class Run:
    """The run that steps belong to: parameters of the pipeline. `images`: of the image tasks."""

    root: Any
    images: Any
    runner: Any
    code_version: Any
    place: Placement

    def begin(self, tags: Mapping[str, Any]) -> Any:
        """The first step: the lineage id and the MLflow run that every other step works under."""
        every_tag = {**tags, "code": self.code_version, "image": IMAGE}
        task = begin(
            root=self.root,
            kfp_run=dsl.PIPELINE_JOB_ID_PLACEHOLDER,
            tags=[f"{key}={value}" for key, value in every_tag.items()],
        )
        return self.place.step(task, "begin", cached=False)

    def train(
        self,
        name: str,
        stage: str,
        data: Sequence[str],
        inputs: Sequence[Any],
        parent: str = "",
        overrides: Any = (),
        images: Sequence[Any] = (),
        title: str = "",
    ) -> Any:
        """A training stage; returns the fingerprint of the model. `images`: other than the run's, as [NAME=]DIR."""
        task = train_stage(
            name=name,
            stage=stage,
            parent=parent,
            data=list(data),
            images=list(images) or [self.images],
            overrides=list(overrides) if isinstance(overrides, tuple) else overrides,
            inputs=list(inputs),
            root=self.root,
            code_version=self.code_version,
            runner=self.runner,
            image=IMAGE,
        )
        return self.place.step(task, title or f"train: {stage}, {name}", "job").outputs["Output"]

    def evaluate(
        self, name: str, tasks: Sequence[str], n_test: Any, inputs: Sequence[Any], benchmarks: Any = None
    ) -> Any:
        """Answers and figures of the model `name`; returns the fingerprint of the figures."""
        asked = {"name": name, "tasks": list(tasks), "benchmarks": [] if benchmarks is None else benchmarks}
        common = {"root": self.root, "code_version": self.code_version}
        task = predict(
            images=self.images, n_test=n_test, inputs=list(inputs), runner=self.runner, image=IMAGE, **asked, **common
        )
        answers = self.place.step(task, f"predict, {name}", "job").outputs["Output"]
        return self.place.step(score(inputs=[answers], **asked, **common), f"score, {name}").outputs["Output"]

    def judge(
        self,
        name: str,
        tasks: Sequence[str],
        registry_name: Any,
        tags: Mapping[str, Any],
        inputs: Sequence[Any],
        benchmarks: Any = None,
    ) -> Any:
        """Register the model `name` with its figures and hold it against the gates; returns the task of the gate."""
        every_tag = {
            **tags,
            "code": self.code_version,
            "image": IMAGE,
            "kfp.run": dsl.PIPELINE_JOB_ID_PLACEHOLDER,
        }
        task = register(
            root=self.root,
            name=name,
            tasks=list(tasks),
            benchmarks=[] if benchmarks is None else benchmarks,
            registry_name=registry_name,
            tags=[f"{key}={value}" for key, value in every_tag.items()],
            inputs=list(inputs),
        )
        version = self.place.step(task, f"register, {name}", cached=False).outputs["Output"]
        gate = promote(root=self.root, registry_name=registry_name, version=version)
        return self.place.step(gate, "gate", cached=False)
