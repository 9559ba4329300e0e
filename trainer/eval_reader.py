"""The images that evaluation reads: loaders of a run's image size on this rank, and the k-NN accuracy through them."""

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dali_pipes import DatasetIndex, EvalLoader
from evaluation import knn
from trainer.config import Data
from trainer.distributed import World, together

RESIZE, CROP = 256, 224  # the reference's; other image sizes keep the proportion


@dataclass(frozen=True)
class EvalReader:
    """Makes the loaders of one rank."""

    data: Data  # of the run
    world: World
    device: torch.device
    threads: int  # of DALI
    warn: Callable[[str], None] = warnings.warn  # told of each image that cannot be used
    failed: list[str] = field(default_factory=list)  # what it was told on this rank

    def loader(self, index: DatasetIndex, batch_size: int, **options: Any) -> "closing[EvalLoader]":
        """This rank's share of a tree, to be closed behind a `with`; options: of EvalLoader, for training."""
        return closing(
            EvalLoader(
                index,
                batch_size=batch_size,
                resize=round(self.data.image_size * RESIZE / CROP),
                crop=self.data.image_size,
                rank=self.world.rank,
                world_size=self.world.size,
                device=str(self.device),
                num_threads=self.threads,
                jpeg_engine=self.data.jpeg_engine == "on",
                max_failed=self.data.max_failed,
                on_failed=self._report,
                **options,
            )
        )

    def _report(self, line: str) -> None:
        if line not in self.failed:  # another loader may have met it
            self.failed.append(line)
            self.warn(line)

    def knn_accuracy(
        self,
        features: Callable[[Tensor], Tensor],
        bank: DatasetIndex,
        queries: DatasetIndex,
        batch_size: int,
        extracting: AbstractContextManager[None] | None = None,
        **vote: Any,
    ) -> float:
        """k-NN accuracy (0 to 1) on `queries` of features (N, 3, S, S) to (N, F); vote: see `evaluation.knn.accuracy`.

        `extracting` is entered while the features of all ranks are made. The accuracy is the same on every rank, and
        every rank must call it.

        Raises:
            DatasetError, torch.OutOfMemoryError, FloatingPointError: the same on all ranks, if one of them met it.
        """

        def extracted() -> list[tuple[Tensor, Tensor]]:
            shares = []
            for index in (bank, queries):
                with self.loader(index, batch_size) as batches:
                    shares.append(knn.extract(features, batches))
            return shares

        with extracting or nullcontext():
            shares = together(extracted)
        if self.world.size > 1:  # as much as the exchange takes at its height: it must not fail on one rank alone
            width = shares[0][0].shape[1]
            together(lambda: torch.empty(3 * (len(bank) + len(queries)), width, device=self.device).numel())
        whole = [knn.gather(*share) for share in shares]
        del shares
        return together(lambda: knn.accuracy(*whole[0], *whole[1], **vote))
