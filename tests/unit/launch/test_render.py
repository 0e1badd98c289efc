"""The RayJob that a launch fills."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from locvlm.errors import LaunchError
from locvlm.launch import JobSettings, default_template, job_name, render_ray_job
from tests.api_server import COMMAND, TEMPLATE, rendered


def test_a_name_is_the_same_for_the_same_run_and_step_and_fits_kuberay() -> None:
    names = set()
    steps = ["train", "Train Stage 2!", "", "9-starts-with-a-digit", "x" * 200, "ends-with-" + "-" * 40, "\u65e5\u672c"]
    for run in ("run-1", "run-2", "0" * 300):
        for step in steps:
            name = job_name(run, step)
            assert name == job_name(run, step)
            assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name)
            assert len(name) <= 47
            names.add(name)
    assert len(names) == 3 * len(steps)
    assert job_name("run-1", "train") == "locvlm-train-03d0550ce6"


def test_the_command_survives_the_submitters_shell_and_the_drivers_shell() -> None:
    words = ["--set", "name=a b", "$HOME", "`id`", "it's", 'say "x"', "a&b;c|d(e)", "*", "back\\slash", "", "#no", "~"]
    line = rendered(command=["printf", "%s\\0", *words])["spec"]["entrypoint"]
    # the submitter's shell splits the line, Ray joins the words with shlex and gives them to the driver's shell
    split = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, check=True).stdout
    joined = shlex.join(split.decode().split("\0")[:-1])
    driver = subprocess.run(["sh", "-c", joined], capture_output=True, check=True).stdout
    assert driver.decode().split("\0")[:-1] == words


def test_rendering_sets_name_image_queue_size_deadline_and_environment() -> None:
    settings = JobSettings(
        namespace="team",
        queue="fast",
        workers=3,
        gpus_per_worker=2,
        entrypoint_gpus=1,
        deadline_minutes=90,
        environment={"MLFLOW_RUN_ID": "r1", "MLFLOW_TRACKING_URI": "http://elsewhere:5000"},
    )
    job = rendered(settings)
    spec, cluster = job["spec"], job["spec"]["rayClusterSpec"]
    assert (job["metadata"]["name"], job["metadata"]["namespace"]) == ("try-1", "team")
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "fast"
    assert (spec["activeDeadlineSeconds"], spec["entrypointNumGpus"]) == (5400, 1)
    (group,) = cluster["workerGroupSpecs"]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (3, 3, 3)
    pod = group["template"]["spec"]
    wanted = {"cpu": "20", "memory": "160Gi", "nvidia.com/gpu": "2"}  # a quarter of the template's eight GPUs
    assert pod["containers"][0]["resources"] == {"requests": wanted, "limits": wanted}
    assert [volume["emptyDir"]["sizeLimit"] for volume in pod["volumes"] if "emptyDir" in volume] == ["16Gi"]
    for template in (spec["submitterPodTemplate"], cluster["headGroupSpec"]["template"], group["template"]):
        assert template["spec"]["containers"][0]["image"] == "locvlm:test"
    for template in (cluster["headGroupSpec"]["template"], group["template"]):
        env = template["spec"]["containers"][0]["env"]
        values = {entry["name"]: entry["value"] for entry in env}
        assert len(values) == len(env)
        assert values["MLFLOW_RUN_ID"] == "r1"
        assert values["MLFLOW_TRACKING_URI"] == "http://elsewhere:5000"


def test_without_settings_the_template_decides_and_an_empty_queue_takes_the_job_out_of_kueue() -> None:
    template = yaml.safe_load(default_template().read_text())
    assert rendered()["metadata"]["labels"] == template["metadata"]["labels"]
    assert rendered()["spec"]["activeDeadlineSeconds"] == template["spec"]["activeDeadlineSeconds"]
    assert "kueue.x-k8s.io/queue-name" not in rendered(JobSettings(queue=""))["metadata"]["labels"]


def test_amounts_are_rounded_up_and_parts_shared_by_an_anchor_are_filled_apart() -> None:
    template = """
kind: RayJob
spec:
  rayClusterSpec:
    headGroupSpec: {template: &pod {spec: {containers: [{name: ray, image: x, env: [{name: A, value: "1"}],
      resources: {limits: {cpu: 15, memory: 10Gi, nvidia.com/gpu: 4}}}]}}}
    workerGroupSpecs: [{groupName: gpu, template: *pod}]
"""
    settings = JobSettings(gpus_per_worker=1, environment={"B": "2"})
    cluster = render_ray_job(template, "x", "i", ["locvlm"], settings)["spec"]["rayClusterSpec"]
    head = cluster["headGroupSpec"]["template"]["spec"]["containers"][0]
    worker = cluster["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]
    assert worker["resources"]["limits"] == {"cpu": "4", "memory": "3Gi", "nvidia.com/gpu": "1"}
    assert head["resources"]["limits"]["nvidia.com/gpu"] == 4
    assert head["env"] == worker["env"] == [{"name": "A", "value": "1"}, {"name": "B", "value": "2"}]


@pytest.mark.parametrize(
    ("template", "settings", "words"),
    [
        ("a: [", None, "not valid YAML"),
        ("kind: Pod\nspec: {}", None, "not a RayJob"),
        ("[]", None, "not a RayJob"),
        ("kind: RayJob\nspec: {}", JobSettings(workers=2), "0 worker groups"),
        ("kind: RayJob\nspec: {rayClusterSpec: {workerGroupSpecs: [{}]}}", JobSettings(workers=0), "at least 1"),
        (
            "kind: RayJob\nspec: {rayClusterSpec: {workerGroupSpecs: [{template: {spec: {containers: [{}]}}}]}}",
            JobSettings(gpus_per_worker=2),
            "no limit for nvidia.com/gpu",
        ),
    ],
)
def test_a_template_that_cannot_be_filled_is_refused(template: str, settings: JobSettings | None, words: str) -> None:
    with pytest.raises(LaunchError, match=words):
        render_ray_job(template, "x", "i", ["locvlm"], settings)


def test_an_empty_command_is_refused() -> None:
    with pytest.raises(LaunchError, match="command is empty"):
        rendered(command=[])


def test_the_template_is_found_in_the_checkout_and_else_in_the_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert default_template() == Path(__file__).resolve().parents[3] / "k8s" / "ray-job.yaml"
    monkeypatch.setattr(
        "locvlm.launch.render.__file__", str(tmp_path / "site-packages" / "locvlm" / "launch" / "render.py")
    )
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    with pytest.raises(LaunchError, match="--template"):
        default_template()
    (tmp_path / "share" / "locvlm").mkdir(parents=True)
    (tmp_path / "share" / "locvlm" / "ray-job.yaml").write_text("kind: RayJob")
    assert default_template() == tmp_path / "share" / "locvlm" / "ray-job.yaml"


SITE = """
metadata: {labels: {team: vision}}
spec:
  ttlSecondsAfterFinished: null
  submitterPodTemplate: {spec: {nodeSelector: null}}
  rayClusterSpec:
    headGroupSpec:
      template:
        spec:
          nodeSelector: {pool: cpu}
          containers: [{name: ray-head, env: [{name: HF_HOME, value: /hub}, {name: NEW, value: "1"}]}]
    workerGroupSpecs:
      - groupName: gpu
        template:
          spec:
            tolerations: [{key: ours, operator: Exists}]
            containers: [{name: ray-worker, resources: {limits: {memory: 300Gi}}}]
            volumes: [{name: scratch, emptyDir: {}}]
"""


def test_what_the_cluster_adds_is_merged_before_the_settings() -> None:
    job = render_ray_job(TEMPLATE, "try-1", "i", COMMAND, JobSettings(gpus_per_worker=1), SITE)
    template = yaml.safe_load(TEMPLATE)
    assert job["metadata"]["labels"] == template["metadata"]["labels"] | {"team": "vision"}
    assert "ttlSecondsAfterFinished" not in job["spec"]
    assert "nodeSelector" not in job["spec"]["submitterPodTemplate"]["spec"]
    cluster = job["spec"]["rayClusterSpec"]
    head = cluster["headGroupSpec"]["template"]["spec"]
    assert head["nodeSelector"] == {"locvlm/node-pool": "cpu-on-demand", "pool": "cpu"}
    (container,) = head["containers"]
    env = {entry["name"]: entry["value"] for entry in container["env"]}
    assert (env["HF_HOME"], env["NEW"], env["PYTHONUNBUFFERED"]) == ("/hub", "1", "1")
    (group,) = cluster["workerGroupSpecs"]
    worker = group["template"]["spec"]
    assert worker["tolerations"] == [{"key": "ours", "operator": "Exists"}]
    assert worker["containers"][0]["resources"]["limits"]["memory"] == "38Gi"  # an eighth of 300, rounded up
    assert [volume["name"] for volume in worker["volumes"]] == ["shared", "shm", "scratch"]
    assert json.dumps(template) == TEMPLATE


def test_a_cluster_without_gpus_takes_no_gpu_settings() -> None:
    site = """
metadata: {annotations: {locvlm/accelerator: none}}
spec: {rayClusterSpec: {workerGroupSpecs: [{groupName: gpu, template: {spec: {containers: [
  {name: ray-worker, resources: {requests: {nvidia.com/gpu: null}, limits: {nvidia.com/gpu: null}}}]}}}]}}
"""
    settings = JobSettings(workers=2, gpus_per_worker=1, entrypoint_gpus=1)
    job = render_ray_job(TEMPLATE, "try-1", "i", COMMAND, settings, site)
    assert "nvidia.com/gpu" not in json.dumps(
        job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"]
    )
    assert "entrypointNumGpus" not in job["spec"]
    assert job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replicas"] == 2


def test_a_priority_is_a_label() -> None:
    labels = rendered(JobSettings(priority="locvlm-urgent"))["metadata"]["labels"]
    assert labels["kueue.x-k8s.io/priority-class"] == "locvlm-urgent"


@pytest.mark.parametrize(
    ("site", "words"),
    [
        ("a: [", "not valid YAML"),
        ("- 1", "must be a mapping"),
        ("spek: {}", "must be a mapping"),
        ("spec: []", "has not the parts of a RayJob"),
        ("spec: {rayClusterSpec: {workerGroupSpecs: [1]}}", "has not the parts of a RayJob"),
    ],
)
def test_a_cluster_part_that_does_not_fit_is_refused(site: str, words: str) -> None:
    with pytest.raises(LaunchError, match=words):
        render_ray_job(TEMPLATE, "x", "i", ["locvlm"], None, site)


@pytest.mark.parametrize(
    "template", ["kind: RayJob\nspec: {rayClusterSpec: [1]}", "kind: RayJob\nmetadata: a\nspec: {}"]
)
def test_a_template_with_misshapen_parts_is_refused(template: str) -> None:
    with pytest.raises(LaunchError, match="has not the parts of a RayJob"):
        render_ray_job(template, "x", "i", ["locvlm"], JobSettings(workers=1))
