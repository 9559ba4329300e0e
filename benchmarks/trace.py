"""What a trace of torch.profiler says of the device: which stream was busy when, and with what."""

import json
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch

_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
_RANGE = "gpu_user_annotation"  # a record_function range, as long as its kernels ran, on the stream they ran on

# Of kernels beside the training stream, by what their names hold; the first that fits. DALI's kernels and nvJPEG's
# carry their namespace, the fused kernels their Python name (dali_pipes/fused_kernels.py).
KINDS = {
    "communication": ("nccl",),
    "decode": ("jpeg", "nvimgcodec", "huffman", "idct"),
    "augmentation": ("dali", "gray_sum", "colour", "blur"),
    "copies": ("memcpy", "memset"),
}
OTHER = "other kernels"
Stretch = tuple[float, float]  # from, to, in microseconds


@dataclass(frozen=True)
class Span:
    """One piece of work on one stream; times in microseconds."""

    name: str
    stream: int
    start: float
    stop: float


@dataclass(frozen=True)
class Trace:
    """The device's work, and the named ranges on its streams."""

    work: tuple[Span, ...]
    ranges: tuple[Span, ...]

    @classmethod
    def read(cls, file: Path) -> Self:
        """What `torch.profiler` exported; a trace of the CPU alone is empty."""
        events = [e for e in json.loads(file.read_text())["traceEvents"] if e.get("ph") == "X"]
        return cls(_spans(events, _WORK), _spans(events, (_RANGE,)))

    def training_stream(self, names: Iterable[str]) -> int | None:
        """The stream that carries ranges of these names."""
        wanted = set(names)
        return next((span.stream for span in self.ranges if span.name in wanted), None)


def _spans(events: Sequence[dict], categories: Sequence[str]) -> tuple[Span, ...]:
    return tuple(
        Span(e["name"], int(e.get("args", {}).get("stream", e["tid"])), e["ts"], e["ts"] + e["dur"])
        for e in events
        if e.get("cat") in categories
    )


@dataclass(frozen=True)
class Beside:
    """What one kind of work beside the training stream took, and the share of it while that stream was busy as well.
    The two share the device, so what is hidden may still have slowed the training down.
    """

    milliseconds: float
    hidden: float  # 0 to 1: while the training stream was busy


def beside(trace: Trace, training: int) -> dict[str, Beside]:
    """Work on all other streams by kind, the kinds that occur, in the order of `KINDS`."""
    busy = union(span for span in trace.work if span.stream == training)
    kinds: dict[str, list[Span]] = {kind: [] for kind in (*KINDS, OTHER)}
    for span in trace.work:
        if span.stream != training:
            kinds[_kind(span.name)].append(span)
    found = {}
    for kind, spans in kinds.items():
        stretches = union(spans)
        if total := length(stretches):
            found[kind] = Beside(total / 1000, length(common(stretches, busy)) / total)
    return found


def _kind(name: str) -> str:
    lower = name.lower()
    return next((kind for kind, marks in KINDS.items() if any(mark in lower for mark in marks)), OTHER)


def union(spans: Iterable[Span]) -> list[Stretch]:
    """The times at which at least one of them ran, in order and apart."""
    stretches: list[Stretch] = []
    for start, stop in sorted((span.start, span.stop) for span in spans):
        if stretches and start <= stretches[-1][1]:
            stretches[-1] = (stretches[-1][0], max(stop, stretches[-1][1]))
        else:
            stretches.append((start, stop))
    return stretches


def common(left: Sequence[Stretch], right: Sequence[Stretch]) -> list[Stretch]:
    """The times that are in both; each in order and apart."""
    found, i, j = [], 0, 0
    while i < len(left) and j < len(right):
        start, stop = max(left[i][0], right[j][0]), min(left[i][1], right[j][1])
        if start < stop:
            found.append((start, stop))
        if left[i][1] < right[j][1]:
            i += 1
        else:
            j += 1
    return found


def length(stretches: Iterable[Stretch]) -> float:
    """Their sum, in microseconds."""
    return sum(stop - start for start, stop in stretches)


def device_milliseconds(work: Callable[[], None], device: torch.device) -> float:
    """How long the device was busy with the kernels and copies that `work` queues, on whichever stream; CUDA only. What
    the JPEG engine does is in no trace.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(file))
        return length(union(Trace.read(file).work)) / 1000
