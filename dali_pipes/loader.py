"""What the trainer iterates over."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from dali_pipes.augment import Augment, output_types
from dali_pipes.failures import Salvager
from dali_pipes.fused import FusedViews
from dali_pipes.graph import Decoder
from dali_pipes.index import DatasetError, DatasetIndex
from dali_pipes.plan import Position, ViewPlan
from dali_pipes.stream import Stream
from dali_pipes.views import MOCO_V3, Recipe


@dataclass(frozen=True)
class Batch:
    """N images in the recipe's views.

    `views`: one tensor a view, (N, 3, S, S) with channels_last strides, on the loader's device; uint8 RGB in [0, 255],
    or normalised float16 or float32. `indices`: int64 (N,), rows of the index, on the CPU.
    """

    views: tuple[torch.Tensor, ...]
    indices: torch.Tensor


class ViewLoader:
    """Augmented views of every image, epoch after epoch, from any position on.

    Iterating yields the batches from the current position to the end of its epoch; the position is then the start of
    the next epoch, so that iterating again goes on there, with or without `set_epoch`. A loop that was left early goes
    on with the batch after the last one it was given. Batches of the next epoch are under way before this one ends.

    Each rank gets `len(loader)` full batches an epoch; the images that are left over, fewer than
    batch_size x world_size, are other ones in every epoch. Which images meet in global batch s and how they are
    augmented depends on `seed`, the recipe and batch_size x world_size alone.

    An image that passed the scan and cannot be used is reported once, and in its place stands the image one global
    batch further in the epoch's order (`order.replace_failed`): no other place changes. `failed` lists the rows: those
    that this rank met, and those that the caller passed on from other ranks by `add_failed`.

    Args:
        index: the images.
        recipe: the views.
        batch_size: of this rank.
        seed: of the order and of every random number.
        rank: of this process, below `world_size`.
        world_size: number of processes that share the epoch.
        device: "cpu", or "cuda" or "cuda:0": then decoding and augmentation run there.
        image_size: scales the recipe to views of this size (`Recipe.scaled`).
        output: "uint8": RGB, not normalised; "float16", "float32", and of the fused kernels "bfloat16": normalised with
            ImageNet's mean and deviation.
        num_threads: DALI's threads of this process.
        augment: who does what follows the crop, "dali": its operators; "fused": the kernels of `fused.py`, on CUDA.
            The views differ by the operators' rounding.
        jpeg_engine: on CUDA, whether JPEGs go to the GPU's hardware engine, where it has one and the engine can read
            them; the CUDA decoder's pixels may be others.
        max_failed: images that may fail before the loader stops (default: `failures.tolerated`, a thousandth of the
            index and at least 10); 0 stops at the first.
        on_failed: called with one line for each image that is found to fail.

    Raises:
        DatasetError: a batch is larger than this rank's share; while iterating: too many images failed, or DALI did on
            good ones.
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
        augment: Augment = "dali",
        jpeg_engine: bool = True,
        max_failed: int | None = None,
        on_failed: Callable[[str], None] = warnings.warn,
    ) -> None:
        check_arguments(batch_size, rank, world_size, num_threads)
        device, recipe = available(device), recipe.scaled(image_size)
        outputs = output_types(augment, device, recipe)
        if output not in outputs:
            raise ValueError(f"output {output!r} is none of {', '.join(outputs)}")
        share = len(index) // world_size
        if batch_size > share:
            raise DatasetError(
                f"batch size {batch_size} a rank is more than a rank's share of {share} images "
                f"({len(index)} images, {world_size} ranks); "
                + (f"use at most {share}" if share else f"use at most {len(index)} ranks")
            )
        fused = FusedViews(recipe.views, output, device) if augment == "fused" else None
        crops_only = fused is not None
        self._plan = ViewPlan(index, recipe.views, seed, batch_size, rank, world_size, crops_only)
        decoder = Decoder.of(index, device, batch_size, jpeg_engine)
        self._stream = Stream(self._plan, device, decoder, output, num_threads, fused)
        self._index, self._position = index, Position(0, 0)
        self._global_batch = batch_size * world_size
        self._salvager = Salvager(self._stream, self._plan, on_failed, "another image takes its place", max_failed)

    def __len__(self) -> int:
        """Full batches in an epoch, the same for every rank."""
        return self._plan.steps

    def __iter__(self) -> Iterator[Batch]:
        epoch = self._position.epoch
        while self._position.epoch == epoch:
            rows, views = self._salvager.take(self._position)
            # The position moves before the batch is handed over: a state taken in the loop's body goes on behind it.
            self._position = self._plan.after(self._position)
            yield Batch(views, torch.from_numpy(rows))

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
        """Rows of the index that are known to have failed, sorted."""
        return sorted(self._plan.failed)

    def add_failed(self, rows: Iterable[int]) -> None:
        """Also treat these rows as failed, such as other ranks met; what they stand in is made anew.

        Raises:
            DatasetError: these are too many.
            ValueError: one is no row of the index.
        """
        failed = self._plan.failed | set(rows)
        if failed != self._plan.failed:
            self._fail(failed)

    def _fail(self, failed: frozenset[int]) -> None:
        if not all(0 <= row < len(self._index) for row in failed):
            raise ValueError(f"failed images {sorted(failed)} are not all rows of an index of {len(self._index)}")
        last = f"one of them is {self._index.path(min(failed))}" if failed else ""
        self._salvager.fail(failed, last)

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
            DatasetError: more images have failed than may.
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
        if failed != self._plan.failed:
            self._fail(failed)
            self._stream.close()  # what is under way was chosen with other failed images in mind
        self._position = Position(epoch, step)

    def close(self) -> None:
        """Free the pipeline; iterating again builds a new one at the same position."""
        self._stream.close()


def check_arguments(batch_size: int, rank: int, world_size: int, num_threads: int) -> None:
    """ValueError that names the one that is out of range."""
    if batch_size < 1:
        raise ValueError(f"batch size {batch_size} is below 1")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is outside a world of {world_size}; use 0 to {world_size - 1}")
    if num_threads < 1:
        raise ValueError(f"{num_threads} DALI threads are too few; use 1 or more")


def available(device: str | torch.device) -> torch.device:
    """The device with its index; ValueError if DALI cannot run there."""
    device = torch.device(device)
    if device.type == "cpu":
        return device
    if device.type != "cuda" or not torch.cuda.is_available():
        raise ValueError(
            f"device {device} is not there for DALI; use cpu" + (" or cuda" if torch.cuda.is_available() else "")
        )
    if device.index is not None and device.index >= torch.cuda.device_count():
        raise ValueError(f"device {device} is not there for DALI; use cuda:0 to cuda:{torch.cuda.device_count() - 1}")
    return device if device.index is not None else torch.device("cuda", torch.cuda.current_device())
