"""Several processes that train one model: who they are, what they tell each other, who holds what.

Every process reads the same data and draws the same batches, so that only gradients, figures and
decisions by the clock travel. Knows torch.distributed and containers; nothing of recommenders.
"""

from __future__ import annotations

import copy
import datetime
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

PARALLEL = ("ddp", "fsdp")

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """The processes of a run, as one of them sees them.

    Attributes:
        rank: which one this is, from 0.
        world: how many there are.
        parallel: `"ddp"`: each holds the whole model; `"fsdp"`: weights, gradients and optimiser
            state are split among them (FSDP2).
    """

    rank: int = 0
    world: int = 1
    parallel: str = "ddp"

    @property
    def first(self) -> bool:
        """Whether this is the one that prints and writes what is written once."""
        return self.rank == 0

    @property
    def sharded(self) -> bool:
        """Whether weights are split."""
        return self.world > 1 and self.parallel == "fsdp"

    def share(self, rows: np.ndarray) -> np.ndarray:
        """This process's part of some rows: every `world`-th."""
        return rows[self.rank :: self.world]

    def agree(self, value: T) -> T:
        """What the first process has; the others' value is dropped."""
        if self.world == 1:
            return value
        values = [value]
        torch.distributed.broadcast_object_list(values, src=0)
        return values[0]

    def gather(self, value: T) -> list[T]:
        """Every process's value, in the order of their ranks."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(values, value)
        return values

    def joined(self, rows: np.ndarray) -> np.ndarray:
        """All rows again, of each process's results for its :meth:`share` of them."""
        parts = self.gather(rows)
        whole = np.empty((sum(map(len, parts)), *rows.shape[1:]), dtype=rows.dtype)
        for rank, part in enumerate(parts):
            whole[rank :: self.world] = part
        return whole

    def mean(self, figures: Mapping[str, float]) -> dict[str, float]:
        """Means over the processes; all give the same names."""
        if self.world == 1:
            return dict(figures)
        parts = self.gather(dict(figures))
        return {name: sum(part[name] for part in parts) / self.world for name in figures}

    def mean_(self, tensors: Sequence[Tensor]) -> None:
        """Replaces each tensor by its mean over the processes."""
        if self.world == 1:
            return
        for tensor in tensors:
            torch.distributed.all_reduce(tensor)
            tensor /= self.world

    def wait(self) -> None:
        """Until all are here."""
        if self.world > 1:
            torch.distributed.barrier()

    def wrap(self, module: nn.Module, layers: Sequence[nn.Module] = (), *, unused: bool) -> Any:
        """The module with gradients that are means over the processes.

        Args:
            module: to be called for a loss; under `"fsdp"` its parameters are split in place.
            layers: modules within it that `"fsdp"` fetches one at a time.
            unused: whether some parameters may have no part in a loss.
        """
        if self.world == 1:
            return module
        device = next(module.parameters()).device
        if self.parallel == "fsdp":
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh(device.type, (self.world,))
            for layer in layers:
                fully_shard(layer, mesh=mesh)
            return fully_shard(module, mesh=mesh)
        return nn.parallel.DistributedDataParallel(
            module,
            device_ids=[device] if device.type == "cuda" else None,
            broadcast_buffers=False,  # the same everywhere
            find_unused_parameters=unused,
        )

    @contextmanager
    def adding_up(self, module: nn.Module, last: bool) -> Iterator[None]:
        """Around the forward and backward of a batch's part: gradients travel with the last."""
        if self.world == 1 or last:
            if self.sharded:
                module.set_requires_gradient_sync(True)  # type: ignore[operator]
            yield
        elif self.sharded:
            module.set_requires_gradient_sync(False)  # type: ignore[operator]
            yield
        else:
            with module.no_sync():  # type: ignore[operator]
                yield


ALONE = Processes()


@contextmanager
def joined(parallel: str, timeout: float, device: str = "cpu") -> Iterator[Processes]:
    """The processes that `torchrun` started, or this one alone.

    Where torch.distributed is initialised already, that group is used and left as it is.

    Args:
        parallel: of :class:`Processes`.
        timeout: seconds that a process waits for the others, before it ends with an error.
        device: where they train.

    Raises:
        ConnectionError: another process ended, or did not answer in time.
    """
    dist = torch.distributed
    outside = dist.is_available() and dist.is_initialized()
    if not outside and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Processes(parallel=parallel)
        return
    if not outside:
        backend = "gloo"
        if torch.device(device).type == "cuda" and torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            backend = "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout))
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), parallel)
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise ConnectionError(
            f"process {dist.get_rank()}: another process ended, or did not answer within the "
            f"timeout; its own error says why, and --resume goes on from what was saved ({error})"
        ) from error
    finally:
        if not outside:
            dist.destroy_process_group()


def check_device(device: str) -> None:
    """A ValueError where torch has no such device here."""
    try:
        wanted = torch.device(device)
        there = wanted.type != "meta"  # holds no numbers
        if wanted.type == "cuda":
            there = torch.cuda.is_available() and (wanted.index or 0) < torch.cuda.device_count()
        elif there:
            torch.empty(0, device=wanted)
    except (AssertionError, NotImplementedError, RuntimeError):
        there = False
    if not there:
        count = torch.cuda.device_count()
        cuda = f"cuda:0 to cuda:{count - 1}" if count else "no CUDA device is to be had here"
        raise ValueError(f"device: {device!r}; expected cpu or another that torch has ({cuda})")


def own_device(device: str) -> torch.device:
    """`cuda` as this process's own under `torchrun`; any other device as it is."""
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return torch.device(device)


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be split among the processes, whole; all have to ask for it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def split_like(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, split among the processes as `like` is."""
    if not hasattr(like, "device_mesh") or value.dim() == 0:
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


class Replica:
    """A model as it is trained, beside the whole one that everything else reads.

    Under `"fsdp"` these are two: a split copy that the optimiser moves, and the model given, which
    :meth:`publish` brings up to date. Otherwise they are the same.

    Args:
        model: the whole model.
        processes: who trains.
    """

    def __init__(self, model: nn.Module, processes: Processes) -> None:
        self.model = model
        self.own: Any = copy.deepcopy(model) if processes.sharded else model

    @torch.no_grad()
    def publish(self, values: Sequence[Tensor] | None = None) -> None:
        """Gives the whole model the trained one's parameters, or these values of them."""
        if self.own is self.model and values is None:
            return
        of = list(self.own.parameters()) if values is None else values
        for target, value in zip(self.model.parameters(), of, strict=True):
            target.copy_(whole(value))

    def load(self, state: Mapping[str, Any]) -> None:
        """Takes a whole state, as :meth:`torch.nn.Module.state_dict` gives it."""
        self.model.load_state_dict(state)
        if self.own is not self.model:
            now = self.own.state_dict()
            self.own.load_state_dict({k: split_like(v, now[k]) for k, v in state.items()})


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Gives an optimiser a state of whole tensors, split as its parameters are."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    held = {
        place: {name: split_like(value, parameters[place]) for name, value in entry.items()}
        for place, entry in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": held})
