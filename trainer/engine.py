"""The training step: model, optimizer and data of one rank."""

import inspect
import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from dali_pipes import MOCO_V3, DatasetIndex, Recipe, ViewLoader
from model import LARS, MoCoV3, learning_rate, momentum_coefficient
from model.backbones import checkpoint_activations
from model.collectives import average_gradients
from trainer.config import Config
from trainer.distributed import World
from trainer.guard import Guard
from trainer.microbatch import chunked_step
from trainer.objective import Objective, Outputs
from trainer.watch import Watch

# SyncBN keeps the ranks' buffers equal already. torch 2.14 renamed the switch and warns of the old name.
_PARAMETERS = inspect.signature(DistributedDataParallel).parameters
NO_BUFFER_SYNC: dict[str, Any] = {
    "forward_sync_buffers" if "forward_sync_buffers" in _PARAMETERS else "broadcast_buffers": False
}


def build_model(config: Config, sync_bn: bool = True) -> MoCoV3:
    """The model with its initial weights, the same on every rank and device: made on the CPU from `--seed`.

    Raises:
        ValueError: the architecture is not known, does not take the image size or cannot checkpoint its activations.
    """
    torch.manual_seed(config.optim.seed)
    model = MoCoV3.build(
        config.model.arch,
        dim=config.model.moco_dim,
        mlp_dim=config.model.moco_mlp_dim,
        temperature=config.model.moco_t,
        stop_grad_conv1=config.model.stop_grad_conv1,
        image_size=config.data.image_size,
        sync_bn=sync_bn,
        heads=config.model.heads,
        backbone=config.model.backbone,
    )
    if config.run.checkpoint_activations:
        checkpoint_activations(model.base_encoder, config.model.arch)
    return model


def recipe(config: Config) -> Recipe:
    """The views that the run learns from, at their size."""
    return MOCO_V3.with_crop_min(config.data.crop_min).scaled(config.data.image_size)


def build_optimizer(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    """LARS or AdamW over what is trained; the learning rate is set before every step."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optim = config.optim
    if optim.optimizer == "lars":
        return LARS(parameters, lr=0.0, weight_decay=optim.weight_decay, momentum=optim.momentum)
    return torch.optim.AdamW(parameters, lr=0.0, weight_decay=optim.weight_decay, fused=True)


def autocast(config: Config, device: torch.device) -> AbstractContextManager[Any]:
    """The precision of `--amp`, already resolved."""
    dtype = torch.float16 if config.run.amp == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=config.run.amp in ("bf16", "fp16"))


def allow_tf32(allowed: bool) -> None:
    """Whether the GPU multiplies float32 with 10 bits of mantissa: matrices and convolutions alike, in all the process.

    torch by itself does so for convolutions only.
    """
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


class Engine:
    """Model, optimizer and data of one rank, `step` steps into the schedule."""

    def __init__(
        self,
        config: Config,
        world: World,
        device: torch.device,
        index: DatasetIndex,
        model: MoCoV3,
        threads: int,
        on_failed: Callable[[str], None] = warnings.warn,  # told of each image that this rank finds bad
    ) -> None:
        self.config, self.device, self.world = config, device, world
        self.fingerprint, self.images, self.threads = index.fingerprint, len(index), threads
        self.loader = ViewLoader(
            index,
            recipe=recipe(config),
            batch_size=config.optim.batch_size // world.size,
            seed=config.optim.seed,
            rank=world.rank,
            world_size=world.size,
            device=str(device),
            image_size=config.data.image_size,
            output="uint8",
            num_threads=threads,
            augment="fused" if config.data.augment == "fused" else "dali",
            jpeg_engine=config.data.jpeg_engine == "on",
            max_failed=config.data.max_failed,
            on_failed=on_failed,
        )
        self.shared_failed = 0  # images known to all ranks as failed
        self.steps_per_epoch = len(self.loader)
        self.total = config.optim.epochs * self.steps_per_epoch
        self.last = min(self.total, config.run.max_steps or self.total)
        self.step = 0
        self.seconds = 0.0
        self.notes: dict[str, Any] = {}  # what else the run must remember: k-NN accuracy before the first step

        allow_tf32(config.run.amp == "tf32")
        # cuDNN tries which kernels are the fastest, as the reference has it do; which, depends on the moment.
        torch.backends.cudnn.benchmark = not config.run.deterministic
        self.dtype = torch.float64 if config.run.dtype == "float64" else torch.float32
        self.model = model.to(device=device, dtype=self.dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if config.run.compile == "on":
            compile_encoders(self.model)
        self.optimizer = build_optimizer(config, self.model)
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.run.amp == "fp16")
        # Themselves, as torch.manual_seed looks for every kind of device and takes a tenth of a millisecond.
        self._generators = [torch.default_generator]
        if device.type == "cuda":
            self._generators.append(torch.cuda.default_generators[device.index])
        self.guard = Guard(self.model)
        self.watch = Watch(world.rank, config.run.on_nan)
        share = config.optim.batch_size // world.size
        self.chunk = config.run.microbatch if (config.run.microbatch or share) < share else None
        self.forward: Callable[..., Outputs] = Objective(self.model)
        if world.torchrun and self.chunk is None:
            self.forward = DistributedDataParallel(
                self.forward,
                device_ids=[device.index] if device.type == "cuda" else None,
                gradient_as_bucket_view=True,
                **NO_BUFFER_SYNC,
            )
            # Else it waits for the device at every hundredth step, to time itself; at the first ten it does anyway.
            self.forward._set_ddp_runtime_logging_sample_rate(1_000_000_000)
        elif world.torchrun:  # what DDP does at its making: processors of another kind may have drawn other last digits
            for tensor in (*self.model.parameters(), *self.model.buffers()):
                dist.broadcast(tensor.data, 0)

    def train_step(self, views: tuple[Tensor, ...], indices: Tensor | None = None) -> Tensor:
        """One step on two views (N, 3, S, S), raw uint8 or normalised; returns this rank's loss, on the device.

        indices: the images' rows in the index, int64 (N,) on the CPU, to name them should the step go bad: with
        gradients that are not finite it changes nothing in the model and the optimizer, but counts as a step.
        """
        self._schedule()
        # What a backbone drops is a function of seed, step and rank, so that a run that goes on drops the same.
        seed = _mixed(self.config.optim.seed, self.step, self.world.rank)
        for generator in self._generators:
            generator.manual_seed(seed)
        self.optimizer.zero_grad(set_to_none=True)
        self.guard.remember()
        outputs = self._forward_backward(views)
        self.scaler.unscale_(self.optimizer)
        gradients = [parameter.grad for parameter in self.trained if parameter.grad is not None]
        # A loss that is not finite has such gradients, and averaging has given them to every rank: no rank need ask the
        # others.
        norm = get_total_norm(gradients)
        bad = ~norm.isfinite()
        if self.config.optim.clip_grad is not None:
            clip_grads_with_norm_(self.trained, self.config.optim.clip_grad, norm)
        # Not by way of the scaler's step, which waits for the device with any optimizer that is not fused.
        self.optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
        self.optimizer.step()
        self.scaler.update()
        self.guard.undo(bad)
        self.step += 1
        self.watch.add(self.step, bad, outputs, norm, self.scaler.is_enabled(), indices)
        return outputs.loss.detach()

    def _schedule(self) -> None:
        """Learning rate and momentum coefficient of the step that comes."""
        optim, moco = self.config.optim, self.config.model
        epoch = self.step / self.steps_per_epoch
        self.lr = learning_rate(
            epoch,
            peak=optim.lr * optim.batch_size / 256,
            epochs=optim.epochs,
            warmup_epochs=optim.warmup_epochs,
        )
        self.momentum = momentum_coefficient(epoch, start=moco.moco_m, epochs=optim.epochs, cosine=moco.moco_m_cos)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr

    def _forward_backward(self, views: tuple[Tensor, ...]) -> Outputs:
        """Loss and gradients, these averaged over the ranks; the momentum encoder has moved."""
        if self.chunk is not None:
            precision = partial(autocast, self.config, self.device)
            pair = (views[0], views[1])
            outputs = chunked_step(self.model, pair, self.momentum, self.chunk, precision, self.scaler.scale)
            average_gradients(self.trained)
            return outputs
        with autocast(self.config, self.device):
            outputs = self.forward(*views, momentum=self.momentum)
        self.scaler.scale(outputs.loss).backward()
        return outputs

    def set_aside(self, rows: Iterable[int]) -> None:
        """Have other images stand in for these, which every rank knows to be bad.

        Raises:
            DatasetError: they are too many.
        """
        self.loader.add_failed(rows)
        self.shared_failed = len(self.loader.failed)

    def state_dict(self) -> dict[str, Any]:
        """All that a run needs to go on with the very next step; plain containers and tensors."""
        return {
            "step": self.step,
            "flags": self.config.flags(),
            "fingerprint": self.fingerprint,
            "seconds": self.seconds,
            "notes": {**self.notes, "skipped_steps": self.watch.skipped, "bad_in_a_row": self.watch.bad_in_a_row},
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "loader": self.loader.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.loader.load_state_dict(state["loader"])
        self.shared_failed = len(self.loader.failed)
        self.step, self.seconds, self.notes = state["step"], state["seconds"], state["notes"]
        self.watch = Watch(self.world.rank, self.config.run.on_nan)  # what it saw was not of this state
        self.watch.skipped = self.notes.get("skipped_steps", 0)
        self.watch.bad_in_a_row = self.notes.get("bad_in_a_row", 0)


def _mixed(*numbers: int) -> int:
    """A hash of several numbers, below 2^63."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def compile_encoders(model: MoCoV3, **options: Any) -> None:
    """torch.compile the parts of the model, with these options."""
    # DDP's own graph splitter would cut the encoders at every bucket.
    torch._dynamo.config.optimize_ddp = False
    model.compile_parts(**options)
