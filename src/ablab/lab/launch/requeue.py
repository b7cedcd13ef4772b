"""Slurm: a job that was asked to stop goes back into the queue, and goes on where it was."""

from __future__ import annotations

import os
import subprocess

from ablab.rank import rank


def requeue() -> bool:
    """Put this process's batch job back into its queue, from its first process.

    Only while the job runs, which tells a preemption or the end of its time from `scancel`, and only where it may be
    (`--requeue`). The command of the job has to name its run's folder (`folder=`), or it would begin another one.

    Returns:
        whether it has been done.
    """
    job = current_job_id()
    if job is None or rank() > 0:
        return False
    shown = subprocess.run(
        ["scontrol", "show", "job", job], capture_output=True, text=True, check=False, encoding="utf-8"
    ).stdout
    if not all(fact in shown for fact in ("JobState=RUNNING", "BatchFlag=1", "Requeue=1")):
        return False
    return subprocess.run(["scontrol", "requeue", job], check=False).returncode == 0


def current_job_id() -> str | None:
    """This process's job, of an array its element: one of them has a number that also stands for the whole array."""
    if (array := os.environ.get("SLURM_ARRAY_JOB_ID")) is not None:
        return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID")
