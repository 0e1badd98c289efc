"""MLflow and its database, who may reach whom, and the dashboard."""

import json
import re
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import pytest

from locvlm.training.loop import Point
from tests.kustomize import Manifest
from tests.rendered import OVERLAYS, named, objects, of_kind, ray_job

everywhere = pytest.mark.parametrize("overlay", OVERLAYS)


def server(overlay: str) -> Manifest:
    (container,) = named(overlay, "Deployment", "mlflow")["spec"]["template"]["spec"]["containers"]
    return dict(container)


def options(overlay: str) -> dict[str, str]:
    command = server(overlay)["command"]
    assert command[:2] == ["mlflow", "server"]
    return dict(option.removeprefix("--").split("=", 1) for option in command[2:])


def settings(overlay: str) -> dict[str, str]:
    return dict(named(overlay, "ConfigMap", "mlflow-settings")["data"])


@everywhere
def test_mlflow_answers_to_the_names_that_jobs_and_steps_use_and_not_to_foreign_ones(overlay: str) -> None:
    from mlflow.server.security_utils import is_allowed_host_header

    allowed = options(overlay)["allowed-hosts"].split(",")
    cluster = ray_job(overlay)["spec"]["rayClusterSpec"]
    service = named(overlay, "Service", "mlflow")
    address = f"http://mlflow.locvlm.svc:{service['spec']['ports'][0]['port']}"
    assert named(overlay, "ConfigMap", "locvlm-settings")["data"]["MLFLOW_TRACKING_URI"] == address
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        env = {entry["name"]: entry["value"] for entry in group["template"]["spec"]["containers"][0]["env"]}
        assert env["MLFLOW_TRACKING_URI"] == address
    assert is_allowed_host_header(allowed, address.removeprefix("http://"))
    assert is_allowed_host_header(allowed, "localhost:5000")  # kubectl port-forward
    assert not is_allowed_host_header(allowed, "mlflow.example.org:5000")


@everywhere
def test_mlflow_asks_for_passwords_and_keeps_runs_in_the_database_that_was_made_ready(overlay: str) -> None:
    deployment = named(overlay, "Deployment", "mlflow")["spec"]
    pod = deployment["template"]["spec"]
    given = options(overlay)
    assert given["app-name"] == "basic-auth"
    assert pod["initContainers"][0]["command"] == ["mlflow", "db", "upgrade", given["backend-store-uri"]]
    auth = named(overlay, "ConfigMap", "mlflow-auth")["data"]["auth.ini"]
    assert f"database_uri = {given['backend-store-uri']}\n" in auth
    (mount,) = [mount for mount in server(overlay)["volumeMounts"] if mount["name"] == "auth"]
    assert settings(overlay)["MLFLOW_AUTH_CONFIG_PATH"] == f"{mount['mountPath']}/auth.ini"
    assert deployment["strategy"] == {"type": "Recreate"}
    assert deployment["replicas"] == 1
    assert pod["enableServiceLinks"] is False
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert server(overlay)[probe]["httpGet"] == {"path": "/health", "port": "http"}


@everywhere
def test_artifacts_go_to_s3_or_on_one_machine_to_a_volume(overlay: str) -> None:
    assert options(overlay)["artifacts-destination"] == "$(ARTIFACTS)"
    place = settings(overlay)["ARTIFACTS"]
    if overlay == "local":
        mounts = {mount["name"]: mount["mountPath"] for mount in server(overlay)["volumeMounts"]}
        assert place.startswith(mounts["artifacts"] + "/")
    else:
        assert re.fullmatch(r"s3://[\w-]+/mlflow", place)


@everywhere
def test_the_database_is_in_the_cluster_or_a_managed_one_reached_by_tls(overlay: str) -> None:
    inside = {item["metadata"]["name"] for item in of_kind(overlay, "Service")} - {"mlflow", "vllm"}
    host = settings(overlay)["PGHOST"]
    if overlay in ("gke", "eks"):
        assert inside == set()
        assert settings(overlay)["PGSSLMODE"] == "require"
        assert "example" in host
    else:
        assert inside == {host}
        (container,) = named(overlay, "StatefulSet", "postgres")["spec"]["template"]["spec"]["containers"]
        env = {entry["name"]: entry.get("value") for entry in container["env"]}
        assert options(overlay)["backend-store-uri"].endswith(f":///{env['POSTGRES_DB']}")


@everywhere
def test_every_service_finds_its_pods(overlay: str) -> None:
    workloads = [item for item in objects(overlay) if item["kind"] in ("Deployment", "StatefulSet")]
    for service in of_kind(overlay, "Service"):
        selector = service["spec"]["selector"]
        (found,) = [w for w in workloads if selector.items() <= w["spec"]["template"]["metadata"]["labels"].items()]
        assert found["spec"]["selector"]["matchLabels"] == selector
        ports = {port["name"] for c in found["spec"]["template"]["spec"]["containers"] for port in c["ports"]}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports


# --- the network


@dataclass(frozen=True)
class Peer:
    """A pod, by its labels and those of its namespace; None: an address outside the cluster."""

    labels: tuple[tuple[str, str], ...] | None
    namespace: str = "locvlm"

    @property
    def namespace_labels(self) -> dict[str, str]:
        more = {f"locvlm/{self.namespace}": "true"} if self.namespace in ("pipelines", "clients") else {}
        return {"kubernetes.io/metadata.name": self.namespace, **more}


def component(name: str, namespace: str = "locvlm") -> Peer:
    return Peer((("app.kubernetes.io/component", name),), namespace)


HEAD, WORKER, SUBMITTER = component("ray-head"), component("ray-worker"), component("submitter")
MLFLOW, POSTGRES = Peer((("app.kubernetes.io/name", "mlflow"),)), Peer((("app.kubernetes.io/name", "postgres"),))
STEP = Peer((("pipelines.kubeflow.org/v2_component", "true"),))
STEP_ELSEWHERE = Peer((("pipelines.kubeflow.org/v2_component", "true"),), "pipelines")
OPERATOR = component("kuberay-operator", "kuberay-system")
PROMETHEUS, GRAFANA = component("prometheus", "monitoring"), component("grafana", "monitoring")
SERVER = Peer((("app.kubernetes.io/component", "ray-worker"), ("locvlm/serving", "true")))
VLLM = Peer((("app.kubernetes.io/name", "vllm"),))
GATEWAY = component("gateway", "clients")
STRANGER, FOREIGNER = component("stranger"), component("stranger", "other")
OUTSIDE = Peer(None, "")


def selects(selector: Manifest, labels: dict[str, str]) -> bool:
    assert set(selector) <= {"matchLabels", "matchExpressions"}
    for expression in selector.get("matchExpressions", []):
        assert expression["operator"] == "In"
        if labels.get(expression["key"]) not in expression["values"]:
            return False
    return dict(selector.get("matchLabels", {})).items() <= labels.items()


def fits(rule: Manifest, side: str, peer: Peer, port: int) -> bool:
    assert set(rule) <= {side, "ports"}
    if "ports" in rule and all(entry["port"] != port for entry in rule["ports"]):
        return False
    if side not in rule:
        return True
    for entry in rule[side]:
        assert set(entry) <= {"podSelector", "namespaceSelector"}
        if peer.labels is None:
            continue
        here = peer.namespace == "locvlm"
        if "namespaceSelector" in entry:
            here = selects(entry["namespaceSelector"], peer.namespace_labels)
        if here and selects(entry.get("podSelector", {}), dict(peer.labels)):
            return True
    return False


def allowed(overlay: str, source: Peer, target: Peer, port: int) -> bool:
    """Whether the policies let `source` open a connection to `target`: both ends of this namespace must agree."""
    for direction, side, own, other in (("Egress", "to", source, target), ("Ingress", "from", target, source)):
        if own.namespace != "locvlm" or own.labels is None:
            continue
        policies = [
            item["spec"]
            for item in of_kind(overlay, "NetworkPolicy")
            if direction in item["spec"]["policyTypes"] and selects(item["spec"]["podSelector"], dict(own.labels))
        ]
        assert policies, "the default denies"
        if not any(fits(rule, side, other, port) for spec in policies for rule in spec.get(direction.lower(), [])):
            return False
    return True


OPEN: list[tuple[Peer, Peer, int]] = [
    (WORKER, WORKER, 40123),
    (WORKER, HEAD, 6379),
    (HEAD, WORKER, 10002),
    (SUBMITTER, HEAD, 8265),
    (OPERATOR, HEAD, 8265),
    (PROMETHEUS, HEAD, 8080),
    (PROMETHEUS, WORKER, 8080),
    (WORKER, MLFLOW, 5000),
    (HEAD, MLFLOW, 5000),
    (STEP, MLFLOW, 5000),
    (STEP_ELSEWHERE, MLFLOW, 5000),
    (WORKER, OUTSIDE, 443),
    (MLFLOW, OUTSIDE, 443),
    (STEP, OUTSIDE, 6443),
    (WORKER, OUTSIDE, 53),
    (MLFLOW, OUTSIDE, 5432),
    (GATEWAY, SERVER, 8000),
    (OPERATOR, SERVER, 8000),
    (SERVER, MLFLOW, 5000),
    (SERVER, HEAD, 6379),
    (PROMETHEUS, SERVER, 8080),
    (GATEWAY, VLLM, 8000),
    (PROMETHEUS, VLLM, 8000),
]
SHUT: list[tuple[Peer, Peer, int]] = [
    (STRANGER, MLFLOW, 5000),
    (FOREIGNER, MLFLOW, 5000),
    (FOREIGNER, HEAD, 8265),
    (FOREIGNER, WORKER, 8080),
    (PROMETHEUS, HEAD, 8265),
    (OPERATOR, HEAD, 6379),
    (STRANGER, HEAD, 6379),
    (STRANGER, OUTSIDE, 443),
    (MLFLOW, HEAD, 8265),
    (WORKER, OUTSIDE, 22),
    (WORKER, OUTSIDE, 6443),
    (SUBMITTER, MLFLOW, 22),
    (FOREIGNER, SERVER, 8000),
    (STRANGER, SERVER, 8000),
    (GATEWAY, SERVER, 8265),
    (GATEWAY, WORKER, 8000),
    (FOREIGNER, VLLM, 8000),
    (STRANGER, VLLM, 8000),
    (VLLM, OUTSIDE, 443),
    (VLLM, MLFLOW, 5000),
]


@everywhere
def test_what_is_needed_is_open_and_the_rest_is_shut(overlay: str) -> None:
    has_vllm = overlay != "local"
    wanted = [entry for entry in OPEN if has_vllm or VLLM not in entry]
    assert [entry for entry in wanted if not allowed(overlay, *entry)] == []
    assert [entry for entry in SHUT if allowed(overlay, *entry)] == []


@pytest.mark.parametrize("overlay", ["local", "on-prem"])
def test_only_mlflow_and_grafana_reach_the_database(overlay: str) -> None:
    assert allowed(overlay, MLFLOW, POSTGRES, 5432)
    assert allowed(overlay, GRAFANA, POSTGRES, 5432)
    for peer in (WORKER, HEAD, STEP, STRANGER, FOREIGNER):
        assert not allowed(overlay, peer, POSTGRES, 5432)
    assert not allowed(overlay, POSTGRES, OUTSIDE, 443)


def test_the_house_s3_store_is_reached_on_its_port_only_where_there_is_one() -> None:
    assert [name for name in OVERLAYS if allowed(name, WORKER, OUTSIDE, 9000)] == ["on-prem"]
    assert [name for name in OVERLAYS if allowed(name, MLFLOW, OUTSIDE, 9000)] == ["on-prem"]
    assert [name for name in OVERLAYS if allowed(name, STEP, OUTSIDE, 9000)] == ["on-prem"]


# --- the dashboard


@pytest.fixture(scope="module")
def dashboard() -> Any:
    item = named("gke", "ConfigMap", "locvlm-dashboard")
    assert item["metadata"]["labels"]["grafana_dashboard"] == "1"
    return json.loads(item["data"]["locvlm-training.json"])


def targets(dashboard: Any) -> list[Manifest]:
    return [target for panel in dashboard["panels"] for target in panel.get("targets", [])]


def test_every_metric_of_the_dashboard_is_one_that_this_ray_draws_itself(dashboard: Any) -> None:
    shipped = files("ray.dashboard.modules.metrics.dashboards")
    known = "".join((shipped / f"{name}_dashboard_panels.py").read_text() for name in ("default", "train"))
    expressions = [target["expr"] for target in targets(dashboard) if "expr" in target]
    assert len(expressions) >= 9
    for expression in expressions:
        metrics = set(re.findall(r"\bray_\w+(?=\{)", expression))
        assert metrics
        for metric in metrics:
            assert re.search(rf"\b{metric}\{{", known), metric


def test_every_curve_of_the_dashboard_is_one_that_training_logs(dashboard: Any) -> None:
    queries = [target["rawSql"] for target in targets(dashboard) if "rawSql" in target]
    keys = {key for query in queries for key in re.findall(r"key = '(\w+)'", query)}
    assert keys == {"loss", "tokens", "seconds", "gradient_norm", "learning_rate"}
    assert keys <= set(Point.__dataclass_fields__)


def test_the_dashboard_names_no_data_source_of_ours_and_its_panels_do_not_overlap(dashboard: Any) -> None:
    variables = {entry["name"] for entry in dashboard["templating"]["list"]}
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert max(x for x, _ in cells) < 24
        assert not cells & taken, panel["title"]
        taken |= cells
        for source in [panel.get("datasource"), *(target["datasource"] for target in panel.get("targets", []))]:
            assert source is None or source["uid"].strip("${}") in variables
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
