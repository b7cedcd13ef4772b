"""Workers that fetch batches: little shared memory, few files, and a worker that is killed."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Sequence

import pytest
import torch
from torch.utils.data import get_worker_info

from ablab.data.batch import Batch
from ablab.data.loader import Loader
from ablab.data.sampler import BatchSampler
from ablab.errors import RunError
from ablab.lab.launch.processes import lost_worker


class Numbers:
    """A split of 16 samples, each of 1,000 times its number."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, indices: Sequence[int]) -> Batch:
        targets = torch.tensor(indices)
        return Batch(targets.float()[:, None].expand(-1, 1000).contiguous(), targets)


class WithoutSharedMemory(Numbers):
    """Its workers get no shared memory: a limit on the size of files counts there, too."""

    def __getitem__(self, indices: Sequence[int]) -> Batch:
        if get_worker_info() is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        return super().__getitem__(indices)


class Killed(Numbers):
    """Its workers are killed, as a kernel without memory does."""

    def __getitem__(self, indices: Sequence[int]) -> Batch:
        if get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(indices)


def loader(split: Numbers, num_workers: int) -> Loader:
    order = BatchSampler(len(split), batch_size=4, shuffle=True, seed=0)
    return Loader(split, order, num_workers=num_workers)  # type: ignore[arg-type]


@pytest.mark.parametrize("seeded", [False, True])
def test_batches_come_without_shared_memory_and_it_is_said_once(
    capsys: pytest.CaptureFixture[str], seeded: bool
) -> None:
    order = BatchSampler(16, batch_size=4, shuffle=True, seed=0)
    expected = list(Loader(Numbers(), order, seeded=seeded))  # type: ignore[arg-type]
    found = list(Loader(WithoutSharedMemory(), order, num_workers=2, seeded=seeded))  # type: ignore[arg-type]
    assert len(found) == len(expected) == 4
    for one, other in zip(found, expected, strict=True):
        assert isinstance(one, Batch)
        for a, b in zip(one, other, strict=True):
            assert (a is None) == (b is None)
            assert a is None or torch.equal(a, b)
    said = capsys.readouterr().err
    assert said.count("warning: shared memory (/dev/shm) has no room for batches from workers") == 1


def test_batches_come_through_shared_memory_where_there_is_some() -> None:
    for batch in loader(Numbers(), 1):
        assert batch.inputs.is_shared()


def test_a_killed_worker_is_one_message_with_the_remedy() -> None:
    said = r"killed by signal: Killed: a worker .* memory ran out; use fewer data\.num_workers"
    with pytest.raises(RunError, match=said), lost_worker():
        list(loader(Killed(), 1))


def test_an_error_within_a_worker_stays_what_it_is() -> None:
    with pytest.raises(RuntimeError, match="a bug"), lost_worker():
        raise RuntimeError("a bug")


def test_too_few_files_for_workers_are_one_message(capfd: pytest.CaptureFixture[str]) -> None:
    before, used = resource.getrlimit(resource.RLIMIT_NOFILE), set(map(int, os.listdir("/dev/fd")))
    limit = next(n for n in range(1, before[0]) if n - len([number for number in used if number < n]) == 4)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))
    said = r"workers cannot be started \(Too many open files\): data\.num_workers=2; use fewer, or raise the limit"
    try:
        with pytest.raises(RunError, match=said), lost_worker():
            list(loader(Numbers(), 2))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert "Exception ignored" not in capfd.readouterr().err
