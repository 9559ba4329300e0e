"""Fine-tuning of the whole network with layer-wise learning rates: the lower a layer, the slower it moves.

The settings are those of BEiT (arXiv 2106.08254) and MAE (arXiv 2111.06377); layers and mixing of images are timm's.
Takes a network and loaders, never a run.
"""

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.models import ResNet

from evaluation import accuracy
from evaluation.accuracy import Accuracy, Done
from evaluation.knn import Labelled
from evaluation.linear import TrainLoader
from model import learning_rate
from model.backbones import Headed


class CountedLoader(TrainLoader, Protocol):
    """A TrainLoader that knows how many batches it gives an epoch."""

    def __len__(self) -> int: ...


@dataclass(frozen=True)
class Recipe:
    """How a network is fine-tuned: AdamW, cosine after a linear warm-up, per step."""

    epochs: int = 100
    batch_size: int = 1024  # images a step over all ranks
    lr: float = 5e-4  # base, x batch / 256: of the classifier; a layer below has `layer_decay` times that of the next
    layer_decay: float = 0.65
    weight_decay: float = 0.05  # of matrices and kernels; biases, norms and tokens have none
    warmup_epochs: int = 5
    label_smoothing: float = 0.1
    mixup: float = 0.8  # alpha of the beta distribution; 0: no mixup
    cutmix: float = 1.0  # likewise
    seed: int = 0


@dataclass(frozen=True)
class Outcome:
    """What fine-tuning came to."""

    last: Accuracy
    best: Accuracy  # of the epoch with the highest top-1, the first such
    loss: float  # mean training loss of the last epoch; nan or inf: diverged


def classifier(features: int, classes: int, seed: int) -> nn.Linear:
    """The layer that takes the projector's place: weights N(0, 0.01) from `seed`, the same on every rank; bias 0."""
    layer = nn.Linear(features, classes)
    weight = torch.randn(classes, features, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        layer.weight.copy_(0.01 * weight)
        nn.init.zeros_(layer.bias)
    return layer


def parameter_groups(network: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """Groups for the optimizer, each with its `lr_scale`: 1 for the classifier, `layer_decay` to the n-th below.

    network: a backbone of model.backbones with a classifier in its head's place; all of its parameters are trained.
    """
    network.requires_grad_(True)
    settings = {"weight_decay": recipe.weight_decay, "layer_decay": recipe.layer_decay}
    if isinstance(network, Headed):
        trunk = param_groups_layer_decay(network.trunk, no_weight_decay_list=_undecayed(network.trunk), **settings)
        below = [{**group, "lr_scale": group["lr_scale"] * recipe.layer_decay} for group in trunk]
        head = network.head
        matrices, vectors = ([p for p in head.parameters() if (p.ndim > 1) == wide] for wide in (True, False))
        return [
            *below,
            {"params": matrices, "lr_scale": 1.0, "weight_decay": recipe.weight_decay},
            {"params": vectors, "lr_scale": 1.0, "weight_decay": 0.0},
        ]
    if isinstance(network, ResNet):
        # torchvision's has no layer map of its own; timm's ResNet has this one, of the same names.
        layers = {"stem": r"^conv1|bn1", "blocks": r"^layer(\d+)\.(\d+)"}
        network.group_matcher = lambda coarse: layers
    return param_groups_layer_decay(network, no_weight_decay_list=_undecayed(network), **settings)


class FineTuning:
    """The network, its optimizer and its schedule on this rank."""

    def __init__(
        self,
        network: nn.Module,
        classes: int,
        recipe: Recipe,
        precision: torch.dtype | None = None,  # of autocast; None: none
    ) -> None:
        self.network, self.recipe, self.precision = network, recipe, precision
        self.device = next(network.parameters()).device
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        # Fused, it leaves out a step that overflowed without asking the device.
        self.optimizer = torch.optim.AdamW(parameter_groups(network, recipe), lr=0.0, fused=True)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision is torch.float16)
        self.forward: nn.Module = network
        if dist.is_initialized():
            ids = [self.device.index] if self.device.type == "cuda" else None
            self.forward = DistributedDataParallel(network, device_ids=ids)
        mixes = recipe.mixup > 0 or recipe.cutmix > 0
        self.mixup = (
            Mixup(recipe.mixup, recipe.cutmix, label_smoothing=recipe.label_smoothing, num_classes=classes)
            if mixes
            else None
        )
        self.hard, self.soft = LabelSmoothingCrossEntropy(recipe.label_smoothing), SoftTargetCrossEntropy()

    def state_dict(self) -> dict[str, Any]:
        """Weights and statistics of the network, its optimizer's state, and the loss scale."""
        return {name: part.state_dict() for name, part in self._parts().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What `state_dict` gave of the same network and recipe; every rank must call it."""
        for name, part in self._parts().items():
            part.load_state_dict(state[name])

    def _parts(self) -> dict[str, Any]:
        return {"model": self.network, "optimizer": self.optimizer, "scaler": self.scaler}

    def step(self, images: Tensor, labels: Tensor, epoch: int, step: int, steps: int) -> Tensor:
        """One step, the `step`-th of `steps` in that epoch; returns this rank's loss, on the device."""
        peak = self.recipe.lr * self.recipe.batch_size / 256
        lr = learning_rate(
            epoch + step / steps, peak=peak, epochs=self.recipe.epochs, warmup_epochs=self.recipe.warmup_epochs
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        with self._autocast():
            loss = self._loss(images, labels, epoch, step)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach()

    def right(self, batch: Labelled) -> Tensor:
        """Hits on a batch, in eval mode: int64 (1, 2)."""
        with self._autocast():
            logits = self.network(batch.images)
        return accuracy.hits(logits, batch.labels.to(self.device))[None]

    def _loss(self, images: Tensor, labels: Tensor, epoch: int, step: int) -> Tensor:
        if self.mixup is None or len(images) % 2:  # timm mixes an image with its mirror place in the batch
            return self.hard(self._logits(images), labels)
        # timm draws from NumPy's global generator: seeded here, a step's mixture depends on nothing that was before.
        before = np.random.get_state()
        np.random.seed([self.recipe.seed, epoch, step, self.rank])
        images, targets = self.mixup(images.clone(), labels)  # in place, and the batch is the loader's
        np.random.set_state(before)
        return self.soft(self._logits(images), targets)

    def _logits(self, images: Tensor) -> Tensor:
        logits: Tensor = self.forward(images)
        return logits if self.precision is None else logits.float()  # on the CPU autocast would lose bits of the loss

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.device.type, self.precision, enabled=self.precision is not None)


def finetune(
    tuning: FineTuning,
    train: CountedLoader,
    val: Iterable[Labelled],
    on_epoch: Callable[[Done], None] = lambda done: None,
    done: Done | None = None,
) -> Outcome:
    """Train through the whole schedule, or what is left of it, validate after every epoch.

    Args:
        tuning: fresh, or with the state that it had after the epochs `done`; its network is trained in place and ends
            in eval mode.
        train: this rank's training images; every rank gives as many batches of as many images.
        val: this rank's share of the validation images; shares are disjoint and may differ in length.
        on_epoch: told after each epoch what it and those before have come to.
        done: what the epochs before came to, of a fine-tuning that was interrupted: what follows is as if it had not
            been, to rounding with more than two ranks.

    Returns:
        The same on every rank.
    """
    done = done or Done()
    for epoch in range(done.epochs, tuning.recipe.epochs):
        # Of what the network drops: an epoch depends on nothing that was drawn before.
        torch.manual_seed(int(np.random.SeedSequence([tuning.recipe.seed, epoch, tuning.rank]).generate_state(1)[0]))
        train.set_epoch(epoch)
        tuning.network.train()
        loss = _train(tuning, train, epoch)
        tuning.network.eval()
        done = done.then(accuracy.validate(tuning.right, val, epoch + 1, tuning.device), loss[None])
        on_epoch(done)
    history = [after for (after,) in done.accuracies]
    return Outcome(history[-1], accuracy.best(history), *done.losses)


def _train(tuning: FineTuning, train: CountedLoader, epoch: int) -> Tensor:
    """One epoch; returns the mean loss over all images and ranks, and waits for the device only then."""
    sums = torch.zeros(2, dtype=torch.float64, device=tuning.device)
    share = tuning.recipe.batch_size // (dist.get_world_size() if dist.is_initialized() else 1)
    for step, batch in enumerate(train):
        if len(batch.labels) == 1 and share > 1 and len(train) > 1:
            continue  # every rank's last: a batch norm cannot learn from one image
        loss = tuning.step(batch.images, batch.labels.to(tuning.device), epoch, step, len(train))
        sums[0] += loss * len(batch.labels)
        sums[1] += len(batch.labels)
    if dist.is_initialized():
        dist.all_reduce(sums)
    return sums[0] / sums[1]


def _undecayed(network: nn.Module) -> Sequence[str]:
    """Parameters that have no weight decay although they have several dimensions: tokens and position embeddings."""
    names: Callable[[], Sequence[str]] = getattr(network, "no_weight_decay", list)
    return list(names())
