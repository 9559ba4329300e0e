"""What a trace says of the streams, on traces written by hand, and on one that the profiler wrote."""

import json

import pytest
import torch

from benchmarks.trace import Trace, beside, common, length, union

TRAINING, DALI, NCCL = 7, 13, 21


def event(name, stream, start, duration, category="kernel"):
    """As torch.profiler writes it, without what is not read."""
    event = {"ph": "X", "cat": category, "name": name, "pid": 0, "tid": stream, "ts": start, "dur": duration}
    return event if category == "gpu_user_annotation" else event | {"args": {"device": 0, "stream": stream}}


@pytest.fixture
def trace(tmp_path):
    """One step: the training stream works from 0 to 600 and from 700 to 1000 µs."""
    events = [
        event("forward q", TRAINING, 0, 600, "gpu_user_annotation"),
        event("nccl:all_reduce", NCCL, 650, 200, "gpu_user_annotation"),
        event("sm90_gemm", TRAINING, 0, 400),
        event("void at::native::elementwise", TRAINING, 400, 200),
        event("flash_bwd", TRAINING, 700, 300),
        event("nvjpeg::decode", DALI, 500, 300),  # 200 of 300 meet the training stream's work
        event("void dali::kernels::resize", DALI, 610, 80),  # none does
        event("_colour_kernel", 15, 100, 50),
        event("ncclDevKernel_AllReduce", NCCL, 650, 200),  # 150 of 200
        event("Memcpy HtoD", DALI, 20, 10, "gpu_memcpy"),
        event("mystery", DALI, 1100, 10),
        {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "pid": 1, "tid": 1, "ts": 0, "dur": 5000},
        {"ph": "i", "cat": "kernel", "name": "an instant", "ts": 0},
    ]
    file = tmp_path / "trace.json"
    file.write_text(json.dumps({"traceEvents": events}))
    return Trace.read(file)


def test_work_beside_the_training_stream_by_kind_and_hidden_share(trace):
    training = trace.training_stream(["data wait", "forward q"])
    assert training == TRAINING
    found = beside(trace, training)
    assert list(found) == ["communication", "decode", "augmentation", "copies", "other kernels"]
    assert [each.milliseconds for each in found.values()] == pytest.approx([0.2, 0.3, 0.13, 0.01, 0.01])
    assert [each.hidden for each in found.values()] == pytest.approx([150 / 200, 200 / 300, 50 / 130, 1, 0])


def test_device_time_counts_what_overlaps_once(trace):
    assert length(union(trace.work)) == 1000 + 10


def test_stretches():
    assert common([(0, 10), (20, 30)], [(5, 22), (25, 26)]) == [(5, 10), (20, 22), (25, 26)]
    assert common([(0, 10)], [(10, 20)]) == []


def test_a_trace_of_the_cpu_holds_no_device(tmp_path):
    file = tmp_path / "trace.json"
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        torch.ones(3) + 1
    profiler.export_chrome_trace(str(file))
    trace = Trace.read(file)
    assert trace == Trace((), ())
    assert trace.training_stream(["forward q"]) is None
