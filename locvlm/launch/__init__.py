"""Run one locvlm command on the cluster: fill k8s/ray-job.yaml, create the RayJob, follow it, judge it by its status.

The only package that talks to Kubernetes. A job has a name that follows from its run and step, so a retried step finds
the job of the first try (409) and follows that one instead of training twice.
"""

from locvlm.launch.client import connect, site_part
from locvlm.launch.render import JobSettings, default_template, job_name, render_ray_job
from locvlm.launch.rules import validate_ray_job
from locvlm.launch.run import FinishedJob, launch

__all__ = [
    "FinishedJob",
    "JobSettings",
    "connect",
    "default_template",
    "job_name",
    "launch",
    "render_ray_job",
    "site_part",
    "validate_ray_job",
]
