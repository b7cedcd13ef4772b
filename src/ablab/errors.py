"""Exceptions that are printed without a traceback, and the exit codes of a run."""

from __future__ import annotations

FINISHED = 0
CRASHED = 1
BAD_INPUT = 2  # the run was not started
DIVERGED = 3
STOPPED = 75  # stopped on request, can be resumed; EX_TEMPFAIL of sysexits.h
ABORTED = 130  # a second Ctrl-C


class ConfigError(ValueError):
    """An invalid config, with the key, its value and a remedy; raised before training starts."""


class RunInUse(ConfigError):
    """A run that is in use by another process."""


class RunError(RuntimeError):
    """A failure during a run that the user can fix."""

    exit_code = CRASHED


class Diverged(RunError):
    """A non-finite loss or gradient."""

    exit_code = DIVERGED


class Stopped(SystemExit):
    """A request to stop the run, which can be resumed.

    Not an `Exception`, so that it also ends a sweep, which catches the exceptions of single runs.
    """

    def __init__(self, reason: str, exit_code: int = STOPPED) -> None:
        super().__init__(exit_code)
        self.reason = reason

    def __str__(self) -> str:
        return self.reason


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its type if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
