"""Runs a DALI pipeline ahead of its reader, and keeps account of what is under way."""

import re
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import backend

from dali_pipes.fused import FusedViews
from dali_pipes.graph import Decoder, build_pipeline, decode
from dali_pipes.plan import Plan, Position
from dali_pipes.sampling import SampleParams

_PREFETCH = 2  # batches ready or in work while the reader uses another one
# DALI's words, and those of the libraries that it passes on: it has no type for it.
# A decoder that has none may also go to the CPU and say nothing.
_NO_MEMORY = re.compile(
    r"Can't allocate \d+ bytes on device|CUDA allocation failed|cudaErrorMemoryAllocation|CUDA_ERROR_OUT_OF_MEMORY"
)


@dataclass(frozen=True, eq=False)
class _Batch:
    """A batch under way: what was asked of DALI, and what is still to be done with its crops."""

    position: Position
    rows: NDArray[np.int64]
    drawn: tuple[SampleParams, ...]  # for each view


class BrokenBatch(RuntimeError):
    """DALI could not produce the batch of `rows`, or one of those read ahead, which are at the end of `rows`."""

    def __init__(self, rows: NDArray[np.int64], reason: str) -> None:
        super().__init__(reason)
        self.rows = rows


class LoaderOutOfMemory(torch.OutOfMemoryError):
    """The device has too little memory left for the images of a batch, beside what else is on it."""


class Stream:
    """Hands out the batch of any position; asked for them in order, it has the next ones under way.

    The pipeline is built at first use, runs on across epochs, and is built anew only after a failure: what a jump
    leaves in flight is waited for and dropped. With a plan of crops only, `fused` makes the views of them.
    """

    def __init__(
        self,
        plan: Plan,
        device: torch.device,
        decoder: Decoder,
        output: str,
        num_threads: int,
        fused: FusedViews | None = None,
    ) -> None:
        self._plan, self._device, self._output, self._num_threads = plan, device, output, num_threads
        self._decoder, self._fused = decoder, fused
        self._feed = _Feed(plan)
        self._pipeline: Any = None

    def take(self, position: Position) -> tuple[NDArray[np.int64], tuple[torch.Tensor, ...]]:
        """The rows of that batch and its views: (N, 3, size, size) with channels_last strides, DALI's own memory.

        On CUDA the tensors are ready for work queued on torch's current stream; the host does not wait for them.

        Raises:
            BrokenBatch: DALI failed on this batch. The stream stays usable.
            LoaderOutOfMemory: DALI found too little memory on the device.
        """
        under_way = self._feed.under_way
        if under_way and (
            under_way[0].position != position or not self._plan.failed.isdisjoint(under_way[0].rows.tolist())
        ):
            self._drop()  # read ahead for another position, or before one of its images was known to have failed
        if not under_way:
            self._feed.next = position
        if self._pipeline is None:
            with _memory_told():  # the decoder sets memory aside
                self._pipeline = self._build()
        try:
            with _memory_told():
                self._run_ahead()
                outputs = self._outputs()
                batch = under_way.popleft()
                self._run_ahead()
        except LoaderOutOfMemory:
            self.close()
            raise
        except RuntimeError as error:
            ahead = [batch.rows for batch in under_way]
            self.close()
            raise BrokenBatch(np.concatenate([self._plan.rows(position), *ahead]), str(error)) from None
        except BaseException:  # a Ctrl-C between feeding and running: the account no longer holds
            self.close()
            raise
        return batch.rows, self._views(outputs, batch)

    def _views(self, outputs: Sequence[Any], batch: _Batch) -> tuple[torch.Tensor, ...]:
        # Out of `take`'s try block: what fails here is none of DALI's failures.
        with torch.cuda.stream(self._consumer()):
            images = tuple(torch.from_dlpack(output.as_tensor()) for output in outputs)
        if self._fused is not None:
            return self._fused(images, batch.drawn)
        return tuple(image.permute(0, 3, 1, 2) for image in images)

    def decode(self, paths: Sequence[str]) -> list[NDArray[np.uint8]]:
        """The pixels of some files, decoded as this stream's by a pipeline of their own.

        Raises:
            RuntimeError: DALI failed on one of them.
            LoaderOutOfMemory: it found too little memory on the device.
        """
        with _memory_told():
            return decode(paths, self._device, self._decoder.jpeg_engine)

    def close(self) -> None:
        """Free the pipeline, its threads and its memory; tensors that were handed out stay valid."""
        self._feed.under_way.clear()
        self._pipeline = None
        with suppress(RuntimeError):  # after an error of the GPU, which is told elsewhere
            if self._fused is not None:
                self._fused.release()
            if self._device.type == "cuda":
                release_memory()

    def _build(self) -> Any:
        return build_pipeline(
            self._feed,
            self._plan.names(),
            self._plan.specs,
            batch_size=self._plan.batch_size,
            device=self._device,
            decoder=self._decoder,
            crops_only=self._plan.crops_only,
            output=self._output,
            num_threads=self._num_threads,
            prefetch=_PREFETCH,
        )

    def _run_ahead(self) -> None:
        # schedule_run queues `_PREFETCH` batches at its first call and one at each later call.
        while len(self._feed.under_way) < _PREFETCH:
            self._pipeline.schedule_run()

    def _outputs(self) -> Sequence[Any]:
        # Given a stream, DALI makes it wait for the batch; DALIGenericIterator gives none, and the host waits.
        stream = self._consumer()
        if stream is None:
            return self._pipeline.outputs()
        with torch.cuda.device(self._device):  # of which it takes a default stream to be
            return self._pipeline.outputs(cuda_stream=stream)

    def _consumer(self) -> torch.cuda.Stream | None:
        """The stream that first reads what DALI made; None on the CPU."""
        if self._device.type != "cuda":
            return None
        return torch.cuda.current_stream(self._device) if self._fused is None else self._fused.stream

    def _drop(self) -> None:
        try:
            while self._feed.under_way:
                self._outputs()
                self._feed.under_way.popleft()
        except RuntimeError:  # of a batch that nobody wants: no news, but the pipeline is gone
            self.close()


def release_memory() -> None:
    """Give back to the devices what DALI keeps of pipelines that are gone, for torch and others to use."""
    backend.ReleaseUnusedMemory()  # type: ignore[attr-defined,unused-ignore]


@contextmanager
def _memory_told() -> Iterator[None]:
    """Raises LoaderOutOfMemory for what DALI has words only."""
    try:
        yield
    except RuntimeError as error:
        if _NO_MEMORY.search(str(error)):
            raise LoaderOutOfMemory(str(error)) from None
        raise


class _Feed:
    """DALI's external source. Not a part of `Stream`, so that no cycle keeps a dropped pipeline alive."""

    def __init__(self, plan: Plan) -> None:
        self.next = Position(0, 0)
        self.under_way: deque[_Batch] = deque()
        self._plan = plan

    def __call__(self) -> Sequence[Any]:
        position, self.next = self.next, self._plan.after(self.next)
        rows = self._plan.rows(position)
        drawn = self._plan.draw(rows, position.epoch)
        inputs = self._plan.inputs(rows, drawn)
        self.under_way.append(_Batch(position, rows, drawn))
        return inputs
