"""The step in the manner of the reference release, as a yardstick, and what is changed about it one thing at a time.

As it stands: eager; float16 autocast with a loss scaler on CUDA, float32 on the CPU; one forward pass a view;
parameters visited one by one in Python for the moving average and by LARS, AdamW as torch chooses (lists of tensors on
CUDA); the host waits for the loss and for the scaler at every step. Each field of `Changes` but the last two, which are
experiments, takes one of these away; with all it is the trainer's step but for the order of queries and keys, and for
what that does to watch over a run: the norm of the gradients, and the copies to take a bad step back.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

from benchmarks.float8 import float8_blocks
from trainer.config import Config, replace
from trainer.engine import autocast, build_model, build_optimizer, compile_encoders

Amp = Literal["bf16", "fp16", "off"]


@dataclass(frozen=True)
class Changes:
    """What is not done in the reference's manner."""

    foreach_ema: bool = False  # the moving average as one call for all parameters
    fused_optimizer: bool = False  # fused AdamW, or LARS over lists of tensors
    amp: Amp | None = None  # None: as the reference, fp16 on CUDA and off on the CPU
    no_host_wait: bool = False  # the loss stays on the device (the scaler of fp16 waits all the same)
    channels_last: bool = False
    uint8: bool = False  # views come as bytes and are normalised by the model
    compile: bool = False
    one_pass: bool = False  # both views through the backbone at once, where it has no batch norm
    # What train_ddp.py does not do:
    cuda_graphs: bool = False  # each compiled part is replayed as a whole
    float8: bool = False  # linear layers of a transformer's blocks


class ReferenceStep:
    """One rank, one device. Views are (N, 3, S, S): normalised float32, or uint8 if the changes say so."""

    def __init__(self, config: Config, device: torch.device, changes: Changes | None = None) -> None:
        self.changes, self.device = changes or Changes(), device
        torch.backends.cudnn.benchmark = True  # as in the trainer: cuDNN tries which kernels are the fastest
        amp = self.changes.amp or ("fp16" if device.type == "cuda" else "off")
        self.config = replace(config, amp=amp)
        self.model = build_model(config, sync_bn=False).to(device)
        self.model.one_pass &= self.changes.one_pass
        if self.changes.channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)
        if self.changes.float8:
            float8_blocks(self.model, device)
        if self.changes.compile:
            compile_encoders(self.model, **({"mode": "reduce-overhead"} if self.changes.cuda_graphs else {}))
        self.optimizer = self._optimizer()
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")

    def _optimizer(self) -> torch.optim.Optimizer:
        if self.changes.fused_optimizer:
            return build_optimizer(self.config, self.model)
        optim, trained = self.config.optim, [p for p in self.model.parameters() if p.requires_grad]
        if optim.optimizer == "lars":
            return LoopLARS(trained, optim.weight_decay, optim.momentum)
        return torch.optim.AdamW(trained, lr=0.0, weight_decay=optim.weight_decay)

    def prepared(self, view: Tensor) -> Tensor:
        """A raw view as this step takes it: (N, 3, S, S) uint8 with channels_last strides, as the loader gives it."""
        if not self.changes.uint8:
            with torch.no_grad():
                view = self.model.normalize.forward(view).float()
        strides = torch.channels_last if self.changes.channels_last else torch.contiguous_format
        return view.contiguous(memory_format=strides)

    def train_step(self, x1: Tensor, x2: Tensor, lr: float, momentum: float) -> Tensor | float:
        """One step with this learning rate and momentum coefficient; returns the loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self.changes.cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()  # nothing that the last step's graphs gave is needed any more
        with autocast(self.config, self.device):
            q = self.model.queries(x1, x2)
            self._update_momentum(momentum)
            loss = self.model.loss(q, self.model.keys(x1, x2))
        value: Tensor | float = loss.detach() if self.changes.no_host_wait else loss.item()
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)  # with fp16 the host reads whether a gradient overflowed
        self.scaler.update()
        return value

    @torch.no_grad()
    def _update_momentum(self, m: float) -> None:
        if self.changes.foreach_ema:
            self.model.update_momentum(m)
            return
        pairs = zip(self.model.base_encoder.parameters(), self.model.momentum_encoder.parameters(), strict=True)
        for base, slow in pairs:
            slow.mul_(m).add_(base, alpha=1 - m)


def side_by_side() -> AbstractContextManager[Any]:
    """To compile several models of one class: to Dynamo the second is a recompilation of the first, and too many."""
    return cast(AbstractContextManager[Any], torch._dynamo.config.patch(recompile_limit=64))


class LoopLARS(torch.optim.Optimizer):
    """LARS with a trip to the device for every operation on every parameter."""

    def __init__(self, parameters: list[torch.nn.Parameter], weight_decay: float, momentum: float) -> None:
        super().__init__(parameters, {"lr": 0.0, "weight_decay": weight_decay, "momentum": momentum, "trust": 0.001})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                update = p.grad
                if p.ndim > 1:
                    update = update.add(p, alpha=group["weight_decay"])
                    weight, gradient = p.norm(), update.norm()
                    ratio = torch.where((weight > 0) & (gradient > 0), group["trust"] * weight / gradient, 1.0)
                    update = update * ratio
                if "mu" not in self.state[p]:
                    self.state[p]["mu"] = torch.zeros_like(p)
                buffer = self.state[p]["mu"]
                buffer.mul_(group["momentum"]).add_(update)
                p.add_(buffer, alpha=-group["lr"])
