"""The step in the manner of the reference release, as a yardstick: same model, same batch, none of the speed.

Eager; float16 autocast with a loss scaler on CUDA, float32 on the CPU; one forward pass a view; parameters visited one
by one in Python for the moving average and in LARS; the host waits for the loss and for the scaler at every step.
"""

import torch
from torch import Tensor

from model import learning_rate
from trainer.config import Config
from trainer.engine import build_model


class ReferenceStep:
    """One rank, one device; views are normalised float32 tensors (N, 3, S, S)."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self.config, self.device = config, device
        self.model = build_model(config, sync_bn=False).to(device)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        optim = config.optim
        self.optimizer: torch.optim.Optimizer
        if optim.optimizer == "lars":
            self.optimizer = LoopLARS(trained, optim.weight_decay, optim.momentum)
        else:
            self.optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=optim.weight_decay)
        self.scaler = torch.amp.GradScaler(device.type, enabled=device.type == "cuda")
        self.step = 0

    def train_step(self, x1: Tensor, x2: Tensor) -> float:
        """One step; returns the loss."""
        optim = self.config.optim
        rate = learning_rate(
            self.step, peak=optim.lr * optim.batch_size / 256, epochs=optim.epochs, warmup_epochs=optim.warmup_epochs
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(self.device.type, torch.float16, enabled=self.device.type == "cuda"):
            q = self.model.queries(x1, x2)
            self._update_momentum(self.config.model.moco_m)
            loss = self.model.loss(q, self.model.keys(x1, x2))
        value = loss.item()
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)  # reads on the host whether a gradient overflowed
        self.scaler.update()
        self.step += 1
        return value

    @torch.no_grad()
    def _update_momentum(self, m: float) -> None:
        pairs = zip(self.model.base_encoder.parameters(), self.model.momentum_encoder.parameters(), strict=True)
        for base, slow in pairs:
            slow.mul_(m).add_(base, alpha=1 - m)


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
                buffer = self.state[p].setdefault("mu", torch.zeros_like(p))
                buffer.mul_(group["momentum"]).add_(update)
                p.add_(buffer, alpha=-group["lr"])
