"""What the model exchanges between ranks, in the form that torch.compile traces without a graph break."""

import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor

# torch 2.14 gave this function a new name and deprecates the old one, which older versions know only.
_all_gather = getattr(functional, "all_gather_single", None) or functional.all_gather_tensor


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Number of this rank; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def gather(x: Tensor) -> Tensor:
    """(N, ...) of every rank, the same shape on each, to (N x world size, ...) in rank order, without gradient."""
    if world_size() == 1:
        return x.detach()
    return functional.wait_tensor(_all_gather(x.detach().contiguous(), 0, _group()))


def add_up(x: Tensor) -> Tensor:
    """The sum of every rank's x, without gradient."""
    if world_size() == 1:
        return x.detach()
    return functional.wait_tensor(functional.all_reduce(x.detach(), "sum", _group()))


def _group() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD
