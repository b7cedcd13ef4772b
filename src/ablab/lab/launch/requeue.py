"""Put a stopped Slurm job back into the queue, where it resumes its run."""

from __future__ import annotations

import os
import subprocess
import sys

from ablab.rank import rank


def requeue() -> bool:
    """Requeue this process's batch job, from rank 0.

    This is done only while the job is running, which excludes `scancel`, and only if it may be requeued (`--requeue`).
    The command of the job has to name its run's folder (`folder=`), or it would start another run.

    Returns:
        True if the job was requeued.
    """
    job = current_job_id()
    if job is None or rank() > 0:
        return False
    shown = subprocess.run(
        ["scontrol", "show", "job", job], capture_output=True, text=True, check=False, encoding="utf-8"
    ).stdout
    if not all(fact in shown for fact in ("JobState=RUNNING", "BatchFlag=1", "Requeue=1")):
        return False
    # said before: Slurm may end this process as soon as the job is in the queue
    print("the job goes back to the queue and will resume this run", flush=True)
    if subprocess.run(["scontrol", "requeue", job], check=False).returncode != 0:
        print("warning: scontrol requeue failed; submit the job again to resume the run", file=sys.stderr)
        return False
    return True


def current_job_id() -> str | None:
    """Return the id of this job, for an array that of its element: the id of one element also names the whole array."""
    if (array := os.environ.get("SLURM_ARRAY_JOB_ID")) is not None:
        return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID")
