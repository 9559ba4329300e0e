"""Linear probe: a classifier on frozen features, by the reference's protocol; several learning rates in one pass.

Learning rates share what costs: images and features. Takes features and loaders, never a run.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from evaluation import accuracy
from evaluation.accuracy import Accuracy, Done
from evaluation.knn import Labelled
from model.collectives import average_gradients

Features = Callable[[Tensor], Tensor]


class TrainLoader(Protocol):
    """This rank's share of the training images, in an order and with crops of its own for each epoch.

    Every rank gives as many batches of as many images.
    """

    def set_epoch(self, epoch: int) -> None: ...  # noqa: D102
    def __iter__(self) -> Iterator[Labelled]: ...


@dataclass(frozen=True)
class Schedule:
    """How the heads are trained; the defaults are the reference's."""

    epochs: int = 90
    batch_size: int = 1024  # images a step over all ranks
    momentum: float = 0.9
    weight_decay: float = 0.0

    def rate(self, base: float, epoch: int) -> float:
        """Learning rate of a whole epoch: base x batch / 256, by half a cosine towards 0, without warm-up."""
        return base * self.batch_size / 256 * 0.5 * (1 + math.cos(math.pi * epoch / self.epochs))


@dataclass(frozen=True)
class Outcome:
    """What one learning rate came to."""

    lr: float  # base, before x batch / 256
    last: Accuracy
    best: Accuracy  # of the epoch with the highest top-1, the first such
    loss: float  # mean training loss of the last epoch; nan or inf: diverged


class Heads:
    """Linear classifiers, one a learning rate, that start from the same weights: N(0, 0.01), bias 0."""

    def __init__(
        self,
        lrs: Sequence[float],
        feature_dim: int,
        classes: int,
        schedule: Schedule,
        seed: int = 0,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        # Drawn on the CPU: the same on every rank and device.
        weight = 0.01 * torch.randn(classes, feature_dim, generator=torch.Generator().manual_seed(seed))
        self.lrs, self.schedule = tuple(lrs), schedule
        self.layers = [nn.Linear(feature_dim, classes, device=device, dtype=dtype) for _ in lrs]
        for layer in self.layers:
            nn.init.zeros_(layer.bias)
            with torch.no_grad():
                layer.weight.copy_(weight)
        self.optimizer = torch.optim.SGD(
            [{"params": layer.parameters()} for layer in self.layers],
            lr=0.0,
            momentum=schedule.momentum,
            weight_decay=schedule.weight_decay,
        )
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Give each head its learning rate of that epoch."""
        for group, lr in zip(self.optimizer.param_groups, self.lrs, strict=True):
            group["lr"] = self.schedule.rate(lr, epoch)

    def state_dict(self) -> dict[str, Any]:
        """Base learning rates and weights of all heads, and their momenta."""
        heads = [layer.state_dict() for layer in self.layers]
        return {"lrs": list(self.lrs), "heads": heads, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What `state_dict` gave of heads for the same learning rates."""
        for layer, weights in zip(self.layers, state["heads"], strict=True):
            layer.load_state_dict(weights)
        self.optimizer.load_state_dict(state["optimizer"])

    def step(self, features: Tensor, labels: Tensor) -> Tensor:
        """One SGD step of every head on features (N, F); returns this rank's losses (heads,), on the device.

        Gradients are averaged over the ranks, which must give as many images each: the mean over the global batch.
        """
        losses = torch.stack([F.cross_entropy(layer(features), labels) for layer in self.layers])
        self.optimizer.zero_grad()
        losses.sum().backward()  # no head's loss depends on another head
        average_gradients(p for layer in self.layers for p in layer.parameters())
        self.optimizer.step()
        return losses.detach()

    @torch.no_grad()
    def right(self, features: Tensor, labels: Tensor) -> Tensor:
        """How many of the images are right at the first guess and among the first five: int64 (heads, 2)."""
        return torch.stack([accuracy.hits(layer(features), labels) for layer in self.layers])


def probe(
    features: Features,
    heads: Heads,
    train: TrainLoader,
    val: Iterable[Labelled],
    on_epoch: Callable[[Done], None] = lambda done: None,
    done: Done | None = None,
) -> list[Outcome]:
    """Train the heads through the whole schedule, or what is left of it, validate after every epoch.

    Args:
        features: of the frozen network in eval mode, as the protocol has it also while training: (N, 3, H, W) to
            (N, F). Called without gradient.
        heads: fresh ones, or with the state that they had after the epochs `done`; they are trained in place.
        train: this rank's training images.
        val: this rank's share of the validation images; shares are disjoint and may differ in length.
        on_epoch: told after each epoch what it and those before have come to.
        done: what the epochs before came to, of a probe that was interrupted: what follows is as if it had not been.

    Returns:
        One outcome a learning rate, the same on every rank.
    """
    done = done or Done()
    for epoch in range(done.epochs, heads.schedule.epochs):
        heads.set_epoch(epoch)
        train.set_epoch(epoch)
        losses = _train(features, heads, train)
        done = done.then(validate(features, heads, val, epoch + 1), losses)
        on_epoch(done)
    return [
        Outcome(lr, last=each[-1], best=accuracy.best(each), loss=loss)
        for lr, each, loss in zip(heads.lrs, zip(*done.accuracies, strict=True), done.losses, strict=True)
    ]


def validate(features: Features, heads: Heads, val: Iterable[Labelled], epoch: int) -> list[Accuracy]:
    """Accuracies over the shares of all ranks together, one a head; `epoch`: epochs of training behind them."""
    device = heads.layers[0].weight.device

    def right(batch: Labelled) -> Tensor:
        return heads.right(_frozen(features, batch.images), batch.labels.to(device))

    return accuracy.validate(right, val, epoch, device, guessers=len(heads.lrs))


def _train(features: Features, heads: Heads, train: TrainLoader) -> Tensor:
    """One epoch; returns the mean loss of each head over all images and ranks, and waits for the device only then."""
    device = heads.layers[0].weight.device
    sums = torch.zeros(len(heads.lrs) + 1, dtype=torch.float64, device=device)
    for batch in train:
        losses = heads.step(_frozen(features, batch.images), batch.labels.to(device))
        sums[:-1] += losses * len(batch.labels)
        sums[-1] += len(batch.labels)
    if dist.is_initialized():
        dist.all_reduce(sums)
    return sums[:-1] / sums[-1]


@torch.no_grad()
def _frozen(features: Features, images: Tensor) -> Tensor:
    return features(images)
