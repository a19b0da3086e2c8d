"""One or more processes: started by torchrun, with torch's DDP or FSDP2."""

from __future__ import annotations

import copy
import datetime
import itertools
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from smolstack.errors import ConfigError
from smolstack.model.vlm import VisionLanguageModel
from smolstack.train.objective import AnswerLoss

# Timeout of the other processes while the first one evaluates and saves.
PATIENCE = datetime.timedelta(hours=6)

_trainings = itertools.count()  # counts runs in this process, equal in all processes


@dataclass(frozen=True)
class Processes:
    """This process among all: ``rank`` of ``count``; the first one writes files."""

    rank: int = 0
    count: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009 - immutable

    @property
    def first(self) -> bool:
        return self.rank == 0

    def total(self, *values: float) -> list[float]:
        """Return the sums of values over all processes."""
        if self.count == 1:
            return list(values)
        summed = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(summed)
        return [float(value) for value in summed]

    def wait(self) -> None:
        """Wait until all processes arrive."""
        if self.count > 1:
            dist.barrier()


@contextmanager
def connected(device: torch.device) -> Iterator[Processes]:
    """Yield the processes that torchrun started, or this one alone."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1 and "RANK" not in os.environ:
        yield Processes(device=device)
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    # A separate prefix in the store: otherwise a second run would read addresses of the first.
    store, rank, count = next(rendezvous("env://", timeout=PATIENCE))
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=PrefixStore(f"training {next(_trainings)}", store),
        rank=rank,
        world_size=count,
        timeout=PATIENCE,
    )
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()


class Spread:
    """A loss module distributed over the processes, and its trained weights by plain name.

    A single process and DDP train the module's own weights. FSDP2 trains shards of a copy; the
    module itself keeps complete weights for evaluation and saving, updated by :meth:`gather`.
    """

    def __init__(self, loss: AnswerLoss, processes: Processes, parallel: str) -> None:
        self.loss, self.processes = loss, processes
        self.sharded = processes.count > 1 and parallel == "fsdp"
        self.trained = _shard(loss, processes) if self.sharded else loss
        self.module: nn.Module = self.trained
        if processes.count > 1 and not self.sharded:
            self.module = _replicated(loss)
        self.parameters: dict[str, nn.Parameter] = {
            name.removeprefix("model."): parameter
            for name, parameter in self.trained.named_parameters()
            if parameter.requires_grad
        }

    def models(self) -> list[VisionLanguageModel]:
        """The models in use: the complete one, and its shards if there are any."""
        return [self.loss.model, *([self.trained.model] if self.sharded else [])]

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        """Exchange gradients only in the last backward pass of a step."""
        module: Any = self.module
        if self.sharded:
            module.set_requires_gradient_sync(last)
        waits = isinstance(module, DistributedDataParallel) and not last
        with module.no_sync() if waits else nullcontext():
            yield

    def gather(self) -> None:
        """Update the complete weights from the shards. All processes must take part."""
        if not self.sharded:
            return
        own = dict(self.loss.model.named_parameters())
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                own[name].copy_(whole(parameter))

    def scatter(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Convert complete tensors named "weight" or "weight|…" to this process's shards."""
        return {
            key: _like(tensor, self.parameters[key.partition("|")[0]])
            for key, tensor in tensors.items()
            if key.partition("|")[0] in self.parameters
        }


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor without shards. All processes must take part."""
    full = getattr(tensor, "full_tensor", None)
    return tensor.detach() if full is None else full().detach()


def _like(tensor: Tensor, parameter: nn.Parameter) -> Tensor:
    """Return a complete tensor, sharded like ``parameter``; scalars (a step count) are not
    sharded.
    """
    if not hasattr(parameter, "placements") or tensor.dim() == 0:
        # AdamW keeps its step count on the CPU.
        return tensor if tensor.dim() == 0 else tensor.to(parameter.device)
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(parameter, DTensor)
    return distribute_tensor(
        tensor.to(parameter.device), parameter.device_mesh, parameter.placements
    )


def _replicated(loss: AnswerLoss) -> nn.Module:
    """Return the module under DDP, which exchanges trained weights and their gradients only.

    Every process has read the same frozen weights; exchanging them would write into each
    process's mapping of the checkpoint, and so copy it.
    """
    frozen = [name for name, parameter in loss.named_parameters() if not parameter.requires_grad]
    ignore: Any = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
    ignore(loss, frozen)
    return DistributedDataParallel(loss)


def _shard(loss: AnswerLoss, processes: Processes) -> AnswerLoss:
    """Return a copy of the module under FSDP2: every layer is a unit, the rest belongs to the root.

    A frozen vision tower runs outside the module (its outputs are cached), so it is shared and not
    sharded.
    """
    try:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
    except ImportError:
        raise ConfigError('parallel = "fsdp" needs torch 2.7 or newer') from None
    mesh = init_device_mesh(processes.device.type, (processes.count,))
    tower = loss.model.vision
    outside = not any(parameter.requires_grad for parameter in tower.parameters())
    sharded: AnswerLoss = copy.deepcopy(loss, {id(tower): tower} if outside else None)
    model = sharded.model
    for layer in [*([] if outside else model.vision.layers), *model.decoder.layers]:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh, ignored_params=set(tower.parameters()) if outside else None)
    return sharded
