"""Statistics over several processes: real processes, gloo, each with its own share of a batch."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from ablab.norms import BatchNorm, EvoNormB0, Norm, recalibrate

# what is synchronized, in which layout
CASES: dict[str, tuple[Norm, Norm, str]] = {
    "images": (BatchNorm(sync=True), BatchNorm(), "image"),
    "sequences with padding": (BatchNorm(sync=True), BatchNorm(), "sequence"),
    "steps of a recurrence": (BatchNorm(sync=True), BatchNorm(), "recurrence"),
    "mean only": (BatchNorm(sync=True, mean_only=True), BatchNorm(mean_only=True), "image"),
    "renorm": (BatchNorm(sync=True, r_max=2, d_max=1), BatchNorm(r_max=2, d_max=1), "image"),
    "evonorm": (EvoNormB0(sync=True), EvoNormB0(), "image"),
}
SHARES = {2: [5, 3], 4: [3, 0, 4, 2]}  # samples of each process


def problem(layout: str, total: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, Tensor]:
    """A batch of all processes, its mask, and what each output weighs in the loss."""
    generator = torch.Generator().manual_seed(3)
    size = (total, 4, 3, 3) if layout == "image" else (total, 5, 4)
    x = torch.randn(size, generator=generator, dtype=torch.float64) * 2 + 1
    weights = torch.randn(size, generator=generator, dtype=torch.float64)
    lengths = torch.arange(total) % 5 + 1
    valid = None if layout == "image" else torch.arange(5) < lengths[:, None]
    if valid is not None:
        weights = weights * valid[..., None]
    return x.to(dtype), valid, weights.to(dtype)


def outcome(norm: Norm, layout: str, dtype: torch.dtype, share: slice, total: int) -> dict[str, Tensor]:
    """Output, gradients and buffers of one process, or of a single one with the joined batch."""
    layer = (norm.recurrent(4, "cell", num_steps=5) if layout == "recurrence" else norm(4, layout)).to(dtype)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    x, valid, weights = problem(layout, total, dtype)
    x = x[share].requires_grad_()
    y = layer(x, None if valid is None else valid[share])
    (y * weights[share]).sum().backward()
    gradients = {name: p.grad for name, p in layer.named_parameters()}
    return {"output": y.detach(), "input gradient": x.grad, **gradients, **dict(layer.named_buffers())}


def work(rank: int, shares: list[int], port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=len(shares))
    start = sum(shares[:rank])
    share = slice(start, start + shares[rank])
    results: dict[str, Any] = {
        f"{name}, {dtype}": outcome(synced, layout, dtype, share, sum(shares))
        for name, (synced, _, layout) in CASES.items()
        for dtype in (torch.float32, torch.float64)
    }
    layer = BatchNorm()(4, "image").double()  # its batches are its own, but precise statistics are everyone's
    x, _, _ = problem("image", sum(shares), torch.float64)
    recalibrate(layer, [x[share]])
    results["recalibrated"] = dict(layer.named_buffers())
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.thorough)])
def test_synchronized_statistics_are_those_of_the_joined_batch(world_size: int, tmp_path: Path) -> None:
    shares = SHARES[world_size]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, args=(shares, port, str(tmp_path)), nprocs=world_size)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(world_size)]
    for name, (_, local, layout) in CASES.items():
        for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-12)):
            joined = outcome(local, layout, dtype, slice(None), sum(shares))
            case = f"{name}, {dtype}"
            for part, expected in joined.items():
                theirs = [result[case][part] for result in ranks]
                if part in ("output", "input gradient"):
                    ours = torch.cat(theirs)
                elif part in ("weight", "bias"):
                    ours = torch.stack(theirs).sum(0)
                else:  # every process has the same running averages
                    ours = theirs[0]
                    assert all(torch.equal(ours, other) for other in theirs), f"{case}: {part}"
                size = expected.abs().max().clamp(min=1) if expected.numel() else 1
                error = (ours - expected).abs().max() / size
                assert error <= tolerance, f"{case}: {part} differs by {error}"
    x, _, _ = problem("image", sum(shares), torch.float64)
    for result in ranks:
        torch.testing.assert_close(result["recalibrated"]["running_mean"], x.mean((0, 2, 3)))
        torch.testing.assert_close(result["recalibrated"]["running_var"], x.var((0, 2, 3)))
