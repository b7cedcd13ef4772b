"""The interface between an ablation and the launchers of its runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from ablab.lab.ablation.grid import PreparedRun
    from ablab.lab.ablation.progress import Progress


@runtime_checkable
class RunLauncher(Protocol):
    """Launches runs, each of which creates or completes one run folder."""

    is_local: bool  # the runs take place on this machine

    def launch_runs(self, runs: list[PreparedRun], progress: Progress) -> None:
        """Launch the runs that are not done, and return when all have ended.

        Args:
            runs: with their configs, folders and statuses.
            progress: displays the runs, and checks the metrics of the first ones.
        """
