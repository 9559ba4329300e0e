"""The GPU while a benchmark runs: utilisation, power, clocks, and what held it back, sampled through NVML."""

import statistics
import threading
from types import TracebackType
from typing import Any, Self

import torch

from benchmarks.clocks import looking_on

LEAST_SECONDS = 1.0  # of a stretch whose energy is told: the card's counter moves about ten times a second
INTERVAL_SECONDS = 0.1  # NVML itself averages utilisation over 1/6 s to 1 s

# Bits of nvmlDeviceGetCurrentClocksEventReasons that slow the card down; idle and the application's own clocks do not.
THROTTLES = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "thermal, software",
    0x40: "thermal, hardware",
    0x80: "power brake",
}


class GpuSampler:
    """Context manager that samples one device in a thread; `summary` tells afterwards.

    Without NVML, or on the CPU, it samples nothing and `summary` gives the reason.
    """

    def __init__(self, device: torch.device) -> None:
        self._samples: list[dict[str, float]] = []
        self._reasons: set[str] | None = None  # None: the driver has told nothing
        self._others: int | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._missing = "" if device.type == "cuda" else "the benchmark ran on the CPU"
        self._handle: Any = None
        if not self._missing:
            self._handle, self._missing = _handle(device)

    def __enter__(self) -> Self:
        if self._handle is not None:
            self._thread = threading.Thread(target=self._sample, daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(INTERVAL_SECONDS):
            with looking_on():
                self._samples.append(_read(self._handle))
                if (others := _other_processes(self._handle)) is not None:
                    self._others = max(self._others or 0, others)
                if (reasons := _throttles(self._handle)) is not None:
                    self._reasons = (self._reasons or set()) | reasons

    def summary(self) -> dict[str, Any]:
        """`available`, and either `reason`, or the mean and the largest of each reading with its unit in its name.

        A reading that this driver does not offer is left out. `throttled`: reasons seen at any time. `other_processes`:
        the most at any time. Both None where the driver does not tell.
        """
        if not self._samples:
            return {"available": False, "reason": self._missing or "the run was shorter than one sample"}
        names = sorted({name for sample in self._samples for name in sample})
        columns = {name: [sample[name] for sample in self._samples if name in sample] for name in names}
        return {
            "available": True,
            "samples": len(self._samples),
            "mean": {name: round(statistics.fmean(column), 1) for name, column in columns.items()},
            "max": {name: max(column) for name, column in columns.items()},
            "throttled": None if self._reasons is None else sorted(self._reasons),
            "other_processes": self._others,
        }


class EnergyMeter:
    """The card's own counter of the energy it took; without NVML, on the CPU and on cards before Volta: none."""

    def __init__(self, device: torch.device) -> None:
        self._handle: Any = _handle(device)[0] if device.type == "cuda" else None

    def joules(self) -> float | None:
        """Since the driver was loaded, or None; the counter moves about ten times a second."""
        if self._handle is None:
            return None
        import pynvml

        try:
            return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1000
        except (pynvml.NVMLError, AttributeError):
            return None


def sentence(summary: dict[str, Any]) -> str:
    """The summary in one line."""
    if not summary.get("available"):
        return f"no GPU readings: {summary.get('reason', 'none were taken')}"
    mean = summary["mean"]
    readings = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in mean.items())
    held = summary["throttled"]
    throttled = "" if held is None else f"; held back by: {', '.join(held)}" if held else "; never held back"
    shared = f"; {summary['other_processes']} other processes on the card" if summary["other_processes"] else ""
    return f"GPU over the whole command, building and compiling included, on average: {readings}{throttled}{shared}"


def _handle(device: torch.device) -> tuple[Any, str]:
    try:
        import pynvml
    except ModuleNotFoundError:
        return None, "pynvml is not installed (pip install nvidia-ml-py)"
    try:
        pynvml.nvmlInit()
        # By its identity: NVML numbers all cards, torch those that CUDA_VISIBLE_DEVICES leaves.
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        return pynvml.nvmlDeviceGetHandleByUUID(uuid), ""
    except pynvml.NVMLError as error:
        return None, f"NVML: {error}"


def _read(handle: Any) -> dict[str, float]:
    """One sample, without what this driver or card does not tell (jpeg engine: from driver 535 on)."""
    import pynvml

    readings = {
        "utilisation_percent": lambda: pynvml.nvmlDeviceGetUtilizationRates(handle).gpu,
        "memory_utilisation_percent": lambda: pynvml.nvmlDeviceGetUtilizationRates(handle).memory,
        "memory_used_gb": lambda: round(pynvml.nvmlDeviceGetMemoryInfo(handle).used / 1e9, 2),
        "jpeg_engine_percent": lambda: pynvml.nvmlDeviceGetJpgUtilization(handle)[0],
        "decoder_percent": lambda: pynvml.nvmlDeviceGetDecoderUtilization(handle)[0],
        "power_watts": lambda: pynvml.nvmlDeviceGetPowerUsage(handle) / 1000,
        "sm_clock_mhz": lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
        "temperature_celsius": lambda: pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU),
    }
    sample = {}
    for name, reading in readings.items():
        try:
            sample[name] = float(reading())
        except (pynvml.NVMLError, AttributeError):
            continue
    return sample


def _throttles(handle: Any) -> set[str] | None:
    import pynvml

    try:
        bits = pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
    except (pynvml.NVMLError, AttributeError):
        return None
    return {name for bit, name in THROTTLES.items() if bits & bit}


def _other_processes(handle: Any) -> int | None:
    """Compute processes on the card beside this one, which has its context by now."""
    import pynvml

    try:
        return max(0, len(pynvml.nvmlDeviceGetComputeRunningProcesses(handle)) - 1)
    except (pynvml.NVMLError, AttributeError):
        return None
