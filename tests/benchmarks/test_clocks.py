"""CPU time is that of all who work for this process, and GPU readings are honest where there is no GPU."""

import multiprocessing
import sys
import time
import types
from typing import Any

import torch

from benchmarks import gpu, throughput
from benchmarks.clocks import cpu_seconds, looking_on, wait_until_idle
from benchmarks.gpu import EnergyMeter, GpuSampler, sentence
from benchmarks.source import Contender
from benchmarks.throughput import CPU, ENERGY, RATE, _window


def burn(seconds, ready):
    while time.process_time() < seconds:
        pass
    ready.set()
    time.sleep(60)


def test_cpu_time_of_a_worker_counts():
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    before = cpu_seconds()
    worker = context.Process(target=burn, args=(0.3, ready))
    worker.start()
    try:
        assert ready.wait(60)
        assert cpu_seconds() - before >= 0.25
    finally:
        worker.kill()
        worker.join()


def test_cpu_time_of_who_looks_on_does_not_count():
    before, spent = cpu_seconds(), time.thread_time()
    with looking_on():
        while time.thread_time() - spent < 0.3:
            pass
    assert cpu_seconds() - before < 0.2


def test_an_idle_process_is_not_waited_for():
    started = time.perf_counter()
    wait_until_idle(torch.device("cpu"))
    assert time.perf_counter() - started < 10


def test_without_a_gpu_the_sampler_says_so():
    with GpuSampler(torch.device("cpu")) as sampler:
        pass
    assert sampler.summary() == {"available": False, "reason": "the benchmark ran on the CPU"}
    assert sentence(sampler.summary()) == "no GPU readings: the benchmark ran on the CPU"


def test_without_pynvml_the_sampler_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)  # as if not installed
    with GpuSampler(torch.device("cuda")) as sampler:
        pass
    assert "pip install nvidia-ml-py" in sentence(sampler.summary())


def test_joules_are_the_cards_own_count(monkeypatch):
    nvml: Any = types.ModuleType("pynvml")
    nvml.NVMLError, nvml.nvmlDeviceGetTotalEnergyConsumption = OSError, lambda handle: 12_500  # mJ
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(gpu, "_handle", lambda device: (object(), ""))
    assert EnergyMeter(torch.device("cuda")).joules() == 12.5
    del nvml.nvmlDeviceGetTotalEnergyConsumption  # a card or a binding without it
    assert EnergyMeter(torch.device("cuda")).joules() is None
    assert EnergyMeter(torch.device("cpu")).joules() is None


def test_a_window_of_batches_counts_images_and_energy(monkeypatch):
    class Source:
        in_flight, burst, settings = 1, 1, {}

        def batches(self):
            while True:
                yield 4

        def close(self):
            pass

    class Meter(EnergyMeter):
        def joules(self):
            self.spent = getattr(self, "spent", 0.0) + 2.0
            return self.spent

    cpu = torch.device("cpu")
    contender = Contender("group", "name", Source())
    assert ENERGY not in _window(contender, 0.0, 3, cpu, Meter(cpu))  # too short for the card's counter
    monkeypatch.setattr(throughput, "LEAST_SECONDS", 0.0)
    window = _window(contender, 0.0, 3, cpu, Meter(cpu))
    assert window[ENERGY] == 3 * 4 / 2.0
    assert window.keys() == {RATE, CPU, ENERGY}
    assert ENERGY not in _window(contender, 0.0, 3, cpu, EnergyMeter(cpu))


def test_readings_become_a_sentence():
    summary = {"available": True, "mean": {"power_watts": 512.5}, "throttled": ["power cap"], "other_processes": 2}
    assert sentence(summary) == (
        "GPU over the whole command, building and compiling included, on average: power watts 512.5; "
        "held back by: power cap; 2 other processes on the card"
    )
    silent = {"available": True, "mean": {"power_watts": 512.5}, "throttled": None, "other_processes": None}
    assert sentence(silent).endswith("on average: power watts 512.5")
    assert sentence({**silent, "throttled": []}).endswith("; never held back")


def test_the_sampler_takes_what_a_driver_tells_and_leaves_out_the_rest(monkeypatch):
    class Nvml(types.ModuleType):
        NVMLError = OSError
        NVML_CLOCK_SM = NVML_TEMPERATURE_GPU = 0

        def __getattr__(self, name):
            answers: dict[str, Any] = {
                "nvmlDeviceGetUtilizationRates": types.SimpleNamespace(gpu=90, memory=40),
                "nvmlDeviceGetMemoryInfo": types.SimpleNamespace(used=5e9),
                "nvmlDeviceGetPowerUsage": 300_000,
                "nvmlDeviceGetClockInfo": 1500,
                "nvmlDeviceGetTemperature": 60,
                "nvmlDeviceGetCurrentClocksThrottleReasons": 0x1 | 0x4,  # idle is no throttle, the power cap is
                "nvmlDeviceGetComputeRunningProcesses": [1, 2, 3],
            }
            if name not in answers:
                raise AttributeError(name)  # as an old binding for the JPEG engine
            return lambda *_: answers[name]

    monkeypatch.setitem(sys.modules, "pynvml", Nvml("pynvml"))
    monkeypatch.setattr(gpu, "_handle", lambda device: (object(), ""))
    monkeypatch.setattr(gpu, "INTERVAL_SECONDS", 0.01)
    with GpuSampler(torch.device("cuda")) as sampler:
        time.sleep(0.3)
    summary = sampler.summary()
    assert summary["available"]
    assert summary["samples"] > 1
    assert summary["mean"] == {
        "utilisation_percent": 90.0,
        "memory_utilisation_percent": 40.0,
        "memory_used_gb": 5.0,
        "power_watts": 300.0,
        "sm_clock_mhz": 1500.0,
        "temperature_celsius": 60.0,
    }
    assert summary["throttled"] == ["power cap"]
    assert summary["other_processes"] == 2
