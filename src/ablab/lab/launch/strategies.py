"""Strategies for several processes: DDP replicates the model, FSDP shards every weight."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any, Literal

import lightning as L
import torch.distributed as dist
from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ablab.rank import launcher

HOOKS = {"bf16": default_hooks.bf16_compress_hook, "fp16": default_hooks.fp16_compress_hook}


def ddp(
    *,
    timeout: float = 600.0,
    bucket_cap_mb: float = 25.0,
    static_graph: bool = False,
    find_unused_parameters: bool = False,
    fixed_buckets: bool = False,
    compression: Literal["bf16", "fp16"] | None = None,
) -> DDPStrategy:
    """Return the DDP strategy: each process has the whole model; gradients are averaged during the backward pass.

    Args:
        timeout: seconds to wait for other processes; then the run fails instead of hanging.
        bucket_cap_mb: MiB of gradients per all-reduce: small buckets start earlier, large ones use the network better.
        static_graph: the same parameters get gradients in every step; saves bookkeeping.
        find_unused_parameters: some parameters get no gradient in some steps; costs a traversal of the graph.
        fixed_buckets: use the same gradient buckets in every step. Otherwise torch rebuilds them after the first step
            of a process, so with three or more processes a resumed run sums in another order, and its last bits differ.
            Costs the same traversal. Incompatible with `static_graph`, which rebuilds them anyway.
        compression: send gradients with 16 bits, on GPUs; halves the traffic, and rounds.

    Raises:
        ValueError: an argument is out of range or unknown, or two are incompatible.

    References:
        Li et al. 2020, https://arxiv.org/abs/2006.15704
    """
    if not timeout > 0:
        raise ValueError(f"timeout={timeout}: more than 0 seconds are needed")
    if bucket_cap_mb <= 0:
        raise ValueError(f"bucket_cap_mb={bucket_cap_mb}: more than 0 is needed")
    if compression is not None and compression not in HOOKS:
        raise ValueError(f"compression={compression}: bf16, fp16 or null is needed")
    if static_graph and fixed_buckets:
        raise ValueError(
            "static_graph=True, fixed_buckets=True: with a static graph torch puts gradients together anew after the "
            "first step; set one of trainer.strategy.static_graph and trainer.strategy.fixed_buckets (which "
            "trainer=ddp_cpu sets) to false"
        )
    return FixedBuckets(
        fixed=fixed_buckets,
        timeout=timedelta(seconds=timeout),
        bucket_cap_mb=bucket_cap_mb,
        static_graph=static_graph,
        find_unused_parameters=find_unused_parameters,
        gradient_as_bucket_view=True,
        ddp_comm_hook=None if compression is None else HOOKS[compression],
    )


def cluster_environment() -> ClusterEnvironment:
    """Return the source of ranks for Lightning, which by itself would take any Slurm allocation for srun."""
    environments = {"srun": SLURMEnvironment, "torchrun": TorchElasticEnvironment, None: LightningEnvironment}
    return environments[launcher()]()


class FixedBuckets(DDPStrategy):
    """Lightning's DDP strategy, without rebuilding buckets where that would change the order of sums."""

    def __init__(self, *, fixed: bool, **settings: Any) -> None:
        super().__init__(**settings)
        self.fixed = fixed

    def _setup_model(self, model: nn.Module) -> DistributedDataParallel:
        if self.fixed and self.world_size > 2:  # the sum of two numbers does not depend on their order
            self._ddp_kwargs["find_unused_parameters"] = True  # torch then never rebuilds its buckets
        if not getattr(model, "automatic_optimization", True) and not self._ddp_kwargs.get("static_graph"):
            self._ddp_kwargs["find_unused_parameters"] = True  # a backward pass may cover one of several networks
        return super()._setup_model(model)


def fsdp(*, timeout: float = 600.0, reshard_after_forward: bool = True) -> Sharded:
    """Return the FSDP strategy: weights, gradients and optimizer state are sharded; one block is gathered at a time.

    Args:
        timeout: seconds to wait for other processes; then the run fails instead of hanging.
        reshard_after_forward: free the weights of a block after its forward pass, and gather them again for its
            backward pass: less memory, half as much traffic again.

    Raises:
        ValueError: the timeout is not positive.

    References:
        Zhao et al. 2023, https://arxiv.org/abs/2304.11277
    """
    if not timeout > 0:
        raise ValueError(f"timeout={timeout}: more than 0 seconds are needed")
    return Sharded(
        timeout=timedelta(seconds=timeout),
        reshard_after_forward=reshard_after_forward,
    )


class Sharded(DDPStrategy):
    """FSDP2 in place of DDP: the same processes, batches and files.

    The units of sharding are the model's `blocks`, or the model if it has none. Checkpoints hold whole tensors, so that
    any number of processes, with or without FSDP, can load the weights. With micro-batches, the gradients of each are
    reduced: accumulating them locally would need whole gradients.
    """

    def __init__(self, *, reshard_after_forward: bool, **settings: Any) -> None:
        super().__init__(**settings)
        self.reshard_after_forward = reshard_after_forward

    def model_to_device(self) -> None:
        """Move the model to the device block by block, so that it is never there as a whole."""
        assert self.model is not None
        model = self.model.model
        assert isinstance(model, nn.Module)
        if not isinstance(model, FSDPModule):
            mesh = init_device_mesh(self.root_device.type, (self.world_size,))
            for part in (*getattr(model, "blocks", nn.ModuleList()), model):
                fully_shard(part, mesh=mesh, reshard_after_forward=self.reshard_after_forward)
            model.register_forward_pre_hook(sync_buffers_before_forward)
        super().model_to_device()

    def configure_ddp(self) -> None:
        """Do nothing: the model is already sharded."""

    def setup(self, trainer: L.Trainer) -> None:
        if trainer.state.fn == "fit":
            super().setup(trainer)
            return
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        self.model_to_device()
        self.setup_precision_plugin()

    def on_validation_start(self) -> None:
        """Evaluate one model: each process has running averages of norms from its own part of the last batch."""
        assert self.lightning_module is not None
        broadcast_buffers(self.lightning_module)

    def on_test_start(self) -> None:
        self.on_validation_start()

    def teardown(self) -> None:
        """Leave the model on its device, to which its shards belong."""
        assert self.cluster_environment is not None
        assert self.accelerator is not None
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        self.accelerator.teardown()

    # Full tensors, in rank 0 -----------------------------------------------------------------------------------------

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return get_model_state_dict(self.lightning_module, options=FULL_STATE)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        set_model_state_dict(self.lightning_module, checkpoint["state_dict"], options=FULL_STATE)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        assert self.lightning_module is not None
        return get_optimizer_state_dict(self.lightning_module, optimizer, options=FULL_STATE)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        assert self.lightning_module is not None
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            set_optimizer_state_dict(self.lightning_module, optimizer, state, options=FULL_STATE)


FULL_STATE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def sync_buffers_before_forward(model: nn.Module, arguments: Any) -> None:
    """Synchronize buffers before a forward pass of training, as DDP does."""
    if model.training:
        broadcast_buffers(model)


def broadcast_buffers(model: nn.Module) -> None:
    """Broadcast the buffers of rank 0, such as running averages of norms."""
    for buffer in model.buffers():
        dist.broadcast(buffer, 0)


def full_weights(model: nn.Module) -> dict[str, Any]:
    """Return the full weights of a model, sharded or not; those of a sharded model only in rank 0."""
    return get_model_state_dict(model, options=FULL_STATE) if isinstance(model, FSDPModule) else model.state_dict()


def load_weights(model: nn.Module, weights: dict[str, Any]) -> None:
    """Load weights into a model, sharded or not."""
    if isinstance(model, FSDPModule):
        set_model_state_dict(model, weights, options=FULL_STATE)
    else:
        model.load_state_dict(weights)
