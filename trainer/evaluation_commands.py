"""What `evaluate.py` takes: a dataclass a kind of evaluation, which tyro turns into a subcommand, and its checks."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from trainer.config import ConfigError, check_divisible


@dataclass(frozen=True)
class Evaluation:
    """What every evaluation takes."""

    run: Path
    """Folder of the run; its newest whole checkpoint is evaluated, results go into RUN/eval."""
    data: Path
    """Folder with train/ and val/, the same class folders in both; or a list train.txt, with val.txt beside it."""
    outside: bool = False
    """Let the lists name images outside of their own folder."""
    untrained: bool = False
    """Evaluate a network of the run's --seed that has learned nothing instead, for comparison."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU, or the CPU where the machine has none."""
    amp: Literal["off", "bf16", "fp16"] = "off"
    """Autocast of the network; the reference's evaluation has none.
    off: float32, in which torch lets GPUs convolve in TF32."""
    workers: Annotated[int | None, tyro.conf.arg(aliases=["-j"])] = None
    """DALI threads a rank; None: the machine's cores shared among its ranks, at most 16."""
    name: str | None = None
    """Of the result, RUN/eval/NAME.json; None: the kind of evaluation, or KIND-untrained.
    An older one of that name is replaced when the new one is complete, if it is of the same --data."""

    @property
    def kind(self) -> str:
        """The subcommand's name."""
        return type(self).__name__.lower()

    def result(self, ending: str) -> Path:
        """The file of that ending that the evaluation leaves."""
        name = self.name or self.kind + ("-untrained" if self.untrained else "")
        return self.run / "eval" / f"{name}{ending}"

    def check(self, world_size: int) -> None:
        """Raise `ConfigError` for values that cannot work, before anything is read."""
        if self.workers is not None:
            _check_positive({"--workers": self.workers})
        if self.name is not None and Path(self.name).name != self.name:
            raise ConfigError(f"--name {self.name} is not a plain file name")


@dataclass(frozen=True)
class Knn(Evaluation):
    """k-NN accuracy of the frozen features: bank train/, queries val/."""

    k: int = 20
    """Neighbours that vote."""
    temperature: float = 0.07
    """Of the vote: a neighbour of cosine s counts exp(s / temperature)."""

    def check(self, world_size: int) -> None:  # noqa: D102
        super().check(world_size)
        _check_positive({"--k": self.k, "--temperature": self.temperature})


@dataclass(frozen=True)
class Linear(Evaluation):
    """Linear probe by the reference's protocol: top-1 and top-5 on val/ after the last and after the best epoch."""

    lr: tuple[float, ...] = ()
    """Base learning rates, x batch size / 256 each, all in one pass.
    None given: the reference's, 0.1 for convolutional networks and 3 for transformers, and some around it."""
    epochs: int = 90
    """Epochs."""
    batch_size: Annotated[int, tyro.conf.arg(aliases=["-b"])] = 1024
    """Images a step over all ranks."""
    momentum: float = 0.9
    """Of SGD."""
    weight_decay: Annotated[float, tyro.conf.arg(aliases=["--wd"])] = 0.0
    """Weight decay."""
    seed: int = 0
    """Of the first head, the order of the images and their crops."""

    def rates(self, family: str) -> tuple[float, ...]:
        """The learning rates, defaults filled in; `family`: of the backbone, "resnet" for convolutional networks."""
        return self.lr or ((0.03, 0.1, 0.3, 1.0) if family == "resnet" else (0.3, 1.0, 3.0, 10.0))

    def check(self, world_size: int) -> None:  # noqa: D102
        super().check(world_size)
        _check_positive({"--epochs": self.epochs, "--batch-size": self.batch_size})
        for lr in self.lr:
            _check_positive({"--lr": lr})
        check_divisible(self.batch_size, world_size)
        _check_at_least_0({"--momentum": self.momentum, "--weight-decay": self.weight_decay})
        _check_seed(self.seed)


@dataclass(frozen=True)
class Finetune(Evaluation):
    """Fine-tune the whole network on train/ with layer-wise learning rates: top-1 and top-5 on val/, last and best
    epoch.

    The settings of BEiT and MAE for a ViT-B, with random crop and flip as the only augmentation beside the mixing.
    """

    lr: float = 5e-4
    """Base learning rate of the classifier, x batch size / 256."""
    layer_decay: float = 0.65
    """A layer's learning rate over that of the layer above it; 1: the same for all."""
    epochs: int = 100
    """Epochs."""
    warmup_epochs: int = 5
    """Epochs of linear warm-up from 0; a half cosine follows."""
    batch_size: Annotated[int, tyro.conf.arg(aliases=["-b"])] = 1024
    """Images a step over all ranks."""
    weight_decay: Annotated[float, tyro.conf.arg(aliases=["--wd"])] = 0.05
    """Of AdamW, on matrices and kernels; biases, norms and tokens have none."""
    label_smoothing: float = 0.1
    """Share of the target that is spread over all classes."""
    mixup: float = 0.8
    """Alpha of mixup; 0: none."""
    cutmix: float = 1.0
    """Alpha of CutMix; 0: none."""
    drop_path: float | None = None
    """Stochastic depth; None: 0.1, but none for torchvision's ResNets, which have no such thing."""
    seed: int = 0
    """Of the first classifier, the order of the images, their crops and mixing, and of what the network drops."""

    def check(self, world_size: int) -> None:  # noqa: D102
        super().check(world_size)
        _check_positive({"--epochs": self.epochs, "--batch-size": self.batch_size, "--lr": self.lr})
        check_divisible(self.batch_size, world_size)
        least = {"--weight-decay": self.weight_decay, "--mixup": self.mixup, "--cutmix": self.cutmix}
        _check_at_least_0(least)
        _check_seed(self.seed)
        images = self.batch_size // world_size
        if images % 2 and (self.mixup or self.cutmix):
            raise ConfigError(
                f"--batch-size {self.batch_size} is {images} images a rank, and --mixup and --cutmix mix pairs; use "
                f"{(images + 1) * world_size}, or 0 for both"
            )
        if not 0 < self.layer_decay <= 1:
            raise ConfigError(f"--layer-decay {self.layer_decay} is not above 0 and at most 1")
        for flag, share in {"--label-smoothing": self.label_smoothing, "--drop-path": self.drop_path or 0.0}.items():
            if not 0 <= share < 1:
                raise ConfigError(f"{flag} {share} is not at least 0 and below 1")
        if not 0 <= self.warmup_epochs <= self.epochs:
            raise ConfigError(f"--warmup-epochs {self.warmup_epochs} is not between 0 and --epochs {self.epochs}")


Command = (
    Annotated[Knn, tyro.conf.subcommand("knn", prefix_name=False)]
    | Annotated[Linear, tyro.conf.subcommand("linear", prefix_name=False)]
    | Annotated[Finetune, tyro.conf.subcommand("finetune", prefix_name=False)]
)


def _check_positive(numbers: dict[str, float]) -> None:
    for flag, number in numbers.items():
        if not 0 < number < math.inf:
            raise ConfigError(f"{flag} {number} is not a positive number")


def _check_seed(seed: int) -> None:
    if not 0 <= seed < 2**32:
        raise ConfigError(f"--seed {seed} is not between 0 and {2**32 - 1}")


def _check_at_least_0(numbers: dict[str, float]) -> None:
    for flag, number in numbers.items():
        if not 0 <= number < math.inf:
            raise ConfigError(f"{flag} {number} is not a finite number of at least 0")
