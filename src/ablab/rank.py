"""Rank of this process, determined from environment variables before torch is imported.

Only torchrun, srun and the run itself (for its DDP workers) start processes with a rank above 0. In all other cases,
rank variables are leftovers, for example from a shell loop over RANK, a pod, or a shell within a Slurm allocation.
"""

from __future__ import annotations

import os
import sys

OWN_RUN_ID = "ablab"  # of the workers that `trainer=ddp` has started through torch.distributed.elastic

TORCHRUN = {"TORCHELASTIC_RUN_ID", "RANK", "LOCAL_RANK", "WORLD_SIZE"}  # torchrun sets all of them

# Rank variables of other launchers, with their values for a single process.
SINGLE_PROCESS_VALUES = {
    **dict.fromkeys(("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID", "SLURM_LOCALID"), "0"),
    **dict.fromkeys(("JSM_NAMESPACE_RANK", "JSM_NAMESPACE_LOCAL_RANK", "PMI_RANK", "PMIX_RANK"), "0"),
    **dict.fromkeys(("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_NODE_RANK"), "0"),
    **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE", "JSM_NAMESPACE_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE"), "1"),
}


def launcher() -> str | None:
    """Return the external launcher of this process: "torchrun", "srun", or None."""
    if os.environ.keys() >= TORCHRUN:  # also if srun started one torchrun per machine
        return "torchrun"
    # a task of a multi-task Slurm step, as opposed to a batch script
    is_srun = "SLURM_PROCID" in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1
    return "srun" if is_srun else None


def is_own_launch() -> bool:
    """Return whether this is a worker that `trainer=ddp` has started, not torchrun's command."""
    return launcher() == "torchrun" and os.environ["TORCHELASTIC_RUN_ID"] == OWN_RUN_ID


def rank() -> int:
    """Return the global rank of this process; 0 for a single process."""
    return rank_variable("RANK", "SLURM_PROCID")


def is_local_rank_zero() -> bool:
    """Return whether the local rank is 0."""
    return rank_variable("LOCAL_RANK", "SLURM_LOCALID") == 0


def rank_variable(of_torchrun: str, of_srun: str) -> int:
    """Return a rank of this process from the variable of the launcher that started it."""
    outside = launcher()
    return 0 if outside is None else int(os.environ[of_torchrun if outside == "torchrun" else of_srun])


def remove_stale_rank_variables() -> None:
    """Remove leftover rank variables of a single process, because libraries would act on them.

    A warning on stderr names those with unexpected values. A complete set of variables for a multi-process run is kept:
    the run reports an error for it, see `torchrun_command`.
    """
    if launcher() is not None or torchrun_command() is not None:
        return
    found = {name: os.environ.pop(name) for name in SINGLE_PROCESS_VALUES if name in os.environ}
    if said := [f"{name}={value}" for name, value in found.items() if value != SINGLE_PROCESS_VALUES[name]]:
        print(
            f"warning: {', '.join(said)}: ignored, because neither torchrun nor srun has started this process; "
            "the run is one process, or starts its own (trainer=ddp)",
            file=sys.stderr,
            flush=True,
        )


def torchrun_command() -> str | None:
    """Return the torchrun command to suggest if rank variables were set without a launcher, as in Kubernetes pods."""
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR")
    if launcher() is not None or not os.environ.keys() >= {*names}:
        return None
    own, size, address = (os.environ[name] for name in names)
    if not (own.isdecimal() and size.isdecimal() and int(size) > 1):
        return None
    port = os.environ.get("MASTER_PORT", "29500")
    return f"torchrun --nnodes={size} --node-rank={own} --master-addr={address} --master-port={port} train.py …"
