"""The servers of models: what Ray Serve, KubeRay and vLLM are told."""

import copy
import importlib
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from locvlm.serving.ray_serve import Served, build
from tests.crds import crd_faults
from tests.kustomize import Manifest
from tests.rendered import OVERLAYS, amount, containers, named, objects, pods

everywhere = pytest.mark.parametrize("overlay", OVERLAYS)
on_gpus = pytest.mark.parametrize("overlay", [name for name in OVERLAYS if name != "local"])


def service(overlay: str) -> Manifest:
    return named(overlay, "RayService", "locvlm")


def group(overlay: str) -> Manifest:
    (found,) = service(overlay)["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    return dict(found)


def application(overlay: str) -> Any:
    """The one application, as Ray Serve itself reads it."""
    (found,) = ServeDeploySchema.model_validate(yaml.safe_load(service(overlay)["spec"]["serveConfigV2"])).applications
    return found


@everywhere
def test_ray_serve_takes_the_config_and_it_names_our_application(overlay: str) -> None:
    found = application(overlay)
    module, _, name = found.import_path.partition(":")
    assert getattr(importlib.import_module(module), name) is build
    assert Served.model_validate(found.args).registry == "models:/locvlm@champion"
    assert build(found.args)._bound_deployment.name == found.deployments[0].name
    assert found.route_prefix == "/"


@everywhere
def test_a_worker_has_what_its_replica_asks_for_and_time_to_end(overlay: str) -> None:
    (deployment,) = application(overlay).deployments
    wanted = deployment.ray_actor_options
    pod = group(overlay)["template"]["spec"]
    limits = containers(pod)[0]["resources"]["limits"]
    assert amount(limits["cpu"]) >= wanted.num_cpus
    assert amount(limits.get("nvidia.com/gpu", 0)) == (wanted.num_gpus or 0) == (0 if overlay == "local" else 1)
    assert deployment.num_replicas == group(overlay)["replicas"]
    if overlay != "local":
        assert pod["terminationGracePeriodSeconds"] > deployment.graceful_shutdown_timeout_s


@everywhere
def test_nothing_is_served_until_somebody_wants_it(overlay: str) -> None:
    assert service(overlay)["spec"]["suspend"] is True
    if overlay != "local":
        assert named(overlay, "Deployment", "vllm")["spec"]["replicas"] == 0


@everywhere
def test_every_server_says_when_it_is_up_ready_and_alive(overlay: str) -> None:
    for item in objects(overlay):
        if item["kind"] == "RayService" or item["metadata"]["name"] == "vllm":
            for pod in pods(item):
                for container in containers(pod):
                    ports = {port["name"] for port in container["ports"]}
                    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
                        asked = container[name]["httpGet"]
                        assert asked["port"] == 52365 or asked["port"] in ports


@everywhere
def test_serving_pods_are_not_on_spot_nodes_and_read_the_shared_folder_only(overlay: str) -> None:
    for item in objects(overlay):
        if item["kind"] == "RayService" or item["metadata"]["name"] == "vllm":
            for pod in pods(item):
                assert {entry["key"] for entry in pod.get("tolerations", [])} <= {"nvidia.com/gpu"}
                mounts = [mount for container in containers(pod) for mount in container["volumeMounts"]]
                assert all(mount.get("readOnly") for mount in mounts if mount["name"] == "shared")


@on_gpus
def test_vllm_serves_an_exported_folder_under_one_name(overlay: str) -> None:
    pod = named(overlay, "Deployment", "vllm")["spec"]["template"]["spec"]
    (container,) = containers(pod)
    program, verb, folder, *options = container["command"]
    assert (program, verb) == ("vllm", "serve")
    (shared,) = [mount for mount in container["volumeMounts"] if mount["name"] == "shared"]
    assert folder.startswith(f"{shared['mountPath']}/")
    assert {"--served-model-name=locvlm", "--port=8000"} <= set(options)
    home = next(entry["value"] for entry in container["env"] if entry["name"] == "HOME")
    assert home in {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}


def test_the_local_cluster_has_no_vllm() -> None:
    assert "vllm" not in {item["metadata"]["name"] for item in objects("local")}


def test_a_planted_typo_in_the_ray_service_is_refused(schemas: Path) -> None:
    item = copy.deepcopy(service("gke"))
    assert crd_faults(schemas, item) == []
    item["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"][0]["startupProb"] = {}
    assert "startupProb" in crd_faults(schemas, item)[0]
