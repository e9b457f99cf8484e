"""Errors that a user can act on. Every message names the thing, the rule, the value found and the next step."""

from __future__ import annotations


class IDAdapterError(RuntimeError):
    """Base of all errors that this package raises deliberately."""


class FaceError(IDAdapterError):
    """A photo has no usable face."""


class NoFaceFoundError(FaceError):
    """The detector found no face."""


class FacePackageError(IDAdapterError):
    """insightface, its runtime or a package of its models is missing or unusable."""


class RecognizerError(IDAdapterError):
    """A face recognition network cannot be loaded, or is not the required one."""


class CheckpointError(IDAdapterError):
    """An adapter or identity file is unreadable or invalid."""


class ConfigError(IDAdapterError):
    """A configuration has an unknown setting, or a value of the wrong type or out of range."""


class TrainingError(IDAdapterError):
    """Training cannot continue, because of invalid numbers or the failure of another process."""


class NotFiniteError(TrainingError):
    """A loss or a gradient is NaN or infinite."""


class DownloadError(IDAdapterError):
    """A published file could not be downloaded, or is not what was published."""


class MismatchError(IDAdapterError):
    """Two valid parts do not fit together (adapter and model, identity and adapter, ...)."""


class InputError(IDAdapterError):
    """A value given by the user is not accepted by the operation."""
