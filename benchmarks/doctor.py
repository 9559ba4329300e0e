"""What this machine has, and what will be slow or missing on it, and why: for bug reports and before a long run.

    python -m benchmarks.doctor

Each line is asked for by itself: what is absent or broken is said, and the next one goes on. Exit code 0 in any case
in which it could look.
"""

import os
import platform
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks.environment import PACKAGES, ROOT, commit, cpu_model, package_version
from dali_pipes.cores import usable_cores

State = Literal["ok", "note", "slow", "missing"]
LEAST_FREE_GB = 20  # a ViT-B checkpoint is 1.7 GB, and two are kept
CORES_A_GPU = 8  # below it the host may not keep up with a GPU that decodes


@dataclass(frozen=True)
class Finding:
    """One line. `state`: ok; note: nothing to mend; slow or missing: what it costs and how to mend it is in `text`."""

    name: str
    state: State
    text: str


def examine() -> list[Finding]:
    """Everything, in the order of the report; never raises for what the machine lacks."""
    checks: dict[str, Callable[[], Finding | list[Finding]]] = {
        "machine": machine,
        "disk": disk,
        "versions": versions,
        "torch": torch_build,
        "GPU": gpus,
        "NVML": nvml,
        "DALI": dali,
        "compiler": compiler,
        "Triton": triton,
    }
    found: list[Finding] = []
    for name, check in checks.items():
        try:
            result = check()
        except Exception as error:  # a broken driver raises whatever it likes; the other lines are still wanted
            result = Finding(name, "missing", f"could not be asked: {type(error).__name__}: {error}".splitlines()[0])
        found += result if isinstance(result, list) else [result]
    return found


def machine() -> Finding:
    """Cores and memory that this process may use."""
    cores = usable_cores()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    text = f"{cpu_model()}, {cores} cores, {memory:.0f} GB; {platform.platform()}"
    if cores < CORES_A_GPU * _gpu_count():
        return Finding("machine", "slow", f"{text}: fewer than {CORES_A_GPU} cores a GPU may starve it")
    return Finding("machine", "ok", text)


def disk() -> list[Finding]:
    """Room for checkpoints here, and shared memory for DataLoader's and NCCL's workers."""
    free = shutil.disk_usage(ROOT).free / 1e9
    state: State = "ok" if free >= LEAST_FREE_GB else "note"
    found = [Finding("disk", state, f"{free:.0f} GB free beside this checkout")]
    shared = Path("/dev/shm")
    if shared.exists() and shutil.disk_usage(shared).total < 1e9:
        size = shutil.disk_usage(shared).total / 1e6
        text = f"/dev/shm has {size:.0f} MB; NCCL and DataLoader may fail: start the container with --shm-size 8g"
        found.append(Finding("shared memory", "slow", text))
    return found


def versions() -> Finding:
    """Of what results depend on, and this checkout's commit."""
    named = {package: package_version(package) for package in PACKAGES}
    absent = [package for package, version in named.items() if version is None]
    here = commit()
    text = ", ".join(f"{name} {version}" for name, version in named.items() if version)
    text += f"; Python {platform.python_version()}; commit {(here['commit'] or 'unknown')[:10]}"
    if absent:
        return Finding("versions", "missing", f"{text}; not installed: {', '.join(absent)}")
    return Finding("versions", "ok", text)


def torch_build() -> Finding:
    """Which CUDA torch was built for, and whether it finds a driver for it."""
    import torch

    if torch.version.cuda is None:
        return Finding("torch", "slow", f"torch {torch.__version__} is built for the CPU only; install a CUDA build")
    text = f"torch {torch.__version__}, built for CUDA {torch.version.cuda}"
    if not torch.cuda.is_available():
        return Finding("torch", "note", f"{text}; it finds no usable GPU")
    return Finding("torch", "ok", f"{text}, cuDNN {torch.backends.cudnn.version()}")


def gpus() -> list[Finding]:
    """Name, memory and compute capability of each GPU that torch sees, and what follows from them."""
    import torch

    if not _gpu_count():
        text = "none that torch can use: decoding, augmentation and training run on the CPU, for trials only"
        return [Finding("GPU", "slow", text)]
    found = []
    for i in range(_gpu_count()):
        p = torch.cuda.get_device_properties(i)
        text = f"{p.name}, {p.total_memory / 1e9:.0f} GB, compute capability {p.major}.{p.minor}"
        if (p.major, p.minor) < (8, 0):
            found.append(Finding(f"GPU {i}", "slow", f"{text}: no bf16, so --amp auto is fp16 with a loss scaler"))
        else:
            found.append(Finding(f"GPU {i}", "ok", text))
    if len(found) > 1 and not torch.distributed.is_nccl_available():
        found.append(Finding("NCCL", "missing", "torch has no NCCL: training on several GPUs is not possible"))
    return found


def nvml() -> list[Finding]:
    """Driver, and per card what NVML tells: the JPEG engine, and other processes."""
    try:
        import pynvml
    except ModuleNotFoundError:
        text = "pynvml is not installed: benchmarks tell no power, clocks or throttling; pip install nvidia-ml-py"
        return [Finding("NVML", "missing", text)]
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        state: State = "missing" if _gpu_count() else "note"
        return [Finding("NVML", state, f"no driver to ask ({error}): benchmarks tell no power, clocks or throttling")]
    driver, cuda = pynvml.nvmlSystemGetDriverVersion(), _cuda(pynvml.nvmlSystemGetCudaDriverVersion())
    found = [Finding("NVML", "ok", f"driver {_text(driver)}, good for CUDA {cuda}")]
    for i in range(pynvml.nvmlDeviceGetCount()):
        found += _card(pynvml, i)
    return found


def _card(pynvml: Any, i: int) -> list[Finding]:
    handle, found = pynvml.nvmlDeviceGetHandleByIndex(i), []
    try:
        pynvml.nvmlDeviceGetJpgUtilization(handle)
        found.append(Finding(f"JPEG engine {i}", "ok", "there: JPEGs that it can read are decoded by it"))
    except (pynvml.NVMLError, AttributeError):
        text = "none, or the driver does not tell: JPEGs are decoded by CUDA kernels, beside the training"
        found.append(Finding(f"JPEG engine {i}", "note", text))
    try:
        others = len(pynvml.nvmlDeviceGetComputeRunningProcesses(handle))
    except pynvml.NVMLError:
        others = 0
    if others:
        found.append(Finding(f"card {i}", "note", f"{others} compute processes run on it: timings will be shared"))
    return found


def dali() -> Finding:
    """DALI's version and the CUDA it was built for."""
    from nvidia import dali as package

    return Finding("DALI", "ok", f"DALI {package.__version__}, built for CUDA {_cuda(package.__cuda_version__)}")


def compiler() -> Finding:
    """Whether torch.compile can work."""
    import torch

    from trainer.config import replace
    from trainer.preparation import resolve
    from trainer.presets import PRESETS

    device = torch.device("cuda" if _gpu_count() else "cpu")
    said: list[str] = []
    resolve(replace(PRESETS["demo"](), amp="off", compile="on"), device, said.append)  # what a run would say
    if said:
        return Finding("compiler", "slow", said[0])
    return Finding("compiler", "ok", "there: torch.compile works")


def triton() -> Finding:
    """Whether the fused kernels have what they need."""
    import torch

    from dali_pipes import MOCO_V3
    from dali_pipes.augment import why_not_fused

    version = package_version("triton")
    if version is not None:
        if _gpu_count() and (reason := why_not_fused(torch.device("cuda"), MOCO_V3)) is not None:
            return Finding("Triton", "slow", f"triton {version}, but {reason}: augmentation by DALI's operators")
        return Finding("Triton", "ok", f"triton {version}: compiled GPU code and the fused augmentation")
    state: State = "missing" if _gpu_count() else "note"
    return Finding("Triton", state, "not installed: no compiled GPU code, no fused augmentation; comes with torch+CUDA")


def _gpu_count() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _cuda(number: int) -> str:
    """12090 is 12.9."""
    return f"{number // 1000}.{number % 1000 // 10}"


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def show(findings: Sequence[Finding], console: Console) -> None:
    """The lines, and a last one that counts what is to mend."""
    table = Table(box=None, pad_edge=False, show_header=False)
    for _ in range(3):
        table.add_column(overflow="fold")
    for finding in findings:
        table.add_row(finding.name, "" if finding.state == "ok" else finding.state, Text(finding.text))
    console.print(table)
    wanting = [f.name for f in findings if f.state in ("slow", "missing")]
    console.print(f"To look at: {', '.join(wanting)}." if wanting else "Nothing is slow or missing.", markup=False)


@dataclass(frozen=True)
class Doctor:
    """Print what this machine has, and what will be slow or missing on it, and why."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    tyro.cli(Doctor, prog="python -m benchmarks.doctor", args=argv)
    show(examine(), Console(highlight=False, width=None if sys.stdout.isatty() else 140))
    return 0


if __name__ == "__main__":
    sys.exit(main())
