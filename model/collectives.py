"""What the model exchanges between ranks, in the form that torch.compile traces without a graph break."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor, nn

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
    return finish(start_gather(x))


def start_gather(x: Tensor) -> Tensor:
    """`gather`, to go on beside what is computed until `finish` is called with what this returns."""
    if world_size() == 1:
        return x.detach()
    if x.device.type == "cpu":
        return _gather_by_sum(x.detach())
    return _all_gather(x.detach().contiguous(), 0, _group())


def _gather_by_sum(x: Tensor) -> Tensor:
    """The same with gloo: each rank adds its rows to zeros, which changes none but -0.0.

    All-gathers that overlap end processes there ("malloc(): unaligned fastbin chunk detected"): two threads note what
    they did last in one string without a lock, and this one's name, ALLGATHER_COALESCED, is too long to lie in the
    string itself.
    """
    ranks = x.new_zeros(world_size(), *x.shape)
    ranks[rank()] = x
    return functional.all_reduce(ranks.flatten(0, 1), "sum", _group())


def finish(under_way: Tensor) -> Tensor:
    """The result of what was started; on a GPU the current stream waits for it, and the host does not."""
    return functional.wait_tensor(under_way) if world_size() > 1 else under_way


def add_up(x: Tensor) -> Tensor:
    """The sum of every rank's x, without gradient."""
    if world_size() == 1:
        return x.detach()
    return functional.wait_tensor(functional.all_reduce(x.detach(), "sum", _group()))


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace the gradients by their mean over all ranks, in one all-reduce a dtype.

    It stands for DDP where that cannot be: its reducer takes a parameter's first gradient of a step for the whole one.
    """
    if world_size() == 1:
        return
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            by_dtype.setdefault(parameter.grad.dtype, []).append(parameter.grad)
    for gradients in by_dtype.values():
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat)
        flat /= world_size()
        parts = zip(flat.split([gradient.numel() for gradient in gradients]), gradients, strict=True)
        torch._foreach_copy_(gradients, [part.view_as(gradient) for part, gradient in parts])


def _group() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD
