"""Rank of this process among those of its run, before anything heavy is loaded.

Only torchrun, srun and the run's own starter make a rank other than 0. Other variables that number processes are left
over from something else: a shell loop over RANK, a pod of several, a shell within an allocation.
"""

from __future__ import annotations

import os
import sys

OWN_RUN_ID = "ablab"  # of the workers that `trainer=ddp` has started through torch.distributed.elastic

TORCHRUN = {"TORCHELASTIC_RUN_ID", "RANK", "LOCAL_RANK", "WORLD_SIZE"}  # torchrun sets all of them

# Variables that other launchers set, and the value that a process on its own would have.
NUMBERS = {
    **dict.fromkeys(("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID", "SLURM_LOCALID"), "0"),
    **dict.fromkeys(("JSM_NAMESPACE_RANK", "JSM_NAMESPACE_LOCAL_RANK", "PMI_RANK", "PMIX_RANK"), "0"),
    **dict.fromkeys(("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_NODE_RANK"), "0"),
    **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE", "JSM_NAMESPACE_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE"), "1"),
}


def launcher() -> str | None:
    """The program that has started the processes of this run from outside: "torchrun", "srun", or None."""
    if os.environ.keys() >= TORCHRUN:  # also where srun has started one torchrun a machine
        return "torchrun"
    # one of several tasks of a Slurm step; a batch script itself is none
    several = "SLURM_PROCID" in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1
    return "srun" if several else None


def is_own_launch() -> bool:
    """Return whether this is a worker that `trainer=ddp` has started, not torchrun's command."""
    return launcher() == "torchrun" and os.environ["TORCHELASTIC_RUN_ID"] == OWN_RUN_ID


def rank() -> int:
    """Rank of this process in its run; 0 for a process on its own."""
    return number("RANK", "SLURM_PROCID")


def first_here() -> bool:
    """Whether this is the first of the run's processes on this machine."""
    return number("LOCAL_RANK", "SLURM_LOCALID") == 0


def number(of_torchrun: str, of_srun: str) -> int:
    """A number of this process, from the launcher that has really started it."""
    outside = launcher()
    return 0 if outside is None else int(os.environ[of_torchrun if outside == "torchrun" else of_srun])


def ignore_left_over() -> None:
    """Remove variables that number processes, where nothing numbers them: libraries act on them wherever they are.

    A line on stderr names those that would have changed something. Variables that together ask for one process of
    several stay: a run refuses them, see `asked_to_join`.
    """
    if launcher() is not None or asked_to_join() is not None:
        return
    found = {name: os.environ.pop(name) for name in NUMBERS if name in os.environ}
    if said := [f"{name}={value}" for name, value in found.items() if value != NUMBERS[name]]:
        print(
            f"warning: {', '.join(said)}: ignored, because neither torchrun nor srun has started this process; "
            "the run is one process, or starts its own (trainer=ddp)",
            file=sys.stderr,
            flush=True,
        )


def asked_to_join() -> str | None:
    """The torchrun command for variables that ask for one process of several, as operators of Kubernetes set them."""
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR")
    if launcher() is not None or not os.environ.keys() >= {*names}:
        return None
    own, size, address = (os.environ[name] for name in names)
    if not (own.isdecimal() and size.isdecimal() and int(size) > 1):
        return None
    port = os.environ.get("MASTER_PORT", "29500")
    return f"torchrun --nnodes={size} --node-rank={own} --master-addr={address} --master-port={port} train.py …"
