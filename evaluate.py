"""Entry of `torchrun … -- evaluate.py knn|linear --run RUN --data DIR`: how good the features of a run are.

Also without torchrun, as a single process. With it the `--` matters: torchrun would take `--run` for an option of its
own, `--run-path`.
"""

import dataclasses
import datetime
import io
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from contextlib import closing, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

# See train_ddp.py: idle OpenMP threads that spin take the cores from DALI's.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import torch.distributed as dist
import tyro

from dali_pipes import DatasetError, DatasetIndex, EvalLoader
from evaluation import knn, linear
from model import MoCoV3
from model.backbones import RESNETS
from trainer.config import ConfigError, check_divisible
from trainer.distributed import World, choose_device, join
from trainer.engine import build_model
from trainer.export import TrainedRun, open_run
from trainer.run_folder import write_atomically

RESIZE, CROP = 256, 224  # the reference's; other image sizes keep the proportion
EVAL_BATCH = 256  # images a rank, where nothing is learned
TIMEOUT = 1800  # seconds that ranks wait for each other
READY = "moco_v3/evaluate"


@dataclass(frozen=True)
class Evaluation:
    """What every evaluation takes."""

    run: Path
    """Folder of the run; its newest whole checkpoint is evaluated, results go into RUN/eval."""
    data: Path
    """Folder with train/ and val/, the same class folders in both."""
    untrained: bool = False
    """Evaluate the network as it was before the first step instead, for comparison."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU, or the CPU where the machine has none."""
    amp: Literal["off", "bf16", "fp16"] = "off"
    """Autocast of the frozen network; the reference has none."""
    workers: Annotated[int | None, tyro.conf.arg(aliases=["-j"])] = None
    """DALI threads a rank (default: the machine's cores shared among its ranks, at most 16)."""
    name: str | None = None
    """Of the result, RUN/eval/NAME.json (default: the kind of evaluation); an older one of that name is replaced."""


@dataclass(frozen=True)
class Knn(Evaluation):
    """k-NN accuracy of the frozen features: bank train/, queries val/."""

    k: int = 20
    """Neighbours that vote."""
    temperature: float = 0.07
    """Of the vote: a neighbour of cosine s counts exp(s / temperature)."""


@dataclass(frozen=True)
class Linear(Evaluation):
    """Linear probe by the reference's protocol: top-1 and top-5 on val/ after the last and after the best epoch."""

    lr: tuple[float, ...] = ()
    """Base learning rates, x batch size / 256 each, all in one pass (default: the reference's, 0.1 for ResNets, 3 for
    transformers, and others around it)."""
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

    def rates(self, arch: str) -> tuple[float, ...]:
        """The learning rates, defaults filled in."""
        return self.lr or ((0.03, 0.1, 0.3, 1.0) if arch in RESNETS else (0.3, 1.0, 3.0, 10.0))


Command = (
    Annotated[Knn, tyro.conf.subcommand("knn", prefix_name=False)]
    | Annotated[Linear, tyro.conf.subcommand("linear", prefix_name=False)]
)


class Evaluator:
    """One rank of an evaluation: the frozen model, and its share of the images."""

    def __init__(self, command: Evaluation, run: TrainedRun, world: World, device: torch.device) -> None:
        self.command, self.run, self.world, self.device = command, run, world, device
        self.model: MoCoV3 = run.model.to(device, torch.float32, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.model.eval().requires_grad_(False)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Features (N, F), float32."""
        dtype = torch.float16 if self.command.amp == "fp16" else torch.bfloat16
        with torch.autocast(self.device.type, dtype, enabled=self.command.amp != "off"):
            return self.model.features(images).float()

    def loader(self, index: DatasetIndex, batch_size: int, **options: Any) -> "closing[EvalLoader]":
        """This rank's share of a tree at the run's image size."""
        size = self.run.config.data.image_size
        return closing(
            EvalLoader(
                index,
                batch_size=batch_size,
                resize=round(size * RESIZE / CROP),
                crop=size,
                rank=self.world.rank,
                world_size=self.world.size,
                device=str(self.device),
                num_threads=self.command.workers or self.world.default_threads(),
                **options,
            )
        )

    def knn(self, command: Knn, train: DatasetIndex, val: DatasetIndex) -> dict[str, Any]:
        """The result of `knn`."""
        parts = []
        for index in (train, val):
            with self.loader(index, EVAL_BATCH) as loader:
                parts.append(knn.extract(self.features, loader))
        (bank, bank_labels), (queries, labels) = parts
        accuracy = knn.accuracy(bank, bank_labels, queries, labels, command.k, command.temperature)
        self.say(f"k-NN   {accuracy:.2%} (k {command.k}, temperature {command.temperature})")
        return {"accuracy": accuracy}

    def linear(self, command: Linear, train: DatasetIndex, val: DatasetIndex) -> dict[str, Any]:
        """The result of `linear`."""
        schedule = linear.Schedule(command.epochs, command.batch_size, command.momentum, command.weight_decay)
        lrs = command.rates(self.run.config.model.arch)
        heads = linear.Heads(lrs, self.model.feature_dim, len(train.classes), schedule, command.seed, self.device)
        started = time.monotonic()

        def progress(epoch: int, accuracies: Sequence[linear.Accuracy]) -> None:
            found = "  ".join(f"{each.top1:.2%}" for each in accuracies)
            self.say(f"epoch {epoch + 1}/{command.epochs}  top-1 {found}  {time.monotonic() - started:.0f} s")

        self.say(f"learning rates {', '.join(f'{lr:g}' for lr in lrs)}, each x {command.batch_size} / 256")
        batch = command.batch_size // self.world.size
        with (
            self.loader(train, batch, train=True, seed=command.seed) as images,
            self.loader(val, EVAL_BATCH) as queries,
        ):
            outcomes = linear.probe(self.features, heads, images, queries, progress)
        for each in outcomes:
            last, best = each.last, each.best
            self.say(
                f"lr {each.lr:<6g} last {last.top1:.2%} top-1 {last.top5:.2%} top-5   "
                f"best {best.top1:.2%} top-1 {best.top5:.2%} top-5 (epoch {best.epoch})   loss {each.loss:.4g}"
            )
        losses = [each.loss if math.isfinite(each.loss) else None for each in outcomes]  # JSON has no nan
        return {"outcomes": [{**dataclasses.asdict(o), "loss": loss} for o, loss in zip(outcomes, losses, strict=True)]}

    def say(self, line: str) -> None:
        """Print on rank 0."""
        if self.world.rank == 0:
            print(line, flush=True)


def main(argv: Sequence[str]) -> int:
    """The command; returns the exit code: 0 done, 2 wrong use. Under torchrun an error is printed once."""
    world = World.from_environment()
    command = _parse(list(argv), world)
    try:
        _evaluate(command, world)
    except (ConfigError, DatasetError) as error:
        if world.rank and not dist.is_initialized():
            time.sleep(5)  # rank 0 found the same and says it, and torchrun ends all with the first that exits
        else:
            print(f"evaluate.py: error: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


def _parse(argv: list[str], world: World) -> Knn | Linear:
    silent = io.StringIO() if world.rank else None  # a wrong flag is wrong on every rank: rank 0 says it
    try:
        with redirect_stdout(silent or sys.stdout), redirect_stderr(silent or sys.stderr):
            return tyro.cli(Command, prog="evaluate.py", args=argv, config=(tyro.conf.OmitArgPrefixes,))  # type: ignore[return-value,unused-ignore]
    except SystemExit:
        time.sleep(5 if world.rank else 0)
        raise


def _evaluate(command: Knn | Linear, world: World) -> None:
    _check(command, world)
    store, device = world.store(), choose_device(command.device, world)
    run: TrainedRun | None = None
    found: list[Any] = [None, None, None]
    if world.rank == 0:
        run = open_run(command.run)
        for warning in run.warnings:
            print(f"warning: {warning}; taking the one before")
        found = [run.file, *_scan(command.data)]
        try:
            (command.run / "eval").mkdir(exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--run {command.run} cannot be written: {error.strerror}") from None
        if store is not None:
            store.set(READY, "1")
    elif store is not None:
        store.wait([READY], datetime.timedelta(days=1))  # a scan may take long; if rank 0 fails, torchrun ends this one
    join(world, store, device, TIMEOUT)
    if dist.is_initialized():
        dist.broadcast_object_list(found, src=0)
    # A run that is still training may have a newer checkpoint by now: all ranks take the one that rank 0 found.
    file, train, val = found
    run = run or open_run(command.run, file)
    if command.untrained:
        run = dataclasses.replace(run, model=build_model(run.config, sync_bn=False))

    evaluator, started = Evaluator(command, run, world, device), time.monotonic()
    evaluator.say(
        f"{run.config.model.arch} {'before the first step' if command.untrained else f'after {run.step} steps'}, "
        f"{len(train)} images in train/, {len(val)} in val/, {len(train.classes)} classes, {world.size} x {device.type}"
    )
    result = evaluator.knn(command, train, val) if isinstance(command, Knn) else evaluator.linear(command, train, val)
    if world.rank == 0:
        kind = type(command).__name__.lower()
        facts = {
            "kind": kind,
            "run": str(run.folder.absolute()),
            "step": 0 if command.untrained else run.step,
            "images": {"train": len(train), "val": len(val), "classes": len(train.classes)},
            "flags": {name: value for name, value in vars(command).items() if name not in ("run", "name")},
            **result,
            "seconds": time.monotonic() - started,
            "ranks": world.size,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "torch": torch.__version__,
        }
        output = command.run / "eval" / f"{command.name or kind + ('-untrained' if command.untrained else '')}.json"
        write_atomically(output, (json.dumps(facts, indent=2, default=str) + "\n").encode())
        evaluator.say(f"file   {output}")
    if dist.is_initialized():
        dist.destroy_process_group()


def _check(command: Knn | Linear, world: World) -> None:
    positive: dict[str, float | None] = {"--workers": command.workers}
    least: dict[str, float] = {}
    if isinstance(command, Knn):
        positive |= {"--k": command.k, "--temperature": command.temperature}
    else:
        positive |= {"--epochs": command.epochs, "--batch-size": command.batch_size}
        positive |= {"--lr": min(command.lr), "--lr ": max(command.lr)} if command.lr else {}
        least = {"--momentum": command.momentum, "--weight-decay": command.weight_decay, "--seed": command.seed}
        if command.batch_size > 0:
            check_divisible(command.batch_size, world.size)
    for flag, number in positive.items():
        if number is not None and not 0 < number < math.inf:
            raise ConfigError(f"{flag.strip()} {number} is not a positive number")
    for flag, number in least.items():
        if not 0 <= number < math.inf:
            raise ConfigError(f"{flag} {number} is not a finite number of at least 0")
    if command.name is not None and Path(command.name).name != command.name:
        raise ConfigError(f"--name {command.name} is not a plain file name")


def _scan(data: Path) -> tuple[DatasetIndex, DatasetIndex]:
    if not data.is_dir():
        raise ConfigError(f"--data {data}: no such folder")
    for name in ("train", "val"):
        if not (data / name).is_dir():
            raise ConfigError(f"--data {data} has no {name}/; evaluation needs train/ and val/ with class folders")
    train, val = DatasetIndex.scan(data / "train"), DatasetIndex.scan(data / "val")
    for index in (train, val):
        if index.rejected:
            path, reason = index.rejected[0]
            print(f"{index.tree}: {len(index.rejected)} files set aside, first {path}: {reason}")
    if train.classes != val.classes:
        odd = sorted(set(train.classes) ^ set(val.classes))[0]
        where, other = ("train", "val") if odd in train.classes else ("val", "train")
        raise ConfigError(f"--data {data}: class {odd} is in {where}/ and not in {other}/; their class folders differ")
    if len(train.classes) < 2:
        raise ConfigError(f"--data {data} has {len(train.classes)} class folders; evaluation needs at least two")
    return train, val


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
