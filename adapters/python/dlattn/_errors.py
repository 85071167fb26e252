"""The plugin's statuses as exceptions; each carries the plugin's own message."""

from __future__ import annotations


class Error(Exception):
    """Anything that the plugin refuses or that goes wrong in it."""


class LibraryNotFound(Error, ImportError):
    """No usable libdlattn; the message names the places searched and both versions, if that is
    why."""


class InvalidArgument(Error, ValueError):
    """The call contradicts itself: shapes, dtypes, strides, devices, option values."""


class Unsupported(Error, NotImplementedError):
    """A legal call that no kernel covers on that device."""


class BufferTooSmall(Error, RuntimeError):
    """The workspace is too small."""


class OutOfMemory(Error, MemoryError):
    """The plugin found no memory."""


class DeviceUnavailable(Error, RuntimeError):
    """No driver or no such device."""


class DeviceError(Error, RuntimeError):
    """The driver refused."""


class VersionMismatch(Error, RuntimeError):
    """A tensor of another DLPack major version."""


class InternalError(Error, RuntimeError):
    """A defect of the plugin."""


# Indexed by DLATTN_* status; 0, which is no error, holds what has no status: the library is
# missing.
BY_STATUS = (
    LibraryNotFound,
    InvalidArgument,
    Unsupported,
    BufferTooSmall,
    OutOfMemory,
    DeviceUnavailable,
    DeviceError,
    VersionMismatch,
    InternalError,
)
