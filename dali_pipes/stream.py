"""Runs a DALI pipeline ahead of its reader, and keeps account of what is under way."""

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dali_pipes.graph import build_pipeline
from dali_pipes.plan import Plan, Position

_PREFETCH = 2  # batches ready or in work while the reader uses another one


class BrokenBatch(RuntimeError):
    """DALI could not produce the batch of `rows`, or one of those read ahead, which are at the end of `rows`."""

    def __init__(self, rows: NDArray[np.int64], reason: str) -> None:
        super().__init__(reason)
        self.rows = rows


class Stream:
    """Hands out the batch of any position; asked for them in order, it has the next ones under way.

    The pipeline is built at first use, runs on across epochs, and is built anew only after a failure: what a jump
    leaves in flight is waited for and dropped.
    """

    def __init__(self, plan: Plan, device: torch.device, output: str, num_threads: int) -> None:
        self._plan, self._device, self._output, self._num_threads = plan, device, output, num_threads
        self._feed = _Feed(plan)
        self._pipeline: Any = None

    def take(self, position: Position) -> tuple[NDArray[np.int64], tuple[torch.Tensor, ...]]:
        """The rows of that batch and its views: (N, size, size, 3) tensors that are DALI's own memory.

        On CUDA the tensors are ready for work queued on torch's current stream; the host does not wait for them.

        Raises:
            BrokenBatch: DALI failed on this batch. The stream stays usable.
        """
        under_way = self._feed.under_way
        if under_way and (under_way[0][0] != position or not self._plan.failed.isdisjoint(under_way[0][1].tolist())):
            self._drop()  # read ahead for another position, or before one of its images was known to have failed
        if not under_way:
            self._feed.next = position
        if self._pipeline is None:
            self._pipeline = self._build()
        try:
            self._run_ahead()
            outputs = self._outputs()
            _, rows = under_way.popleft()
            self._run_ahead()
        except RuntimeError as error:
            ahead = [rows for _, rows in under_way]
            self.close()
            raise BrokenBatch(np.concatenate([self._plan.rows(position), *ahead]), str(error)) from None
        except BaseException:  # a Ctrl-C between feeding and running: the account no longer holds
            self.close()
            raise
        return rows, tuple(torch.from_dlpack(batch.as_tensor()) for batch in outputs)

    def close(self) -> None:
        """Free the pipeline, its threads and its memory; tensors that were handed out stay valid."""
        self._feed.under_way.clear()
        self._pipeline = None

    def _build(self) -> Any:
        return build_pipeline(
            self._feed,
            self._plan.names(),
            self._plan.specs,
            batch_size=self._plan.batch_size,
            device=self._device,
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
        cuda = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        return self._pipeline.outputs(cuda_stream=cuda)

    def _drop(self) -> None:
        try:
            while self._feed.under_way:
                self._outputs()
                self._feed.under_way.popleft()
        except RuntimeError:  # of a batch that nobody wants: no news, but the pipeline is gone
            self.close()


class _Feed:
    """DALI's external source. Not a part of `Stream`, so that no cycle keeps a dropped pipeline alive."""

    def __init__(self, plan: Plan) -> None:
        self.next = Position(0, 0)
        self.under_way: deque[tuple[Position, NDArray[np.int64]]] = deque()
        self._plan = plan

    def __call__(self) -> Sequence[Any]:
        position, self.next = self.next, self._plan.after(self.next)
        rows = self._plan.rows(position)
        inputs = self._plan.inputs(rows, position.epoch)
        self.under_way.append((position, rows))
        return inputs
