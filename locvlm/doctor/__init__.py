"""Look at a machine or a cluster before anything costs money: what is there, what is missing, what to mend.

Nothing is changed, but for one small object that is written to each storage and deleted again. Every call over the
network gives up after a few seconds.
"""

from locvlm.doctor.check import Check, State
from locvlm.doctor.cluster import check_cluster
from locvlm.doctor.machine import check_machine
from locvlm.doctor.services import check_data, check_kfp, check_mlflow, check_storage
from locvlm.doctor.workers import check_workers

__all__ = [
    "Check",
    "State",
    "check_cluster",
    "check_data",
    "check_kfp",
    "check_machine",
    "check_mlflow",
    "check_storage",
    "check_workers",
]
