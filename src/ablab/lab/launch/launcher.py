"""The seam between an ablation and the places where its runs take place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from ablab.lab.ablation.grid import PreparedRun
    from ablab.lab.ablation.progress import Progress


@runtime_checkable
class RunLauncher(Protocol):
    """Carries out runs, each of which makes or completes one run folder."""

    is_local: bool  # the runs take place on this machine

    def launch_runs(self, runs: list[PreparedRun], progress: Progress) -> None:
        """Carry out the runs that are not done, and return when all have ended.

        Args:
            runs: their configs, folders and states.
            progress: shows what has ended, and checks the metrics of the first runs.
        """
