"""Top-1 and top-5 accuracy on a validation set that the ranks share."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from evaluation.knn import Labelled


@dataclass(frozen=True)
class Accuracy:
    """Shares (0 to 1) of validation images whose class is the first guess, or among the first five."""

    top1: float
    top5: float
    epoch: int  # epochs of training behind it, from 1


@dataclass(frozen=True)
class Done:
    """What the epochs so far have come to, a value a classifier."""

    accuracies: list[list[Accuracy]] = field(default_factory=list)  # after each epoch
    losses: list[float] = field(default_factory=list)  # mean over the last epoch's images; nan or inf: diverged

    @property
    def epochs(self) -> int:
        """How many they are."""
        return len(self.accuracies)

    def then(self, accuracies: list[Accuracy], losses: Tensor) -> "Done":
        """With one epoch more."""
        return Done([*self.accuracies, accuracies], losses.tolist())


def hits(logits: Tensor, labels: Tensor) -> Tensor:
    """How many of N images are right at the first guess and among the first five: int64 (2,), on the device.

    logits: (N, classes), five guesses or as many as there are classes; labels: int64 (N,).
    """
    found = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
    return torch.stack([found[:, 0].sum(), found.sum()])


@torch.no_grad()
def validate(
    right: Callable[[Labelled], Tensor], val: Iterable[Labelled], epoch: int, device: torch.device, guessers: int = 1
) -> list[Accuracy]:
    """Accuracies over the shares of all ranks together, one a guesser.

    Args:
        right: `hits` of each guesser on a batch, stacked: int64 (guessers, 2).
        val: this rank's share of the images; shares are disjoint and may differ in length.
        epoch: epochs of training behind the guessers.
        device: of what `right` returns.
        guessers: classifiers that are judged side by side.
    """
    totals = torch.zeros(guessers + 1, 2, dtype=torch.int64, device=device)
    for batch in val:
        totals[:-1] += right(batch)
        totals[-1] += len(batch.labels)
    if dist.is_initialized():
        dist.all_reduce(totals)
    *counts, (images, _) = totals.tolist()
    return [Accuracy(first / images, five / images, epoch) for first, five in counts]


def best(history: Iterable[Accuracy]) -> Accuracy:
    """That of the epoch with the highest top-1, the first such."""
    return max(history, key=lambda accuracy: accuracy.top1)
