"""Errors a user can act on. Every message names the thing, the rule, the value found and the next step."""

from __future__ import annotations


class IDAdapterError(RuntimeError):
    """Base of every error this package raises on purpose."""


class FaceError(IDAdapterError):
    """A photo cannot give a usable face."""


class NoFaceFoundError(FaceError):
    """The detector found nobody."""


class FacePackageError(IDAdapterError):
    """insightface, its runtime or a package of its models is missing or unusable."""


class RecognizerError(IDAdapterError):
    """A face recognition network cannot be loaded, or is not the one that is needed."""


class CheckpointError(IDAdapterError):
    """An adapter or identity file cannot be read as what it should be."""


class ConfigError(IDAdapterError):
    """A configuration file says something that is unknown, of the wrong kind, or impossible."""


class TrainingError(IDAdapterError):
    """A training cannot go on: its numbers went wrong, or another of its processes failed."""


class NotFiniteError(TrainingError):
    """A loss or a gradient is NaN or infinite."""


class MismatchError(IDAdapterError):
    """Two parts that are each fine do not belong together (adapter and model, identity and adapter, ...)."""


class InputError(IDAdapterError):
    """A value given by the user is outside what the operation accepts."""
