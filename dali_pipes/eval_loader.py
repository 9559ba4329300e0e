"""What the evaluation iterates over."""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from dali_pipes.failures import Salvager
from dali_pipes.graph import Decoder
from dali_pipes.index import DatasetError, DatasetIndex
from dali_pipes.loader import available, check_arguments
from dali_pipes.plan import EvalPlan, Position
from dali_pipes.stream import Stream


@dataclass(frozen=True)
class EvalBatch:
    """N images, float32 (N, 3, crop, crop), channels_last strides, normalised, on the loader's device.

    `labels`: int64 (N,) on the same device. `indices`: int64 (N,), rows of the index, on the CPU.
    """

    images: torch.Tensor
    labels: torch.Tensor
    indices: torch.Tensor


class EvalLoader:
    """Each image once a pass, with its label: for k-NN, linear probe and fine-tuning.

    `train=False`: in the index's order, shorter side resized to `resize`, centre `crop`, as torchvision's `Resize` and
    `CenterCrop`; the ranks' shares are disjoint and complete, so some ranks may hold one image more.
    `train=True`: in the epoch's order, random resized crop (area 0.08 to 1) and flip, pure functions of
    (seed, epoch, index row); every rank holds as many images, so that ranks stay in step: the
    len(index) % world_size images at the end of the permutation sit out that epoch. `resize` has no meaning then.

    An image that passed the scan and cannot be used is reported once, by a line to `on_failed`, and left out; with
    `train=True` another one stands in, so that the ranks' batches stay of one size. At most `max_failed` may fail
    on each rank (default: `failures.tolerated`).

    Each iteration starts at the beginning of a pass; the last batch may be smaller. With `train=True` call `set_epoch`
    before each pass, as with torch's DistributedSampler: without it every pass is the same.

    Raises:
        ValueError: an argument is out of range.
        DatasetError: fewer images than ranks; while iterating: too many images failed, or all of this rank's, or DALI
            did on good ones.
    """

    def __init__(
        self,
        index: DatasetIndex,
        batch_size: int,
        resize: int = 256,
        crop: int = 224,
        train: bool = False,
        rank: int = 0,
        world_size: int = 1,
        device: str | torch.device = "cpu",
        seed: int = 0,
        num_threads: int = 4,
        jpeg_engine: bool = True,
        max_failed: int | None = None,
        on_failed: Callable[[str], None] = warnings.warn,
    ) -> None:
        check_arguments(batch_size, rank, world_size, num_threads)
        if crop < 1 or (not train and crop > resize):
            raise ValueError(f"crop {crop} does not fit into images resized to {resize}; use at most {resize}")
        if len(index) < world_size:
            raise DatasetError(
                f"{len(index)} images are too few for {world_size} ranks; use at most {len(index)} ranks"
            )
        self._index = index
        device = available(device)
        self._plan = EvalPlan(index, resize, crop, train, seed, batch_size, rank, world_size)
        decoder = Decoder.of(index, device, batch_size, jpeg_engine)
        self._stream = Stream(self._plan, device, decoder, "float32", num_threads)
        consequence = "another image stands in" if train else "so it is left out"
        self._salvager = Salvager(self._stream, self._plan, on_failed, consequence, max_failed)
        self._epoch = 0

    def __len__(self) -> int:
        """Batches in a pass of this rank, the last and perhaps smaller one included."""
        return self._plan.steps

    def __iter__(self) -> Iterator[EvalBatch]:
        epoch, own = self._epoch, None if self._plan.train else self._plan.own(0)
        for step in range(len(self)):
            rows, (images,) = self._salvager.take(Position(epoch, step))
            if own is not None:  # what stands in is for training only
                place = step * self._plan.batch_size
                kept = np.flatnonzero(rows == own[place : place + len(rows)])
                if not len(kept):
                    continue
                if len(kept) < len(rows):
                    rows, images = rows[kept], images[torch.from_numpy(kept).to(images.device)]
            labels = torch.from_numpy(self._index.labels[rows]).to(images.device, non_blocking=True)
            yield EvalBatch(images, labels, torch.from_numpy(rows))

    def set_epoch(self, epoch: int) -> None:
        """The order and the crops of the next pass, with `train=True`; no effect otherwise."""
        if epoch < 0:
            raise ValueError(f"epoch {epoch} is below 0")
        self._epoch = epoch if self._plan.train else 0

    def close(self) -> None:
        """Free the pipeline; iterating again builds a new one."""
        self._stream.close()
