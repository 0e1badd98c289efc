"""Every error that a user can meet, and its exit code.

    LocVLMError          1   our fault, or nobody's: a bug, a lost worker
    +- UserError         2   the user can fix it
       +- ConfigError        an illegal value, an unknown key
       +- DataError          a file, a record, an image
       +- CheckpointError    a model folder
       +- TrackingError      MLflow, the registry
       +- GateError          a model that did not earn its place
       +- LaunchError        a job that could not be submitted
          +- JobFailed       a job that was submitted and failed

A message says four things: what was being done, what was found, what was needed, what to do.
"""


class LocVLMError(Exception):
    """Base of all errors that LocVLM raises on purpose."""

    exit_code = 1


class UserError(LocVLMError):
    """The user can fix it: `locvlm` prints the message alone and exits with 2."""

    exit_code = 2


class ConfigError(UserError):
    """A configuration that is not legal; the message lists every fault, not only the first."""


class DataError(UserError):
    """An annotation file, a dataset folder, an image or a record that cannot be used."""


class CheckpointError(UserError):
    """A model folder that is missing, cut short, or does not fit the data."""


class TrackingError(UserError):
    """The tracking server or the registry cannot be used as asked."""


class GateError(UserError):
    """A model did not pass the promotion gate; the message names the gate and the numbers."""


class LaunchError(UserError):
    """A job could not be submitted to the cluster."""


class JobFailed(LaunchError):
    """A submitted job ended without success; the message carries the job's last words."""
