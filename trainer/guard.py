"""A step whose gradients are not finite leaves nothing behind, and nobody waits to find out."""

import torch
from torch import Tensor

from model import MoCoV3


class Guard:
    """Takes back what a forward pass writes into the model, if the step turns out bad.

    Parameters and optimizer state are masked by the optimizer itself (`found_inf`). But the forward pass has by then
    moved the momentum encoder, and batch norm has written a NaN into running statistics, where it would stay for ever.
    (In the reference a loss scale that overflows skips the optimizer only, and the momentum encoder moves on.)
    The price is a copy of the momentum encoder and the buffers, made and compared on the device at every step.
    """

    def __init__(self, model: MoCoV3) -> None:
        parts = (model.base_encoder, model.momentum_encoder, model.predictor)
        moved = [*model.momentum_encoder.parameters(), *(buffer for part in parts for buffer in part.buffers())]
        # Of one dtype each, or the copy would be a kernel a tensor.
        self._moved = [[t.detach() for t in moved if t.dtype == dtype] for dtype in {t.dtype: None for t in moved}]
        self._before = [[torch.empty_like(t) for t in group] for group in self._moved]

    @property
    def copies(self) -> list[Tensor]:
        """What is kept of the model, on its device."""
        return [tensor for group in self._before for tensor in group]

    def remember(self) -> None:
        """Before the forward pass: keep what it will write over."""
        for group, before in zip(self._moved, self._before, strict=True):
            torch._foreach_copy_(before, group)

    def undo(self, bad: Tensor) -> None:
        """After the step: take all back where `bad`, a bool scalar on the device, is true."""
        for group, before in zip(self._moved, self._before, strict=True):
            for now, then in zip(group, before, strict=True):
                torch.where(bad, then, now, out=now)
