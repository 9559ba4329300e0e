"""The evaluations of a run on this rank, and what they say."""

import dataclasses
import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from dali_pipes import DatasetIndex, EvalLoader
from evaluation import finetune, linear
from evaluation.accuracy import Done
from model import MoCoV3
from model.backbones import RESNETS, Backbone, build_backbone, load_without_head
from model.sync_bn import convert
from trainer.config import ConfigError
from trainer.distributed import World
from trainer.eval_reader import EvalReader
from trainer.evaluation_commands import Evaluation, Finetune, Knn, Linear
from trainer.evaluation_file import UNFINISHED, WEIGHTS, EvaluationFile, Learner
from trainer.export import TrainedRun

T = TypeVar("T")
EVAL_BATCH = 256  # images a rank, where nothing is learned
# Flags that a result does not depend on; what images and weights it is of, is said by step and fingerprints.
_FREE = ("run", "data", "outside", "device", "workers", "name")
PRECISIONS = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Evaluator:
    """One rank of an evaluation: the run's model, and its share of the images."""

    def __init__(self, command: Evaluation, run: TrainedRun, world: World, device: torch.device) -> None:
        self.run, self.world, self.device = run, world, device
        self.precision = PRECISIONS[command.amp]
        self.reader = EvalReader(run.config.data, world, device, command.workers or world.default_threads(), _warn)
        self.model: MoCoV3 = run.model.to(device, torch.float32, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.model.eval().requires_grad_(False)

    def evaluate(self, command: Evaluation, train: DatasetIndex, val: DatasetIndex) -> dict[str, Any]:
        """The result of a command, JSON-ready."""
        if isinstance(command, Knn):
            return self._knn(command, train, val)
        if isinstance(command, Linear):
            return self._linear(command, train, val)
        assert isinstance(command, Finetune)
        return self._finetune(command, train, val)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Features (N, F), float32."""
        with torch.autocast(self.device.type, self.precision, enabled=self.precision is not None):
            return self.model.features(images).float()

    def say(self, line: str) -> None:
        """Print on rank 0."""
        if self.world.rank == 0:
            print(line, flush=True)

    def _knn(self, command: Knn, train: DatasetIndex, val: DatasetIndex) -> dict[str, Any]:
        accuracy = self.reader.knn_accuracy(
            self.features, train, val, EVAL_BATCH, k=command.k, temperature=command.temperature
        )
        self.say(f"k-NN   {accuracy:.2%} (k {command.k}, temperature {command.temperature})")
        return {"accuracy": accuracy}

    def _linear(self, command: Linear, train: DatasetIndex, val: DatasetIndex) -> dict[str, Any]:
        schedule = linear.Schedule(command.epochs, command.batch_size, command.momentum, command.weight_decay)
        lrs = command.rates(self.model.family)
        heads = linear.Heads(lrs, self.model.feature_dim, len(train.classes), schedule, command.seed, self.device)
        self.say(f"learning rates {', '.join(f'{lr:g}' for lr in lrs)}, each x {command.batch_size} / 256")
        outcomes = self._learned(command, train, val, heads, partial(linear.probe, self.features, heads))
        for each in outcomes:
            self.say(f"lr {each.lr:<6g} {_in_words(each)}")
        return {"outcomes": [_plain(each) for each in outcomes]}

    def _finetune(self, command: Finetune, train: DatasetIndex, val: DatasetIndex) -> dict[str, Any]:
        names = {field.name for field in dataclasses.fields(finetune.Recipe)}
        recipe = finetune.Recipe(**{name: value for name, value in vars(command).items() if name in names})
        network = self._classifier(command, len(train.classes))
        tuning = finetune.FineTuning(network, len(train.classes), recipe, self.precision)
        outcome = self._learned(command, train, val, tuning, partial(finetune.finetune, tuning))
        self.say(f"tuned  {_in_words(outcome)}")
        return {"outcome": _plain(outcome)}

    def _learned(
        self,
        command: Linear | Finetune,
        train: DatasetIndex,
        val: DatasetIndex,
        learner: Learner,
        learn: Callable[[EvalLoader, EvalLoader, Callable[[Done], None], Done | None], T],
    ) -> T:
        """What `learn` comes to, from where an interrupted evaluation left the learner, and with its state kept."""
        flags = {name: value for name, value in vars(command).items() if name not in _FREE}
        flags = {name: list(value) if isinstance(value, tuple) else value for name, value in flags.items()}
        identity = {
            "kind": command.kind,
            "step": 0 if command.untrained else self.run.step,
            "images": [train.fingerprint, val.fingerprint],
            "flags": flags,
        }
        file, started = command.result(UNFINISHED), time.monotonic()
        kept = EvaluationFile(file, command.result(WEIGHTS), identity, self.world, _warn)
        before = kept.go_on(learner)
        if before is not None:
            self.say(f"going on after epoch {before.epochs} of {file}")

        def on_epoch(done: Done) -> None:
            found = "  ".join(f"{each.top1:.2%}" for each in done.accuracies[-1])
            self.say(f"epoch {done.epochs}/{command.epochs}  top-1 {found}  {time.monotonic() - started:.0f} s")
            kept.save(learner, done)

        batch = command.batch_size // self.world.size
        with (
            self.reader.loader(train, batch, train=True, seed=command.seed) as images,
            self.reader.loader(val, min(EVAL_BATCH, batch)) as queries,
        ):
            outcome = learn(images, queries, on_epoch, before)
        kept.save_weights(learner)
        return outcome

    def _classifier(self, command: Finetune, classes: int) -> nn.Module:
        backbone = tunable(command, self.run)
        load_without_head(backbone.module, self.model.backbone_state_dict())
        network = backbone.with_head(finetune.classifier(backbone.feature_dim, classes, command.seed))
        if self.world.size > 1:
            convert(network)
        return network.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def tunable(command: Finetune, run: TrainedRun) -> Backbone:
    """A run's backbone once more, as it is fine-tuned: with stochastic depth; its weights are fresh.

    Raises:
        ConfigError: it has no stochastic depth.
    """
    config = run.config
    plain = config.model.arch in RESNETS
    drop_path = command.drop_path if command.drop_path is not None else 0.0 if plain else 0.1
    if drop_path and plain:
        raise ConfigError(f"--drop-path {drop_path}: torchvision's {config.model.arch} has none; use 0")
    overrides = {**config.model.backbone, **({"drop_path_rate": drop_path} if drop_path else {})}
    try:
        return build_backbone(config.model.arch, config.data.image_size, overrides)
    except ValueError as error:
        raise ConfigError(f"--drop-path {drop_path}: {error}; use 0") from None


def _warn(line: str) -> None:
    """On whichever rank it arises."""
    print(f"warning: {line}", flush=True)


def _in_words(outcome: linear.Outcome | finetune.Outcome) -> str:
    last, best = outcome.last, outcome.best
    return (
        f"last {last.top1:.2%} top-1 {last.top5:.2%} top-5   "
        f"best {best.top1:.2%} top-1 {best.top5:.2%} top-5 (epoch {best.epoch})   loss {outcome.loss:.4g}"
    )


def _plain(outcome: linear.Outcome | finetune.Outcome) -> dict[str, Any]:
    # JSON has no nan.
    return {**dataclasses.asdict(outcome), "loss": outcome.loss if math.isfinite(outcome.loss) else None}
