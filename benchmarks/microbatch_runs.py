"""Steps of the trainer on one batch, whole and in chunks, each kind in a process of its own: what it took and gave."""

import gc
import re
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.results import ResultError
from trainer.config import Config
from trainer.engine import autocast, build_model
from trainer.microbatch import chunked_step
from trainer.objective import Objective, Outputs

STATUS, CLEAR_REFERENCES = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Taken:
    """Of a first forward and backward pass, but for the time, which is that of the next.

    megabytes: peak of memory above what model, views and libraries held before.
    """

    megabytes: float
    milliseconds: tuple[float, ...]
    loss: Tensor
    gradients: dict[str, Tensor]


def take(config: Config, device: torch.device, views: Tensor, chunk: int | None) -> Taken:
    """Run it in a fresh process: an allocator that another kind has used would hide what this one needs.

    views: (2, N, 3, S, S), uint8. chunk: images in the backbone at once; None for the whole batch in the plain step.

    Raises:
        ResultError: the process died; its message is on stderr.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "taken"
        process = get_context("spawn").Process(target=_work, args=(file, config, device, views, chunk))
        process.start()
        process.join()
        if process.exitcode:
            step = "the plain step" if chunk is None else f"the step with --microbatch {chunk}"
            raise ResultError(f"{step} failed: exit code {process.exitcode}")
        return Taken(**torch.load(file, weights_only=True))


def _work(file: Path, config: Config, device: torch.device, views: Tensor, chunk: int | None) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dtype = torch.float64 if config.run.dtype == "float64" else torch.float32
    model = build_model(config, sync_bn=False).to(device=device, dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    # From the CPU's memory to the device, in the layout in which the loader hands over.
    x1, x2 = (view.to(device).contiguous(memory_format=torch.channels_last) for view in views)
    precision = partial(autocast, config, device)

    def step(n: int) -> Outputs:
        model.zero_grad(set_to_none=True)
        if chunk is not None:
            return chunked_step(model, (x1[:n], x2[:n]), 0.99, chunk, precision, lambda loss: loss)
        with precision():
            outputs = Objective(model)(x1[:n], x2[:n], 0.99)
        outputs.loss.backward()
        return outputs

    step(2)  # what libraries load and keep
    model.zero_grad(set_to_none=True)
    gc.collect()
    before = _settled(device)
    outputs = step(len(x1))
    megabytes = (_peak(device) - before) / 1e6
    gradients = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    loss = outputs.loss.detach().cpu()
    _wait(device)
    started = time.perf_counter()
    step(len(x1))
    _wait(device)
    milliseconds = (1000 * (time.perf_counter() - started),)
    torch.save({"megabytes": megabytes, "milliseconds": milliseconds, "loss": loss, "gradients": gradients}, file)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _settled(device: torch.device) -> int:
    """Bytes in use now; the peak is counted anew from here."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    CLEAR_REFERENCES.write_text("5")  # proc(5): resets the peak of the resident set
    return _resident("VmRSS")


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _resident("VmHWM")


def _resident(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", STATUS.read_text())
    assert found is not None
    return 1024 * int(found[1])
