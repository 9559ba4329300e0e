"""What the trainer and the evaluation iterate over."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dali_pipes.failures import gone_bad, tolerated, too_many
from dali_pipes.graph import OUTPUTS
from dali_pipes.index import DatasetError, DatasetIndex
from dali_pipes.plan import EvalPlan, Position, ViewPlan
from dali_pipes.stream import BrokenBatch, Stream
from dali_pipes.views import MOCO_V3, Recipe


@dataclass(frozen=True)
class Batch:
    """N images in the recipe's views.

    `views`: one tensor a view, (N, 3, S, S) with channels_last strides, on the loader's device; uint8 RGB in [0, 255],
    or normalised float16 or float32. `indices`: int64 (N,), rows of the index, on the CPU.
    """

    views: tuple[torch.Tensor, ...]
    indices: torch.Tensor


@dataclass(frozen=True)
class EvalBatch:
    """N images, float32 (N, 3, crop, crop), channels_last strides, normalised, on the loader's device.

    `labels`: int64 (N,) on the same device. `indices`: int64 (N,), rows of the index, on the CPU.
    """

    images: torch.Tensor
    labels: torch.Tensor
    indices: torch.Tensor


class ViewLoader:
    """Augmented views of every image, epoch after epoch, from any position on.

    Iterating yields the batches from the current position to the end of its epoch; the position is then the start of
    the next epoch, so that iterating again goes on there, with or without `set_epoch`. A loop that was left early goes
    on with the batch after the last one it was given. Batches of the next epoch are under way before this one ends.

    Each rank gets `len(loader)` full batches an epoch; the images that are left over, fewer than
    batch_size x world_size, are other ones in every epoch. Which images meet in global batch s and how they are
    augmented depends on `seed`, the recipe and batch_size x world_size alone.

    An image whose file went bad since the scan is reported once, and in its place stands the image one global batch
    further in the epoch's order (`order.replace_failed`): no other place changes. `failed` lists the rows: those that
    this rank met, and those that the caller passed on from other ranks by `add_failed`.

    Args:
        index: the images.
        recipe: the views.
        batch_size: of this rank.
        seed: of the order and of every random number.
        rank: of this process, below `world_size`.
        world_size: number of processes that share the epoch.
        device: "cpu", or "cuda" or "cuda:0": then decoding and augmentation run there.
        image_size: scales the recipe to views of this size (`Recipe.scaled`).
        output: "uint8": RGB, not normalised; "float16", "float32": normalised with ImageNet's mean and deviation.
        num_threads: DALI's threads of this process.
        max_failed: images that may go bad before the loader stops (default: `failures.tolerated`, a thousandth of the
            index and at least 10); 0 stops at the first.
        on_failed: called with one line for each image that is found bad.

    Raises:
        DatasetError: a batch is larger than this rank's share; while iterating: too many images went bad, or DALI
            failed on good ones.
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        index: DatasetIndex,
        recipe: Recipe = MOCO_V3,
        batch_size: int = 64,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        device: str | torch.device = "cpu",
        image_size: int = 224,
        output: str = "uint8",
        num_threads: int = 4,
        max_failed: int | None = None,
        on_failed: Callable[[str], None] = warnings.warn,
    ) -> None:
        _check_arguments(batch_size, rank, world_size, num_threads)
        if output not in OUTPUTS:
            raise ValueError(f"output {output!r} is none of {', '.join(OUTPUTS)}")
        share = len(index) // world_size
        if batch_size > share:
            raise DatasetError(
                f"batch size {batch_size} a rank is more than a rank's share of {share} images "
                f"({len(index)} images, {world_size} ranks); "
                + (f"use at most {share}" if share else f"use at most {len(index)} ranks")
            )
        self._plan = ViewPlan(index, recipe.scaled(image_size).views, seed, batch_size, rank, world_size)
        self._stream = Stream(self._plan, _device(device), output, num_threads)
        self._index, self._position = index, Position(0, 0)
        self._global_batch = batch_size * world_size
        self._max_failed = tolerated(len(index)) if max_failed is None else max_failed
        self._on_failed = on_failed

    def __len__(self) -> int:
        """Full batches in an epoch, the same for every rank."""
        return self._plan.steps

    def __iter__(self) -> Iterator[Batch]:
        epoch = self._position.epoch
        while self._position.epoch == epoch:
            rows, views = self._take()
            # The position moves before the batch is handed over: a state taken in the loop's body goes on behind it.
            self._position = self._plan.after(self._position)
            yield Batch(tuple(view.permute(0, 3, 1, 2) for view in views), torch.from_numpy(rows))

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of that epoch; within the current epoch the position stays.

        So the usual loop, `for epoch in …: loader.set_epoch(epoch)`, also goes on in the middle of an epoch after
        `load_state_dict`. To start the current epoch again, load {**loader.state_dict(), "step": 0}.
        """
        if epoch < 0:
            raise ValueError(f"epoch {epoch} is below 0")
        if epoch != self._position.epoch:
            self._position = Position(epoch, 0)

    @property
    def failed(self) -> list[int]:
        """Rows of the index that are known to have gone bad since the scan, sorted."""
        return sorted(self._plan.failed)

    def add_failed(self, rows: Iterable[int]) -> None:
        """Also treat these rows as failed, such as other ranks met; what they stand in is made anew.

        Raises:
            DatasetError: these are too many.
        """
        news = set(rows) - self._plan.failed
        if news:
            self._fail(news, f"one of them is {self._index.path(min(news))}")

    def state_dict(self) -> dict[str, Any]:
        """The position of the next batch and what failed: {"epoch", "step", "global_batch", "failed"}.

        The same on every rank, as far as the ranks have shared what failed.
        """
        position = {"epoch": self._position.epoch, "step": self._position.step, "global_batch": self._global_batch}
        return {**position, "failed": self.failed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position; the next batch is the very one that an uninterrupted run would give there.

        The number of ranks may be another one, as long as the global batch is the same. A state without "failed" is of
        a run in which no image failed.

        Raises:
            ValueError: the position is of another global batch size, or past the end of an epoch; or a failed row is
                none of this index.
        """
        epoch, step, global_batch = state["epoch"], state["step"], state["global_batch"]
        if global_batch != self._global_batch:
            raise ValueError(
                f"the position was saved at global batch {global_batch}, this loader's is {self._global_batch}; "
                "steps of different sizes do not compare"
            )
        if epoch < 0 or not 0 <= step < len(self):
            raise ValueError(f"epoch {epoch}, step {step} is no position in epochs of {len(self)} steps")
        failed = frozenset(state.get("failed", ()))
        if not all(0 <= row < len(self._index) for row in failed):
            raise ValueError(f"failed images {sorted(failed)} are not all rows of an index of {len(self._index)}")
        if failed != self._plan.failed:
            self._stream.close()  # what is under way was chosen with other failed images in mind
            self._plan.fail(failed)
        self._position = Position(epoch, step)

    def close(self) -> None:
        """Free the pipeline; iterating again builds a new one at the same position."""
        self._stream.close()

    def _take(self) -> tuple[NDArray[np.int64], tuple[torch.Tensor, ...]]:
        """The batch at the position. A failure costs a new pipeline and a look at the files, and is rare."""
        while True:
            try:
                return self._stream.take(self._position)
            except BrokenBatch as broken:
                rows, failure = broken.rows, str(broken)
            # Out here, where an error drags neither DALI's traceback nor the broken pipeline along. What was failed
            # before may be among the rows that were read ahead; it is no news, and explains the failure.
            for row, reason in gone_bad(self._index, rows, failure).items():
                if row not in self._plan.failed:
                    self._on_failed(f"{reason}; it went bad since the scan, and another image takes its place")
                    self._fail({row}, f"the last is {reason}")

    def _fail(self, news: set[int], last: str) -> None:
        failed = self._plan.failed | news
        if len(failed) > self._max_failed:
            raise too_many(len(failed), self._max_failed, last)
        self._plan.fail(failed)


class EvalLoader:
    """Each image once a pass, with its label: for k-NN, linear probe and fine-tuning.

    `train=False`: in the index's order, shorter side resized to `resize`, centre `crop`, as torchvision's `Resize` and
    `CenterCrop`; the ranks' shares are disjoint and complete, so some ranks may hold one image more.
    `train=True`: in the epoch's order, random resized crop (area 0.08 to 1) and flip, pure functions of
    (seed, epoch, index row); every rank holds as many images, so that ranks stay in step: the
    len(index) % world_size images at the end of the permutation sit out that epoch. `resize` has no meaning then.

    Each iteration starts at the beginning of a pass; the last batch may be smaller. With `train=True` call `set_epoch`
    before each pass, as with torch's DistributedSampler: without it every pass is the same.

    Raises:
        ValueError: an argument is out of range.
        DatasetError: fewer images than ranks; while iterating: an image went bad since the scan.
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
    ) -> None:
        _check_arguments(batch_size, rank, world_size, num_threads)
        if crop < 1 or (not train and crop > resize):
            raise ValueError(f"crop {crop} does not fit into images resized to {resize}; use at most {resize}")
        if len(index) < world_size:
            raise DatasetError(
                f"{len(index)} images are too few for {world_size} ranks; use at most {len(index)} ranks"
            )
        self._index = index
        self._plan = EvalPlan(index, resize, crop, train, seed, batch_size, rank, world_size)
        self._stream = Stream(self._plan, _device(device), "float32", num_threads)
        self._epoch = 0

    def __len__(self) -> int:
        """Batches in a pass of this rank, the last and perhaps smaller one included."""
        return self._plan.steps

    def __iter__(self) -> Iterator[EvalBatch]:
        epoch = self._epoch
        for step in range(len(self)):
            rows, (images,) = _take(self._stream, self._plan, Position(epoch, step))
            labels = torch.from_numpy(self._index.labels[rows]).to(images.device, non_blocking=True)
            yield EvalBatch(images.permute(0, 3, 1, 2), labels, torch.from_numpy(rows))

    def set_epoch(self, epoch: int) -> None:
        """The order and the crops of the next pass, with `train=True`; no effect otherwise."""
        if epoch < 0:
            raise ValueError(f"epoch {epoch} is below 0")
        self._epoch = epoch if self._plan.train else 0

    def close(self) -> None:
        """Free the pipeline; iterating again builds a new one."""
        self._stream.close()


def _check_arguments(batch_size: int, rank: int, world_size: int, num_threads: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch size {batch_size} is below 1")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is outside a world of {world_size}; use 0 to {world_size - 1}")
    if num_threads < 1:
        raise ValueError(f"{num_threads} DALI threads are too few; use 1 or more")


def _device(device: str | torch.device) -> torch.device:
    device = torch.device(device)
    if device.type == "cpu":
        return device
    if device.type != "cuda" or not torch.cuda.is_available():
        raise ValueError(
            f"device {device} is not there for DALI; use cpu" + (" or cuda" if torch.cuda.is_available() else "")
        )
    return device if device.index is not None else torch.device("cuda", torch.cuda.current_device())


def _take(stream: Stream, plan: EvalPlan, position: Position) -> tuple[NDArray[np.int64], tuple[torch.Tensor, ...]]:
    """The batch of that position; a failure of DALI's becomes an error that names the files."""
    try:
        return stream.take(position)
    except BrokenBatch as broken:
        rows, failure = broken.rows, str(broken)
    bad = "; ".join(gone_bad(plan.index, rows, failure).values())  # out here, as in ViewLoader._take
    raise DatasetError(f"gone bad since the images were scanned: {bad}; mend or remove it and scan again")
