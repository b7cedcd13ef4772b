"""Which of a run's processes this is, before anything heavy is loaded."""

from __future__ import annotations

import os

REPORTS = "ABLAB_REPORTS"  # names the pipe by which a process tells the one that has started it how it failed


def rank() -> int:
    """This process's number among those of its run, as its launcher has set it; 0 of a process on its own."""
    if launcher() == "srun":
        return int(os.environ["SLURM_PROCID"])
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")))


def first_here() -> bool:
    """Whether this is the first of the run's processes on this machine."""
    local = os.environ["SLURM_LOCALID"] if launcher() == "srun" else os.environ.get("LOCAL_RANK", "0")
    return int(local) == 0


def launcher() -> str | None:
    """What has started the processes of this run from outside: "torchrun", "srun", or nothing has."""
    if "TORCHELASTIC_RUN_ID" in os.environ:  # also where srun has started one torchrun a machine
        return "torchrun"
    # one of several tasks of a Slurm step; a batch script itself is none
    several = "SLURM_PROCID" in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1
    return "srun" if several else None
