"""Errors with a remedy, which are printed without a traceback, and the exit codes of a run."""

from __future__ import annotations

FINISHED = 0
CRASHED = 1
BAD_INPUT = 2  # nothing was started
DIVERGED = 3
STOPPED = 75  # on request, to be resumed; EX_TEMPFAIL of sysexits.h
LEFT_AT_ONCE = 130  # a second Ctrl-C


class ConfigError(ValueError):
    """A wrong value, its place in the config and the remedy; raised before any training starts."""


class Taken(ConfigError):
    """A run that is in use by another process."""


class RunError(RuntimeError):
    """A failure of a running training that a person can fix."""

    exit_code = CRASHED


class Diverged(RunError):
    """The loss or a gradient is not finite."""

    exit_code = DIVERGED


class Stopped(SystemExit):
    """The run was asked to stop, and can be resumed where it is.

    Not an `Exception`: a sweep ends with it too, instead of going on with its next run.
    """

    def __init__(self, reason: str, exit_code: int = STOPPED) -> None:
        super().__init__(exit_code)
        self.reason = reason

    def __str__(self) -> str:
        return self.reason


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its type if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
