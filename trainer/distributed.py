"""Ranks, devices and process groups: what torchrun started, which device is whose, who waits for whom."""

import datetime
import fcntl
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar
from uuid import uuid4

import torch
import torch.distributed as dist

from dali_pipes import DatasetError
from dali_pipes.cores import usable_cores
from trainer.config import ConfigError
from trainer.signals import Stopped

Result = TypeVar("Result")


@dataclass(frozen=True)
class World:
    """This process among all that torchrun started; a single process without torchrun."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1
    local_size: int = 1
    torchrun: bool = False
    node: int = 0  # torchrun's number of this machine

    @classmethod
    def from_environment(cls) -> "World":
        """Read the variables that torchrun sets."""
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        missing = [name for name in names if name not in os.environ]
        if "RANK" in missing:
            return cls()
        if missing:
            raise ConfigError(f"RANK is set but {', '.join(missing)} is not; start with torchrun, or unset RANK")
        rank, local_rank, size, local_size = (int(os.environ[name]) for name in names[:4])
        return cls(rank, local_rank, size, local_size, torchrun=True, node=int(os.environ.get("GROUP_RANK", 0)))

    def cores(self) -> int:
        """Cores of this rank: the machine's or container's, shared among its ranks."""
        return max(1, usable_cores() // self.local_size)

    def default_threads(self) -> int:
        """DALI threads of this rank: one a core, at most 16."""
        return min(16, self.cores())

    def store(self) -> dist.Store | None:
        """The key-value store of torchrun's rendezvous, empty; None for a single process. Every rank must call it.

        Rank 0 may scan a large dataset before the others are let on, and torchrun ends them if it dies: they wait long.
        """
        if not self.torchrun:
            return None
        store, _, _ = next(dist.rendezvous("env://", self.rank, self.size))
        store.set_timeout(datetime.timedelta(days=1))
        return dist.PrefixStore(_welcome(store, self.size) if self.rank == 0 else _arrive(store, self.rank), store)


def _welcome(store: dist.Store, size: int) -> str:
    """Rank 0: hand a name of this start to the other ranks; see `_arrive`."""
    name = uuid4().hex
    while store.add(f"{name}/arrived", 0) < size - 1:
        for key in (f"moco_v3/hello/{rank}" for rank in range(1, size)):
            if store.check([key]):
                store.set(f"moco_v3/welcome/{store.get(key).decode()}", name)
        time.sleep(0.05)
    return name


def _arrive(store: dist.Store, rank: int) -> str:
    """The other ranks: get the name of this start from rank 0.

    torchrun keeps one store over all its restarts, with what the ranks of before wrote: addresses where nobody listens
    any more (torch's own too: a restarted gloo group would try them and fail). Under a name of its own each start finds
    an empty store; a rank that says a number made for this occasion is answered by nobody but the living rank 0.
    """
    number = uuid4().hex
    store.set(f"moco_v3/hello/{rank}", number)
    name = store.get(f"moco_v3/welcome/{number}").decode()
    store.add(f"{name}/arrived", 1)
    return name


def limit_threads() -> None:
    """torch has a thread for each of the machine's cores, also where a quota leaves this process fewer."""
    torch.set_num_threads(min(torch.get_num_threads(), usable_cores()))


def choose_device(requested: str, world: World) -> torch.device:
    """The device of this rank: its own GPU, or the CPU.

    Raises:
        ConfigError: CUDA was asked for and is not there, the driver has a GPU that torch cannot use, or the machine
            has fewer GPUs than ranks.
    """
    if requested == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        unusable = _driver_without_torch()
        if unusable:
            raise ConfigError(f"{unusable}; update the driver or install a torch built for it, or use --device cpu")
        if requested == "cuda":
            raise ConfigError("--device cuda, but this machine has no CUDA GPU; use --device cpu")
        return torch.device("cpu")
    gpus = torch.cuda.device_count()
    if world.local_size > gpus:
        raise ConfigError(f"--nproc-per-node {world.local_size}, but this machine has {gpus} GPUs: one process a GPU")
    return torch.device("cuda", world.local_rank)


def _driver_without_torch() -> str | None:
    """Say which GPU the driver sees although torch cannot use it; None without one or if the user hid them all."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1"):
        return None
    import pynvml

    try:
        pynvml.nvmlInit()
        count, driver = pynvml.nvmlDeviceGetCount(), pynvml.nvmlSystemGetDriverVersion()
    except pynvml.NVMLError:
        return None
    if not count:
        return None
    return f"driver {driver} has {count} GPU(s) that torch {torch.__version__} (CUDA {torch.version.cuda}) cannot use"


def join(world: World, store: dist.Store | None, device: torch.device, timeout: int) -> None:
    """Enter the process group of all ranks: NCCL between GPUs, gloo between CPUs; nothing for a single process."""
    if device.type == "cuda":
        # Before anything allocates, or every rank would open a context on GPU 0.
        torch.cuda.set_device(device)
    if store is None:
        return
    # The store's own waiting was for rank 0's preparation; from here on a missing rank is an error.
    store.set_timeout(datetime.timedelta(seconds=timeout))
    if world.size > world.local_size:
        interface = interface_between_nodes(world.node, store)  # on every node: one may wait for another's answer
        if interface is not None:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=world.rank,
        world_size=world.size,
        timeout=datetime.timedelta(seconds=timeout),
        device_id=device if device.type == "cuda" else None,
    )


def interface_between_nodes(node: int, store: dist.Store) -> str | None:
    """The network interface through which this node reaches node 0, and node 0 another one; None if it has no name.

    gloo would take the one of the host's own name, which on many systems is the loopback, where no other node comes.
    """
    source = _source_towards(os.environ["MASTER_ADDR"])
    if node:
        store.set("moco_v3/address", source)
    elif source.startswith("127."):  # node 0 names itself so
        source = _source_towards(store.get("moco_v3/address").decode())
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as opened:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # one without an address
                found = fcntl.ioctl(opened, 0x8915, name.encode().ljust(256, b"\0"))  # SIOCGIFADDR
                if socket.inet_ntoa(found[20:24]) == source:
                    return name
    return None


def _source_towards(address: str) -> str:
    """This node's IPv4 address on the way to another; empty if there is none."""
    if address:  # else it would be the loopback's
        with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as opened:
            opened.connect((address, 1))  # of a datagram socket: nothing is sent
            return str(opened.getsockname()[0])
    return ""


class Votes:
    """What all ranks do after the same step, although one rank alone has a reason: stop, save.

    Signals reach the ranks at different steps and their clocks differ, so they vote: each step starts a sum over the
    CPU that the next step reads. It is hidden behind the step and never waits for a GPU.
    """

    def __init__(self, timeout: int) -> None:
        self._group: Any = None
        if dist.is_initialized():
            self._group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout))
        self._pending: tuple[Any, torch.Tensor] | None = None

    def exchange(self, stop: bool, save: bool) -> tuple[bool, bool]:
        """Whether a rank wanted to stop, to save, at the step before; call it once a step, on every rank."""
        if self._group is None:
            return stop, save
        before = self.settle()
        votes = torch.tensor([int(stop), int(save)])
        self._pending = (dist.all_reduce(votes, group=self._group, async_op=True), votes)
        return before

    def settle(self) -> tuple[bool, bool]:
        """Wait for the last votes, which all ranks have cast."""
        if self._pending is None:
            return False, False
        work, votes = self._pending
        work.wait()
        self._pending = None
        return bool(votes[0]), bool(votes[1])


def gathered(value: Any) -> list[Any]:
    """A small picklable value of every rank, in the order of the ranks; the host waits, and every rank must call it."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def together(work: Callable[[], Result]) -> Result:
    """What `work`, in which ranks do not wait for each other, gives on this rank; every rank must call it.

    A rank that gave up alone would leave the others waiting for it in what comes next.

    Raises:
        ConfigError, DatasetError, FloatingPointError, torch.OutOfMemoryError, Stopped: the same on all ranks, if one
            met it.
    """
    error: BaseException | None = None
    try:
        result = work()
    except (ConfigError, DatasetError, FloatingPointError, torch.OutOfMemoryError, Stopped) as met:
        error = met.with_traceback(None)  # which holds all that `work` had in its hands
    error = next((each for each in gathered(error) if each is not None), None)
    if error is None:
        return result
    try:
        raise error
    finally:
        del error  # its traceback would hold this frame, and the other way round


def mean_over_ranks(value: torch.Tensor) -> torch.Tensor:
    """Mean of a tensor over all ranks, element by element, on the device; every rank must call it."""
    total = sum_over_ranks(value)
    return total / dist.get_world_size() if dist.is_initialized() else total


def sum_over_ranks(value: torch.Tensor) -> torch.Tensor:
    """Sum of a tensor over all ranks, element by element, on the device; every rank must call it."""
    return _reduced(value, dist.ReduceOp.SUM)


def max_over_ranks(value: torch.Tensor) -> torch.Tensor:
    """Largest of a tensor over all ranks, element by element, on the device; every rank must call it."""
    return _reduced(value, dist.ReduceOp.MAX)


def _reduced(value: torch.Tensor, operation: Any) -> torch.Tensor:
    result = value.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(result, operation)
    return result
