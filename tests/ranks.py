"""A function on several ranks, each a process of its own, joined by gloo on the CPU."""

import os
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_on_ranks(
    function: Callable[..., Any], *args: Any, world_size: int = 2, folder: Path, timeout: float = 120
) -> list[Any]:
    """[function(*args) on rank 0, on rank 1, ...], called inside an initialised gloo process group.

    function: importable, i.e. at the top of a module. args and results: picklable. folder: pytest's tmp_path. Rank and
    world size are torch.distributed's, and RANK, LOCAL_RANK, WORLD_SIZE are set as torchrun sets them. Each rank has
    one thread.

    Raises RuntimeError with the traceback of the first rank that failed, TimeoutError after `timeout` seconds; no
    process outlives the call.
    """
    folder = folder / f"ranks-{uuid4().hex}"
    folder.mkdir()
    # A fork server imports torch and the model once; ranks then start in a fraction of a second.
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["model"])
    processes = [
        context.Process(target=_rank, args=(rank, world_size, str(folder), timeout, function, args), daemon=True)
        for rank in range(world_size)
    ]
    try:
        for process in processes:
            process.start()
        _wait(processes, folder, time.monotonic() + timeout)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()
    return [torch.load(folder / f"result-{rank}", weights_only=False) for rank in range(world_size)]


def _wait(processes: list[Any], folder: Path, deadline: float) -> None:
    while any(process.exitcode is None for process in processes):
        # One dead rank leaves the others waiting in a collective: its error is the one to report, at once.
        _raise_failure(processes, folder)
        if time.monotonic() > deadline:
            raise TimeoutError(f"ranks still running: {[i for i, p in enumerate(processes) if p.exitcode is None]}")
        time.sleep(0.01)
    _raise_failure(processes, folder)


def _raise_failure(processes: list[Any], folder: Path) -> None:
    failed = [rank for rank, process in enumerate(processes) if process.exitcode not in (None, 0)]
    if failed:
        errors = [folder / f"error-{rank}" for rank in failed]
        text = "\n".join(error.read_text() for error in errors if error.exists())
        raise RuntimeError(f"ranks {failed} failed, exit codes {[processes[r].exitcode for r in failed]}\n{text}")


def _rank(
    rank: int, world_size: int, folder: str, timeout: float, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", f"file://{folder}/store", timedelta(seconds=timeout), rank=rank, world_size=world_size
        )
        result = function(*args)
        torch.save(result, f"{folder}/result-{rank}")
        # The store's owner stays until all have what they need of it.
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        Path(folder, f"error-{rank}").write_text(traceback.format_exc())
        raise
