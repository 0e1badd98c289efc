"""The model registry: versions with their figures and their lineage, and who is champion.

A version's figures are the metrics.json files that `locvlm score` wrote, stored with the version's run.
"""

from locvlm.registry.champion import Change, rollback
from locvlm.registry.gate import Compare, Decision, GateResult, promote
from locvlm.registry.lineage import Origin, TrackedRun, find, trace
from locvlm.registry.standing import Standing, standing
from locvlm.registry.versions import CHALLENGER, CHAMPION, Registered, figures_of, fingerprint_of, register

__all__ = [
    "CHALLENGER",
    "CHAMPION",
    "Change",
    "Compare",
    "Decision",
    "GateResult",
    "Origin",
    "Registered",
    "Standing",
    "TrackedRun",
    "figures_of",
    "find",
    "fingerprint_of",
    "promote",
    "register",
    "rollback",
    "standing",
    "trace",
]
