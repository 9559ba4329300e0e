"""The report on a machine: what is absent is said and never ends it; what is there is told as the driver tells it."""

import io
import sys
import types
from typing import Any

import pytest
import torch
from rich.console import Console

from benchmarks import doctor
from benchmarks.doctor import Finding


class Nvml(types.ModuleType):
    """Two cards: the first with a JPEG engine and another's process on it, the second with neither."""

    class NVMLError(Exception):
        pass

    def __init__(self, **answers: Any) -> None:
        super().__init__("pynvml")
        self.answers = {
            "nvmlInit": lambda: None,
            "nvmlSystemGetDriverVersion": lambda: b"550.54",
            "nvmlSystemGetCudaDriverVersion": lambda: 12040,
            "nvmlDeviceGetCount": lambda: 2,
            "nvmlDeviceGetHandleByIndex": lambda i: i,
            "nvmlDeviceGetJpgUtilization": self.jpeg,
            "nvmlDeviceGetComputeRunningProcesses": lambda handle: [1] if handle == 0 else [],
            **answers,
        }

    def jpeg(self, handle):
        if handle:
            raise self.NVMLError("Not Supported")
        return 0, 0

    def __getattr__(self, name):
        return self.__dict__["answers"][name]


@pytest.fixture
def cards(monkeypatch):
    """cards(capability): torch sees that many GPUs of that compute capability."""

    def seen(count=1, capability=(9, 0)):
        properties = types.SimpleNamespace(
            name="NVIDIA X", total_memory=141e9, major=capability[0], minor=capability[1]
        )
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: properties)

    return seen


def texts(findings):
    return {f.name: (f.state, f.text) for f in findings}


def test_this_machine_is_examined():
    found = texts(doctor.examine())
    assert {"machine", "versions", "torch", "DALI", "compiler", "Triton"} <= found.keys()
    assert torch.__version__ in found["torch"][1]
    assert not any("could not be asked" in text for _, text in found.values())


def test_without_a_gpu_everything_that_follows_is_said(cards):
    cards(count=0)
    (gpu,) = doctor.gpus()
    assert gpu.state == "slow"
    assert "on the CPU" in gpu.text


@pytest.mark.parametrize(("capability", "state"), [((9, 0), "ok"), ((7, 5), "slow")])
def test_an_old_card_has_no_bf16(cards, capability, state):
    cards(capability=capability)
    (gpu,) = doctor.gpus()
    assert gpu.state == state
    assert ("no bf16" in gpu.text) == (state == "slow")


def test_what_the_driver_tells_of_each_card(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", Nvml())
    found = texts(doctor.nvml())
    assert found["NVML"] == ("ok", "driver 550.54, good for CUDA 12.4")
    assert found["JPEG engine 0"][0] == "ok"
    assert found["JPEG engine 1"][0] == "note"
    assert "1 compute processes" in found["card 0"][1]
    assert "card 1" not in found


def test_a_driver_that_is_not_there_and_a_binding_that_is_not(monkeypatch, cards):
    def absent():
        raise Nvml.NVMLError("Driver Not Loaded")

    cards(count=1)
    monkeypatch.setitem(sys.modules, "pynvml", Nvml(nvmlInit=absent))
    (finding,) = doctor.nvml()
    assert finding.state == "missing"
    assert "Driver Not Loaded" in finding.text
    monkeypatch.setitem(sys.modules, "pynvml", None)  # as if not installed
    (finding,) = doctor.nvml()
    assert "pip install nvidia-ml-py" in finding.text


def test_no_compiler_costs_speed_and_says_which(monkeypatch, tmp_path):
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    finding = doctor.compiler()
    assert finding.state == "slow"
    assert "compiler" in finding.text


def test_without_a_c_compiler_a_gpu_has_no_fused_augmentation(monkeypatch, cards):
    cards(count=1)
    monkeypatch.setenv("CC", "/nowhere/cc")
    finding = doctor.triton()
    assert finding.state == "slow"
    assert "no C compiler (/nowhere/cc)" in finding.text


def test_a_check_that_breaks_leaves_the_others_alone(monkeypatch):
    def broken():
        raise RuntimeError("CUDA driver initialization failed\nwith a second line")

    monkeypatch.setattr(doctor, "gpus", broken)
    found = texts(doctor.examine())
    assert found["GPU"] == ("missing", "could not be asked: RuntimeError: CUDA driver initialization failed")
    assert "Triton" in found


def test_the_last_line_names_what_to_look_at():
    said = io.StringIO()
    findings = [Finding("a", "ok", "fine"), Finding("b", "slow", "[brackets] stay"), Finding("c", "note", "n")]
    doctor.show(findings, Console(file=said, width=120))
    assert "[brackets] stay" in said.getvalue()
    assert said.getvalue().splitlines()[-1] == "To look at: b."


def test_the_command(capsys):
    assert doctor.main([]) == 0
    assert "DALI" in capsys.readouterr().out
