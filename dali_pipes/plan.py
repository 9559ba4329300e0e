"""What stands where: the rows of the index at a position of the data, and what the graph takes for them."""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dali_pipes.arguments import Arguments, Window, colour_arguments, crop_arguments
from dali_pipes.index import DatasetError, DatasetIndex
from dali_pipes.order import complete_share, epoch_permutation, equal_share, replace_failed
from dali_pipes.sampling import SampleParams, sample_params
from dali_pipes.views import ViewSpec

_MOST_BYTES = 2**31 - 1  # of a file, as DALI's arguments can say it


@dataclass(frozen=True)
class Position:
    """A place in the data: the batch that is number `step` of `epoch`, both from 0."""

    epoch: int
    step: int


class Plan(ABC):
    """The batches of one rank, each a pure function of its position and of the images known to have failed."""

    crops_only = False  # whether the graph gives the crops, and what follows them is done elsewhere

    def __init__(
        self,
        index: DatasetIndex,
        specs: Sequence[ViewSpec],
        seed: int,
        batch_size: int,
        rank: int,
        world_size: int,
    ) -> None:
        self.index, self.specs, self.seed, self.batch_size = index, tuple(specs), seed, batch_size
        self.rank, self.world_size = rank, world_size
        self.failed: frozenset[int] = frozenset()  # rows; changed by `fail`
        self._epoch, self._share = -1, np.zeros(0, np.int64)

    def fail(self, rows: Iterable[int]) -> None:
        """From now on other images stand in for these rows."""
        self.failed = frozenset(rows)
        self._epoch = -1

    @property
    @abstractmethod
    def steps(self) -> int:
        """Batches in an epoch of this rank."""

    @abstractmethod
    def share(self, epoch: int) -> NDArray[np.int64]:
        """All rows of this rank in that epoch, in order."""

    @abstractmethod
    def view_arguments(self, view: int, rows: NDArray[np.int64], params: SampleParams) -> Arguments:
        """The inputs of one view for these rows, from what was drawn for them."""

    def after(self, position: Position) -> Position:
        """The next batch's position, at the start of the next epoch where this one ends."""
        if position.step + 1 < self.steps:
            return Position(position.epoch, position.step + 1)
        return Position(position.epoch + 1, 0)

    def rows(self, position: Position) -> NDArray[np.int64]:
        """The rows of the index in that batch."""
        if self._epoch != position.epoch:
            self._epoch, self._share = position.epoch, self.share(position.epoch)
        start = position.step * self.batch_size
        return self._share[start : start + self.batch_size].copy()

    def names(self) -> list[list[str]]:
        """For each view, the names of its inputs."""
        row = np.zeros(1, np.int64)
        return [list(self.view_arguments(view, row, params)) for view, params in enumerate(self.draw(row, 0))]

    def draw(self, rows: NDArray[np.int64], epoch: int) -> tuple[SampleParams, ...]:
        """The parameters of these rows, for each view."""
        heights, widths = self.index.heights[rows], self.index.widths[rows]
        return tuple(
            sample_params(spec, view, self.seed, epoch, rows, heights, widths) for view, spec in enumerate(self.specs)
        )

    def inputs(self, rows: NDArray[np.int64], drawn: Sequence[SampleParams]) -> list[Any]:
        """What the graph takes for these rows: the files' names and sizes, then the arrays that `names` lists."""
        files = [np.frombuffer(os.fsencode(self.index.path(row)), np.uint8) for row in rows]
        sizes = np.minimum(self.index.file_sizes[rows], _MOST_BYTES).astype(np.int32)[:, None]
        views = [self.view_arguments(view, rows, params) for view, params in enumerate(drawn)]
        return [files, sizes, *(np.ascontiguousarray(array) for arrays in views for array in arrays.values())]


class ViewPlan(Plan):
    """Pre-training: full batches of the epoch's permutation, as many for every rank; failed images replaced."""

    def __init__(
        self,
        index: DatasetIndex,
        specs: Sequence[ViewSpec],
        seed: int,
        batch_size: int,
        rank: int,
        world_size: int,
        crops_only: bool = False,
    ) -> None:
        super().__init__(index, specs, seed, batch_size, rank, world_size)
        self.crops_only = crops_only

    @property
    def steps(self) -> int:
        """Batches in an epoch of this rank."""
        return len(self.index) // self.world_size // self.batch_size

    def share(self, epoch: int) -> NDArray[np.int64]:
        """All rows of this rank in that epoch, in order."""
        order = epoch_permutation(len(self.index), self.seed, epoch)
        order = replace_failed(order, self.failed, self.batch_size * self.world_size)
        return equal_share(order, self.rank, self.world_size)

    def view_arguments(self, view: int, rows: NDArray[np.int64], params: SampleParams) -> Arguments:
        """Crop and colour of one view."""
        spec = self.specs[view]
        crop = crop_arguments(Window.of_crop(params, spec.size), spec.size)
        return crop if self.crops_only else crop | colour_arguments(params, spec)


class EvalPlan(Plan):
    """Evaluation: every image once, the last batch as large as it comes; see `eval_loader.EvalLoader`.

    In the places of images that failed stand the first good ones of the rank's share.
    """

    def __init__(
        self,
        index: DatasetIndex,
        resize: int,
        crop: int,
        train: bool,
        seed: int,
        batch_size: int,
        rank: int,
        world_size: int,
    ) -> None:
        spec = ViewSpec(size=crop, jitter=0.0, grayscale=0.0, blur=0.0, solarize=0.0, flip=0.5 if train else 0.0)
        super().__init__(index, (spec,), seed, batch_size, rank, world_size)
        self.resize, self.train = resize, train

    @property
    def steps(self) -> int:
        """Batches in a pass of this rank, the last one included."""
        count = len(self.index)
        share = count // self.world_size if self.train else len(range(self.rank, count, self.world_size))
        return -(-share // self.batch_size)

    def share(self, epoch: int) -> NDArray[np.int64]:
        """All rows of this rank in that pass, in order.

        Raises:
            DatasetError: all of them failed.
        """
        share = self.own(epoch)
        bad = np.isin(share, np.fromiter(self.failed, np.int64, len(self.failed)))
        if bad.all():
            raise DatasetError(f"{self.index.tree}: none of the {len(share)} images of rank {self.rank} can be used")
        share[bad] = np.resize(share[~bad], bad.sum())
        return share

    def own(self, epoch: int) -> NDArray[np.int64]:
        """All rows of this rank in that pass, in order, whether they failed or not."""
        if self.train:
            order = epoch_permutation(len(self.index), self.seed, epoch)
            return equal_share(order, self.rank, self.world_size)
        return complete_share(np.arange(len(self.index)), self.rank, self.world_size)

    def after(self, position: Position) -> Position:
        """As in any plan; but without training one pass is as the other, so what was read ahead serves the next."""
        following = super().after(position)
        return following if self.train else Position(0, following.step)

    def view_arguments(self, view: int, rows: NDArray[np.int64], params: SampleParams) -> Arguments:
        """Crop and flip."""
        spec = self.specs[view]
        window = Window.of_crop(params, spec.size)
        if not self.train:
            window = Window.of_centre(self.index.heights[rows], self.index.widths[rows], self.resize, spec.size)
        return crop_arguments(window, spec.size) | colour_arguments(params, spec)
